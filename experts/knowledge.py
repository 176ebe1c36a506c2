"""What is known about kinds of objects and places: how to grasp the one, how to put things down on the other."""

from dataclasses import dataclass

import mujoco
import numpy as np

from experts.scene import half_turn, turn, yaw_of


@dataclass
class Grasp:
    """One way to take an object: hand at object position + offset (3,), turned to `rotation` (3, 3)."""

    offset: np.ndarray
    rotation: np.ndarray
    width: float  # what the closed fingers leave of the object, metres
    turns: bool = False  # the object is not round: follow its heading
    cost: float = 0.0
    near: float = 0.014  # metres beside the point from which the fingers may close

    @property
    def closed(self):
        """Metres between the pads below which the object counts as held. Generous for thin things, so that the lift begins
        while the fingers still look half open: a policy without memory cannot tell "closing" from "closed" on a rim."""
        return max(self.width + 0.005, 0.03)


# Grasps at a point of the object's own frame, fingers closing along its x or y axis: (point, axis, width).
POINTS = {
    "moka_pot": ((0.0, 0.073, 0.045), "x", 0.016),
    "chefmate8_frypan": ((0.15, 0.0, 0.042), "y", 0.03),
}
# Round things with a rim, and a handle at their own +x: (radius of the rim's middle, depth below the rim)
RIMS = {
    "porcelain_mug": (0.040, 0.02),
    "white_yellow_mug": (0.043, 0.02),
    "red_coffee_mug": (0.040, 0.02),
}
RIM_NEAR = 0.024  # a rim may stand anywhere between the fingers, which are 8 cm apart
# Handles that a lying hand can take from behind: point in the own frame.
HANDLES = {
    "white_yellow_mug": (0.060, 0.0, 0.055),
    "porcelain_mug": (0.055, 0.0, 0.055),
    "red_coffee_mug": (0.055, 0.0, 0.065),
}
WIDEST = 0.068  # metres between the open fingers, less some play


def reachable(scene, rotation):
    """Whether the wrist reaches a turned hand: at rest joint 7 stands at 0.79 of +-2.9 rad, and a turn by yaw takes it to 0.79 - yaw."""
    return abs(rotation[2, 2]) < 0.9 or -1.5 < yaw_of(rotation @ scene.rest_mat.T) < 2.5


def vertical(scene, yaw):
    """Hand orientations, fingers down, opening along the direction `yaw` (0: as at rest, along world y), within the wrist's reach."""
    for k in (-1, 0, 1):
        rotation = turn(half_turn(yaw) + k * np.pi) @ scene.rest_mat
        if abs(half_turn(yaw) + k * np.pi) <= np.pi and reachable(scene, rotation):
            yield rotation


def leaning(scene, direction, roll, tilt):
    """Hand orientation rolled by `roll` about the vertical, then leaning by `tilt` so that the fingers point along `direction` (3,)."""
    quat, lean = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quat, np.cross([0.0, 0.0, -1.0], direction), tilt)
    mujoco.mju_quat2Mat(lean, quat)
    return lean.reshape(3, 3) @ turn(roll) @ scene.rest_mat


def lying(scene, direction, roll):
    """Hand orientation with the fingers along the horizontal `direction`; roll 0: opening up and down, 90 degrees: sideways."""
    return leaning(scene, direction, roll, np.pi / 2)


