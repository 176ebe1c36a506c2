"""Skills: each brings about one predicate of a goal, from the present state alone.

A skill is planned once per episode, from the placement (where to grasp, which side of a rim is free); its `action` then depends on
nothing but the scene as it is now. `around` and `leave` take the hand away from what is finished before the next skill begins.
"""

import numpy as np

from experts.knowledge import grasp_candidates, leaning, lying, place_of, reachable
from experts.scene import METRES_PER_DECISION, OPEN_GAP, angle_between, command, half_turn, travel, turn
from support.errors import UserError


class PickAndPlace:
    """Grasp an object, carry it to its place, let go."""

    def __init__(self, scene, name, place, shift=0.0, ahead=0.0, start=0.0):
        """ahead: how far the place will have moved by then; start: how far the object will (see `Expert`), (3,) or 0."""
        self.scene, self.name, self.place = scene, name, place_of(scene, place, shift)
        self.rest, self.yaw0 = scene.objects[name] + start, scene.yaw(name)
        low, high = (corner + start for corner in scene.extent(name))
        self.radius = 0.5 * (high - low)[:2]
        goal, surface, walls = self.place.position() + ahead, *self.place.heights()
        # The hand goes into a niche, not above it: what it stands in is no obstacle (`Niche.position` keeps clear of its front).
        self.ignored = (name, "") if self.place.inward() is None else (name, "", self.place.parent)
        ignored = self.ignored[:1] + self.ignored[2:]
        best = None
        for grasp in grasp_candidates(scene, name, self.place):
            grip = self.rest + grasp.offset
            crowded = scene.overlap(grip, grasp.rotation, (name,))
            cost = 6 * crowded + grasp.cost
            cost += 0.1 * angle_between(grasp.rotation, scene.rest_mat)
            for dyaw in self.place.turns(self.yaw0):
                end, rotation = goal + turn(dyaw) @ grasp.offset, turn(dyaw) @ grasp.rotation
                twist = angle_between(rotation, scene.rest_mat)
                if not reachable(scene, rotation):
                    continue
                # As low as the hand has room there, and no lower than the thing stands.
                lowest = height = surface + (grip[2] - low[2]) + self.place.drop
                while (
                    not scene.free
                    and height < lowest + 0.4
                    and scene.overlap(np.array([*end[:2], height]), rotation, ignored) > 0.003
                ):
                    height += 0.005
                total = cost + 2.0 * (height - lowest) + 0.1 * twist + 0.02 * abs(dyaw)
                if best is None or total < best[0]:
                    best = (total, grasp, dyaw, height, crowded)
        if best is None:
            raise UserError(f"no grasp of {name} within reach in {scene.sim.suite} task {scene.sim.task_id}")
        _, self.grasp, self.dyaw, self.release_height, self.crowded = best
        self.offset, self.hang = self.grasp.offset, (self.rest + self.grasp.offset)[2] - low[2]
        self.carry_height = (
            self.release_height if walls is None else max(self.release_height, walls + self.hang + 0.02)
        )
        # above the grasp point, free of the object
        self.clearance = high[2] - (self.rest[2] + self.offset[2]) + 0.045
        self.back = np.array([0.0, 0.0, 1.0])  # the way the hand comes from
        self.upright = abs(self.grasp.rotation[2, 2]) > 0.9
        if not self.upright:
            self.back, self.clearance = -self.grasp.rotation[:, 2], 0.09
        self.turning = (
            self.grasp.turns or self.dyaw != 0.0 or angle_between(self.grasp.rotation, scene.rest_mat) > 0.1
        )

    def grip(self):
        """Where the hand belongs on the object as it lies now: point (3,), rotation (3, 3), and the object's turn since the start."""
        dyaw = 0.0
        if self.grasp.turns:
            dyaw = self.scene.yaw(self.name) - self.yaw0
            dyaw = (dyaw + np.pi) % (2 * np.pi) - np.pi
        return (
            self.scene.objects[self.name] + turn(dyaw) @ self.offset,
            turn(dyaw) @ self.grasp.rotation,
            dyaw,
        )

    def around(self):
        point, rotation, dyaw = self.grip()
        error = self.scene.eef - point
        back = turn(dyaw) @ self.back
        along = error @ back
        return np.linalg.norm(error - along * back) < 0.05 and -0.05 < along < self.clearance - 0.02

    def on_its_way(self):
        """Whether the object is still being carried: it may count as being there before it is where it should be let go."""
        error = np.linalg.norm(self.scene.eef - self.grip()[0])
        left = np.linalg.norm((self.place.position() - self.scene.objects[self.name])[:2])
        high = self.scene.eef[2] > self.release_height + self.place.slack
        return error < 0.05 and self.scene.gap < self.grasp.closed and (left > self.place.tolerance or high)

    def leave(self):
        scene = self.scene
        _, rotation, dyaw = self.grip()
        step = 0.06 * turn(dyaw) @ self.back if scene.gap > OPEN_GAP - 0.02 else 0.0
        return command(scene, step + np.zeros(3), rotation if self.turning else None)

    def action(self):
        scene = self.scene
        point, rotation, dyaw = self.grip()
        back = turn(dyaw) @ self.back
        eef, obj = scene.eef, scene.objects[self.name]
        error = point - eef
        along = error @ back
        lateral = np.linalg.norm(error[:2] if self.upright else error - along * back)
        # the fingers have begun to close: stay with it unless the object is clearly elsewhere
        started = scene.gap < 0.072
        close = self.grasp.near
        near = (close + 0.016, 0.035) if started else (close, 0.012)
        if not scene.free and 0.004 < scene.gap < self.grasp.closed:
            near = (0.05, 0.06)  # something is held, and may hang aslant from its handle
        between = lateral < near[0] and abs(along) < near[1]
        gripping = between and scene.gap < self.grasp.closed
        moved = np.linalg.norm(obj - self.rest)
        turned = 0.0
        if self.turning:
            carrying = gripping and moved > 0.02
            rotation = turn(self.dyaw) @ self.grasp.rotation if carrying else rotation
            turned = angle_between(rotation, scene.eef_mat)
            between = between and (turned < 0.15 or started)
        else:
            rotation = None
        to_goal = (self.place.via(obj) - obj)[:2]
        distance = np.linalg.norm(to_goal)
        left = np.linalg.norm((self.place.position() - obj)[:2])
        tolerance = self.place.tolerance
        rest_height = (self.rest + self.offset)[2]

        if between and moved > 0.02 and left < tolerance and eef[2] < self.release_height + self.place.slack:
            return command(scene, np.zeros(3))  # over the goal: let go
        if gripping:
            # Carry on a slant: rise and travel together, but stay a wall's width short of the goal until high enough.
            out = np.zeros(7)
            rise = self.carry_height - rest_height
            lifted = np.clip((eef[2] - rest_height) / rise, 0, 1) if rise > 0.02 else 1.0
            stop = 0.16 if lifted < 0.75 and distance > 0.1 else 0.0
            height = self.release_height + np.clip((distance - tolerance) / 0.04, 0, 1) * (
                self.carry_height - self.release_height
            )
            over = np.array([*(eef[:2] + to_goal), self.carry_height])
            look_out = not scene.free and distance > tolerance
            safe = scene.safe_height(over, self.hang, self.radius, self.ignored) if look_out else height
            speed = np.clip(1.0 - (safe - eef[2]) / 0.04, 0.0, 1.0) if look_out else 1.0
            if turned > 0.3 and moved > 0.02 and distance < 0.12:
                speed = 0.0  # turn before going in
            step = np.clip(distance - stop, 0.0, METRES_PER_DECISION / 0.8) * speed
            out[:2] = 0.8 * to_goal / (distance + 1e-9) * step / METRES_PER_DECISION
            out[2] = np.clip(0.8 * (max(height, safe) - eef[2]) / METRES_PER_DECISION, -1.0, 1.0)
            if rotation is not None:
                out[3:6] = command(scene, np.zeros(3), rotation)[3:6]
            escape = (
                scene.way_out(self.radius + 0.02, self.ignored)
                if look_out and distance > tolerance + 0.02
                else np.zeros(2)
            )
            if escape.any():  # something hangs over it, e.g. an open drawer: sideways first
                out[:2] = command(scene, np.array([*escape, 0.0]))[:2]
                if np.linalg.norm(escape) > 0.01:
                    out[2] = command(scene, np.array([0.0, 0.0, rest_height + 0.03 - eef[2]]))[2]
            if scene.gap > self.grasp.width + 0.005:
                out[:3] *= 0.25  # the fingers are still closing
            elif moved < 0.008:
                out[:3] *= 0.5  # the first centimetre slowly, while they still tighten
            return out
        if between:
            return command(scene, error, rotation, 0.0, 0.3, 0.2)  # close, holding still
        # Down a funnel: the grasp height where the fingers may close, full clearance 3 cm outside, higher still when far away.
        funnel = self.clearance * np.clip((lateral - close + 0.004) / 0.03, 0.0, 1.0)
        if turned > 0.3:
            funnel = self.clearance
        if self.upright:
            funnel += 0.3 * max(0.0, lateral - 0.08)
        way = error + funnel * back + [0.0, 0.0, 0.0 if self.upright else 0.3 * max(0.0, lateral - 0.08)]
        return travel(scene, way, rotation, 1.0, (self.name, ""))


class Drawer:
    """Open or close a drawer: the hand comes from the front, lying, grips the bar and pulls; or pushes with the fingertips."""

    def __init__(self, scene, place, opening):
        self.scene, self.opening = scene, opening
        m = scene.sim.model
        thing = scene.sim.env.env.object_sites_dict[place]
        self.joint, self.cabinet = m.joint(thing.joints[0]).id, thing.parent_name
        self.outward = -scene.episode.data.xaxis[self.joint]
        mine = np.flatnonzero(m.geom_bodyid[scene.boxed] == m.jnt_bodyid[self.joint])
        self.bar = mine[np.argmax(0.5 * (scene.low + scene.high)[mine] @ self.outward)]
        self.mine = mine
        if opening:
            self.rotation = lying(scene, -self.outward, 0.0)
        else:
            # The hand is 20 cm wide but 8 cm thick: turned by a quarter and leaning forward it reaches a low drawer's front
            # without touching what stands above it.
            self.rotation = leaning(scene, -self.outward, np.pi / 2, np.radians(35))
            # Towards +y the wrist can be turned either way.
            self.other = (
                leaning(scene, -self.outward, -np.pi / 2, np.radians(35))
                if self.outward[1] < 0
                else self.rotation
            )

    def position(self):
        return self.scene.episode.data.qpos[self.scene.sim.model.jnt_qposadr[self.joint]]

    def parts(self):
        bar = 0.5 * (self.scene.low + self.scene.high)[self.bar]
        out = (self.scene.eef - bar) @ self.outward
        return bar, out, bar - self.scene.eef + out * self.outward

    def wanted(self):
        """The hand's rotation; to close towards +y, the one of the two that it is turned to."""
        return self.rotation if self.opening or self.scene.hand_yaw() > 0 else self.other

    def around(self):
        _, out, lateral = self.parts()
        lying = angle_between(self.wanted(), self.scene.eef_mat) < 0.5
        return lying and out < (0.12 if self.opening else 0.07) and np.linalg.norm(lateral) < 0.08

    def leave(self):
        scene = self.scene
        step = 0.08 * self.outward if scene.gap > OPEN_GAP - 0.02 or not self.opening else 0.0
        return command(scene, step + np.zeros(3), self.wanted(), float(self.opening))

    def action(self):
        scene = self.scene
        bar, out, lateral = self.parts()
        off = np.linalg.norm(lateral)
        rotation = self.wanted()
        ready = angle_between(rotation, scene.eef_mat) < 0.25
        stand = 0.10 * np.clip((off - 0.014) / 0.02, 0.0, 1.0) if ready else 0.12
        if not self.opening:
            # Down in front of it, then against it.
            aside = np.linalg.norm(lateral[:2])
            if ready and off < 0.05 and out < 0.15:
                push = stand if stand > 0.02 else -0.06
                return command(scene, bar + push * self.outward - scene.eef, rotation, 0.0)
            lift = 0.15 * np.clip((aside - 0.01) / 0.03, 0.0, 1.0) if ready else 0.15
            target = bar + max(stand, 0.1) * self.outward + [0.0, 0.0, lift]
            return travel(scene, target - scene.eef, rotation, 0.0, ("", self.cabinet))
        started = scene.gap < 0.07
        near = ready and off < (0.03 if started else 0.018) and abs(out) < (0.03 if started else 0.015)
        if near and scene.gap < 0.028:  # the bar is 16 mm thick
            return command(scene, bar + 0.08 * self.outward - scene.eef, rotation, 0.0, 0.8)
        if near:
            return command(scene, bar - scene.eef, rotation, 0.0, 0.3, 0.2)
        return travel(scene, bar + stand * self.outward - scene.eef, rotation, 1.0, ("", self.cabinet))