def grasp_candidates(scene, name, place):
    kind = scene.kinds[name]
    low, high = scene.extent(name)
    rest = scene.objects[name]
    yaw = scene.yaw(name)
    middle = 0.5 * (low + high) - rest
    own_low, own_high = scene.own_extent(name)
    size = own_high - own_low
    inward = place.inward()
    if inward is not None and kind in HANDLES:  # into a niche: by the handle, the hand lying behind it
        point = np.array(HANDLES[kind])
        back = np.arctan2(-inward[1], -inward[0])  # the handle is to point out of the niche in the end
        # Not quite lying: the wrist would touch the table.
        rotation = turn(yaw - back) @ leaning(scene, inward, np.pi / 2, np.radians(50))
        yield Grasp(turn(yaw) @ point, rotation, 0.02, True)
        return
    if kind in POINTS:
        point, axis, width = POINTS[kind]
        for rotation in vertical(scene, yaw + (np.pi / 2 if axis == "y" else 0.0) - np.pi / 2):
            yield Grasp(turn(yaw) @ np.array(point), rotation, width, True)
        return
    upright = abs(scene.matrix(name)[2, 2]) > 0.9
    if kind in RIMS or min(high[:2] - low[:2]) > WIDEST and min(size[:2]) > WIDEST:
        radius, depth = RIMS.get(kind, (0.5 * (high[1] - low[1]) - 0.008, 0.02))
        handle = kind in RIMS
        centre = np.array([*middle[:2], 0.0])
        if handle:
            centre = turn(yaw) @ np.array([own_low[0] + 0.5 * size[1], 0.0, 0.0])
        for k in range(24):
            angle = np.radians(15 * k)
            if handle and abs((angle - yaw + np.pi) % (2 * np.pi) - np.pi) < np.radians(45):
                continue
            offset = centre + radius * np.array([np.cos(angle), np.sin(angle), 0.0])
            offset[2] = high[2] - depth - rest[2]
            for rotation in vertical(scene, angle - np.pi / 2):
                yield Grasp(
                    offset,
                    rotation,
                    0.03 if handle else 0.014,
                    handle,
                    0.0 if np.sin(angle) > 0 else 0.002,
                    0.014 if handle else RIM_NEAR,
                )
        return
    # As deep as the palm allows (the pads end 3.3 cm below it), and no lower than the fingers clear the floor.
    offset = middle.copy()
    offset[2] = max(low[2] + 0.012, high[2] - 0.027) - rest[2]
    if scene.free:
        yield Grasp(offset + lean(scene, name, place, offset, low, high), scene.rest_mat, high[1] - low[1])
        return
    if not upright and min(high[:2] - low[:2]) > WIDEST:  # it lies, and askew: across its longest axis
        axis = int(np.argmax(size))
        heading = np.arctan2(*scene.matrix(name)[1::-1, axis])
        for rotation in vertical(scene, heading):
            yield Grasp(offset, rotation, np.sort(size)[1])
        return
    askew = abs(half_turn(2 * yaw)) / 2
    if not upright or askew < 0.1:
        for opening, width in ((0.0, high[1] - low[1]), (np.pi / 2, high[0] - low[0])):
            if width < WIDEST + 0.005:
                for rotation in vertical(scene, opening):
                    yield Grasp(offset, rotation, width, place.compartment)
        return
    for axis in (0, 1):
        if size[axis] < WIDEST:
            for rotation in vertical(scene, yaw + (np.pi / 2 if axis == 1 else 0.0) - np.pi / 2):
                yield Grasp(offset, rotation, size[axis], True)


def lean(scene, name, place, offset, low, high):
    """Step aside (3,), along the fingers' opening, from a neighbour that is taller than the palm comes down.

    The hand is 20 cm wide, and its palm comes down to 4 cm above the grasp point; the opening (8 cm) leaves some room.
    """
    rest, step = scene.objects[name], np.zeros(3)
    room = max(0.0, 0.5 * (0.08 - (high[1] - low[1])) - 0.005)
    for other in scene.sim.env.env.objects_dict:
        if other in (name, place.parent):
            continue
        near_low, near_high = scene.extent(other)
        gap = 0.5 * (near_low + near_high) - 0.5 * (low + high)
        if near_high[2] > rest[2] + offset[2] + 0.04 and abs(gap[0]) < 0.08 and abs(gap[1]) < 0.15:
            step[1] -= np.sign(gap[1]) * room
    return step