class Knob:
    """Turn a stove's knob: take its fin between the fingers and turn the hand."""

    def __init__(self, scene, stove, on):
        self.scene, self.on = scene, on
        m = scene.sim.model
        self.joint = m.joint(scene.things()[stove].joints[0]).id
        self.body = m.jnt_bodyid[self.joint]

    def fin(self):
        """Where the hand takes the fin, (3,), and the hand's rotation there: the fin lies along the knob's own y axis."""
        across = self.scene.yaw_body(self.body)
        return self.scene.episode.data.xanchor[self.joint] + [0.0, 0.0, 0.035], turn(
            half_turn(across - np.pi / 2)
        ) @ self.scene.rest_mat

    def around(self):
        error = self.scene.eef - self.fin()[0]
        return np.linalg.norm(error[:2]) < 0.05 and error[2] < 0.05

    def leave(self):
        scene = self.scene
        up = np.array([0.0, 0.0, 0.06 if scene.gap > OPEN_GAP - 0.02 else 0.0])
        return command(scene, up, self.fin()[1])

    def action(self):
        scene = self.scene
        point, rotation = self.fin()
        error = point - scene.eef
        off = np.linalg.norm(error[:2])
        started = scene.gap < 0.07
        near = off < (0.02 if started else 0.01) and abs(error[2]) < (0.02 if started else 0.012)
        if near and scene.gap < 0.03:  # the fin is 24 mm thick
            return command(scene, error, turn(0.5 if self.on else -0.5) @ scene.eef_mat, 0.0)
        if near and (started or angle_between(rotation, scene.eef_mat) < 0.15):
            return command(scene, error, rotation, 0.0, 0.3, 0.2)
        way = error + [0.0, 0.0, 0.07 * np.clip((off - 0.01) / 0.03, 0.0, 1.0)]
        return travel(scene, way, rotation, 1.0, ("",))