class Place:
    """Where a thing is put: on an object, or at one of the task's named sites."""

    drop, tolerance, slack = 0.01, 0.02, 0.02
    compartment = False

    def __init__(self, scene, name, shift=0.0):
        self.shift = np.array([shift, 0.0, 0.0])
        self.scene, self.name = scene, name
        self.site = name in scene.sim.env.env.object_sites_dict
        thing = scene.sim.env.env.object_sites_dict.get(name)
        self.parent = getattr(thing, "parent_name", None) if self.site else name
        self.kind = scene.kinds.get(self.parent, "table")

    def position(self):
        return self.shift + (self.scene.site(self.name)[0] if self.site else self.scene.objects[self.name])

    def inward(self):
        """Direction (3,) into a niche that is filled from the front; None where things are put down from above."""
        return None

    def via(self, obj):
        """Where the thing is to go next (3,), given where it is."""
        return self.position()

    def heights(self):
        """Surface that the thing is put on, and the top of the walls around it (None: nothing to carry it over)."""
        z = self.scene.site(self.name)[0][2] if self.site else self.scene.extent(self.name)[1][2]
        return z, z + 0.04

    def turns(self, yaw):
        return (0.0,)


class Container(Place):
    """A basket or tray: let go above its walls."""

    drop, tolerance, slack = 0.02, 0.03, 0.03

    def position(self):
        return self.scene.objects[self.parent]

    def heights(self):
        return self.scene.extent(self.parent)[1][2], None


class Compartment(Place):
    drop, tolerance, slack = 0.03, 0.012, 0.015
    compartment = True

    def heights(self):
        low, high = self.scene.extent(self.parent)
        return low[2] + 0.014, high[2]

    def turns(self, yaw):
        """A book stands along the compartment's long side."""
        rotation = self.scene.site(self.name)[1]
        size = np.abs(rotation @ self.scene.sim.env.env.object_sites_dict[self.name].size)
        long = 0.0 if size[0] > size[1] else np.pi / 2  # direction of the long side
        first = half_turn(long - np.pi / 2 - yaw)  # own y is the book's long side
        options = [first] if abs(size[0] - size[1]) > 0.01 else [first, half_turn(first + np.pi / 2)]
        return [o + k * np.pi for o in options for k in (-1, 0, 1) if abs(o + k * np.pi) <= np.pi]


class Niche(Place):
    """A microwave: from the front, at the height of its floor."""

    drop, tolerance, slack = 0.01, 0.015, 0.02
    DEPTH = 0.02  # metres of the thing's middle behind the niche's front

    def inward(self):
        return np.round(self.scene.matrix(self.parent)[:, 1])

    def position(self):
        centre, _ = self.scene.site(self.name)
        size = self.scene.sim.env.env.object_sites_dict[self.name].size
        return centre + self.inward() * (self.DEPTH - size[1])

    def via(self, obj):
        goal, inward = self.position(), self.inward()
        side = (goal - obj)[:2] - (goal - obj) @ inward * inward[:2]
        return goal - inward * 0.2 * np.clip((np.linalg.norm(side) - 0.01) / 0.03, 0.0, 1.0)

    def heights(self):
        centre, _ = self.scene.site(self.name)
        return centre[2] - 0.072, None


class InDrawer(Place):
    """An open drawer: 2 cm before its middle, where the hand has room beside the handles above."""

    drop, tolerance, slack = 0.01, 0.02, 0.02

    def position(self):
        centre, rotation = self.scene.site(self.name)
        return centre - 0.02 * rotation[:, 1]

    def heights(self):
        z, _ = self.scene.site(self.name)
        return z[2] - 0.03, z[2] + 0.04


def place_of(scene, name, shift=0.0):
    place = Place(scene, name, shift)
    thing = scene.sim.env.env.object_sites_dict.get(name)
    if place.kind.endswith(("basket", "wooden_tray")):  # LIBERO-PRO has a red_basket
        return Container(scene, name)
    if place.kind == "desk_caddy":
        return Compartment(scene, name)
    if place.kind == "microwave" and name.endswith("heating_region"):
        return Niche(scene, name)
    if place.site and "cabinet" in place.kind and getattr(thing, "joints", None):
        return InDrawer(scene, name)
    return place


def no_skill(predicate):
    """Why no skill here brings about a goal's predicate (name, *arguments); None where one does."""
    name, *things = predicate
    if name not in ("on", "in", "open", "close", "turnon", "turnoff"):
        return f"predicate {name}"
    if name == "open" and "microwave" in things[0]:
        return "open a microwave"
    if name == "open" and "bottom_region" in things[0]:
        return "open a bottom drawer"
    if name == "in" and "shelf" in things[1]:
        return "put into a shelf"
    return None