class Push:
    """Slide a plate or a bowl over the table: closed fingers in its well push its wall from inside, which keeps it stable.

    goal: a place's name, or a point (3,) on the table.
    """

    def __init__(self, scene, name, goal):
        self.scene, self.name = scene, name
        self.place = place_of(scene, goal) if isinstance(goal, str) else None
        self.goal, self.rest = goal, scene.objects[name].copy()
        deep = scene.extent(name)[1][2] - self.rest[2] > 0.03
        self.depth = 0.02 if deep else 0.007  # of the tips above its origin: over the bottom, below the rim
        self.speed = 0.4 if deep else 0.8  # slowly over a plate's low rim, noise takes the tips out of it

    def progress(self):
        """How far it has come along the way to a point, metres."""
        way = self.goal - self.rest
        return (self.scene.objects[self.name] - self.rest) @ way / np.linalg.norm(way)

    def around(self):
        error = self.scene.objects[self.name] - self.scene.eef
        return self.scene.gap < 0.02 and np.linalg.norm(error[:2]) < 0.06 and -error[2] < 0.09

    def leave(self):
        return command(self.scene, np.array([0.0, 0.0, 0.06]), self.scene.rest_mat, 0.0)

    def action(self):
        scene = self.scene
        thing = scene.objects[self.name]
        way = ((self.place.position() if self.place else self.goal) - thing)[:2]
        distance = np.linalg.norm(way)
        horizontal = np.linalg.norm((thing - scene.eef)[:2])
        height = thing[2] + self.depth
        if horizontal < 0.045 and scene.eef[2] < thing[2] + 0.035:  # inside
            lead = thing[:2] + way / (distance + 1e-9) * (0.03 + min(distance, 0.05))
            return command(scene, np.array([*lead, height]) - scene.eef, scene.rest_mat, 0.0, 0.8, self.speed)
        above = 0.08 * np.clip((horizontal - 0.01) / 0.03, 0, 1)
        return travel(
            scene, np.array([*thing[:2], height + above]) - scene.eef, scene.rest_mat, 0.0, (self.name, "")
        )


class Door:
    """Close a door that swings about a vertical hinge by pushing its outer face round with closed fingers."""

    def __init__(self, scene, thing):
        self.scene = scene
        m = scene.sim.model
        self.joint = m.joint(scene.things()[thing].joints[0]).id
        self.body = m.jnt_bodyid[self.joint]

    def around(self):
        return False  # what comes after a door needs no room

    def action(self):
        scene, d, m = self.scene, self.scene.episode.data, self.scene.sim.model
        hinge = d.xanchor[self.joint]
        mine = np.flatnonzero(m.geom_bodyid[scene.boxed] == self.body)
        centre = d.geom_xpos[scene.boxed[mine]].mean(0)
        heading = np.arctan2(*(centre - hinge)[1::-1])
        radial = np.array([np.cos(heading), np.sin(heading), 0.0])
        closing = np.array([-np.sin(heading), np.cos(heading), 0.0])  # the joint's positive sense shuts it
        height = scene.high[mine, 2].max() - 0.05
        behind = hinge + 0.2 * radial - 0.09 * closing
        behind[2] = height
        error = behind - scene.eef
        depth = -error @ closing
        along = abs(error @ radial)
        if scene.eef[2] < height + 0.03 and along < 0.08 and depth > -0.05:
            target = hinge + 0.2 * radial + 0.04 * closing
            target[2] = height
            return command(scene, target - scene.eef, scene.rest_mat, 0.0, 0.8)
        lift = 0.15 if (scene.eef - hinge) @ closing > -0.06 else 0.0
        return travel(scene, behind + [0.0, 0.0, lift] - scene.eef, scene.rest_mat, 0.0, ("",))
