"""What an expert knows of an episode: poses, boxes around collision geometry, the goal's predicates, and how to move the hand."""

import mujoco
import numpy as np

METRES_PER_DECISION = (
    0.05  # displacement of a full command held for 4 control steps, measured in steady state
)
RADIANS_PER_DECISION = 0.5
# share of the remaining way per decision, x y z: the arm coasts 1 to 3 cm after a full command
GAIN = np.array([0.5, 0.6, 0.8])
OPEN_GAP = 0.078  # metres between the pads of the open gripper

# Boxes of the hand around the grip site, in its own axes (along the fingers' opening, across, up), from the collision meshes.
PALM = (np.array([-0.106, -0.04, 0.024]), np.array([0.106, 0.04, 0.13]))
WRIST = (np.array([-0.08, -0.08, 0.13]), np.array([0.08, 0.08, 0.35]))
FINGERS = (np.array([-0.05, -0.01, -0.006]), np.array([0.05, 0.01, 0.024]))


def object_extent(sim, data, name):
    """World-axis bounding box of an object's collision geometry: (low (3,), high (3,)) in metres."""
    m, body = sim.model, sim.objects[name]
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    corners = []
    for g in range(m.ngeom):
        b = m.geom_bodyid[g]
        while b and b != body:
            b = m.body_parentid[b]
        if b == body and (m.geom_contype[g] or m.geom_conaffinity[g]):
            centre, half = m.geom_aabb[g][:3], m.geom_aabb[g][3:]
            corners.append(data.geom_xpos[g] + (centre + signs * half) @ data.geom_xmat[g].reshape(3, 3).T)
    corners = np.concatenate(corners)
    return corners.min(0), corners.max(0)


def yaw_of(matrix):
    """Heading of a body's x axis in the plane of the table, radians."""
    return np.arctan2(matrix[1, 0], matrix[0, 0])


def half_turn(angle):
    """The angle modulo 180 degrees nearest to zero: a parallel gripper does not mind being turned round."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


def turn(angle):
    """Rotation about the vertical axis, (3, 3)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_vector(matrix):
    """Axis times angle of a rotation matrix, (3,) radians."""
    angle = np.arccos(np.clip(0.5 * (np.trace(matrix) - 1.0), -1.0, 1.0))
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    return angle * axis / max(np.linalg.norm(axis), 1e-9)


class Scene:
    """One episode, seen with the simulator's eyes. `look` before each decision; poses are then attributes."""

    def __init__(self, episode):
        self.episode, self.sim = episode, episode.sim
        m = self.sim.model
        self.boxed = np.flatnonzero(
            ((m.geom_contype != 0) | (m.geom_conaffinity != 0))
            & (m.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)
            & (m.body_rootid[m.geom_bodyid] != m.body_rootid[m.site_bodyid[self.sim.site]])
        )
        owner = {body: name for name, body in self.sim.objects.items()}
        self.owner = []
        for g in self.boxed:
            b = m.geom_bodyid[g]
            while b and b not in owner:
                b = m.body_parentid[b]
            self.owner.append(owner.get(b, ""))
        self.owner = np.array(self.owner)
        # libero_object's floor: everything lies square and within the fingers' reach, and nothing tall stands in the way.
        self.free = "floor" in self.sim.env.env.parsed_problem["problem_name"]
        self.kinds = {name: thing.category_name for name, thing in self.things().items()}
        self.look()
        self.rest_mat = self.eef_mat

    def things(self):
        env = self.sim.env.env
        return {**env.objects_dict, **env.fixtures_dict}

    def look(self):
        p, d, m = self.episode.privileged(), self.episode.data, self.sim.model
        self.eef, self.eef_mat, self.gripper = p["eef_pos"], p["eef_mat"], p["gripper_qpos"]
        self.gap = p["gripper_qpos"][0] - p["gripper_qpos"][1]  # metres between the pads
        self.objects = {name: pos for name, (pos, _) in p["objects"].items()}
        rotation = d.geom_xmat[self.boxed].reshape(-1, 3, 3)
        centre = d.geom_xpos[self.boxed] + np.einsum("nij,nj->ni", rotation, m.geom_aabb[self.boxed, :3])
        half = np.einsum("nij,nj->ni", np.abs(rotation), m.geom_aabb[self.boxed, 3:])
        self.low, self.high = centre - half, centre + half  # (n, 3), world axes

    def matrix(self, name):
        return self.episode.data.xmat[self.sim.objects[name]].reshape(3, 3)

    def yaw(self, name):
        return yaw_of(self.matrix(name))

    def extent(self, name):
        return object_extent(self.sim, self.episode.data, name)

    def own_extent(self, name):
        """Bounding box of an object in its own axes: (low (3,), high (3,))."""
        m, d, body = self.sim.model, self.episode.data, self.sim.objects[name]
        mine, back = self.boxed[self.owner == name], self.matrix(name).T
        rotation = back @ d.geom_xmat[mine].reshape(-1, 3, 3)
        centre = (d.geom_xpos[mine] - d.xpos[body]) @ back.T + np.einsum(
            "nij,nj->ni", rotation, m.geom_aabb[mine, :3]
        )
        half = np.einsum("nij,nj->ni", np.abs(rotation), m.geom_aabb[mine, 3:])
        return (centre - half).min(0), (centre + half).max(0)

    def yaw_body(self, body):
        return yaw_of(self.episode.data.xmat[body].reshape(3, 3))

    def site(self, name):
        """Position (3,) and rotation (3, 3) of one of the task's named places."""
        data, site = self.episode.data, self.sim.model.site(name).id
        return data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()

    def holds(self, predicate):
        self.episode._activate()
        return bool(self.sim.env.env._eval_predicate(predicate))

    def hand_yaw(self):
        return yaw_of(self.eef_mat @ self.rest_mat.T)

    def overlap(self, point, rotation, ignore=(), shape=(PALM, FINGERS, WRIST)):
        """How deep, in metres summed over boxes, a hand at `point` with `rotation` (3, 3) would stand in the scene's geometry."""
        keep = ~np.isin(self.owner, (*ignore, ""))  # nor in the table: grasps know their own depth
        centre, half = 0.5 * (self.low + self.high)[keep], 0.5 * (self.high - self.low)[keep]
        axes = rotation * [1.0, 1.0, -1.0]  # columns: along the opening, across, back from the tips
        depth = 0.0
        for low, high in shape:
            middle, reach = point + axes @ (0.5 * (low + high)), 0.5 * (high - low)
            apart = np.abs(centre - middle)
            world = half + np.abs(axes) @ reach - apart
            own = half @ np.abs(axes) + reach - np.abs((centre - middle) @ axes)
            hit = np.minimum(world.min(1), own.min(1)) > 0.001
            # How far aside the hand would have to be; a thin plate is in the way as much as a block.
            aside = np.minimum(world[:, :2].min(1), own[:, :2].min(1))
            depth += np.where(hit, np.maximum(aside, 0.01), 0.0).sum()
        return depth

    def way_out(self, margin, ignore=()):
        """Horizontal step (2,) from under what hangs over the hand and what it holds (half width `margin` (2,)); zeros where free."""
        keep = ~np.isin(self.owner, ignore)
        low, high = self.low[keep], self.high[keep]
        over = (low[:, 2] > self.eef[2]) & (low[:, 2] < self.eef[2] + 0.25)
        # how far in, from either side
        right, left = self.eef[:2] + margin - low[:, :2], high[:, :2] - self.eef[:2] + margin
        over &= ((right > 0) & (left > 0)).all(1)
        step = np.zeros(2)
        for below, above in zip(right[over], left[over], strict=True):
            options = [(below[0], 0, -1.0), (above[0], 0, 1.0), (below[1], 1, -1.0), (above[1], 1, 1.0)]
            far, axis, sign = min(options)
            if far > abs(step[axis]):
                step[axis] = sign * far
        return step

    def safe_height(self, goal, hang, radius, ignore=()):
        """Least height of the hand for its way to `goal` (3,): over what stands in it, rising on a slant as that comes near.

        hang: how far below the grip site something hangs; radius: its half width. What stands around the goal itself is to be passed
        at the goal's height.
        """
        goal, arrival = goal[:2], goal[2]
        keep = ~np.isin(self.owner, ignore)
        low, high = self.low[keep], self.high[keep]
        way = goal - self.eef[:2]
        length = np.linalg.norm(way)
        needed = -np.inf
        wide = np.abs(self.eef_mat[:2, 0])  # the hand's long axis
        # The tips and what they hold, then the palm: 10 cm to either side, 2.4 cm higher.
        for size, below in (
            (radius + 0.02 + 0.03 * wide, hang + 0.02),
            (0.04 + 0.075 * wide, -0.024 + 0.015),
        ):
            near, far = low[:, :2] - size, high[:, :2] + size
            # Entry and exit of the straight way into each widened rectangle (the slab method), as shares of the way.
            with np.errstate(divide="ignore", invalid="ignore"):
                a, b = (near - self.eef[:2]) / way, (far - self.eef[:2]) / way
            a, b = np.nan_to_num(a, nan=-np.inf), np.nan_to_num(b, nan=np.inf)
            enter, leave = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
            there = ((goal > near) & (goal < far)).all(1)
            hit = (enter < leave) & (leave > 0) & (enter < 1)
            if hit.any():
                distance = np.clip(enter[hit], 0, 1) * length
                top = high[hit, 2] + below
                top = np.where(there[hit], np.minimum(top, arrival), top)
                needed = max(needed, (top - np.clip(distance - 0.04, 0, None)).max())
        return needed


def angle_between(a, b):
    return np.linalg.norm(rotation_vector(a @ b.T))


def command(scene, way, rotation=None, gripper=1.0, gain=GAIN, limit=1.0):
    """The command (7,) for the `way` (3,) that the grip site still has to go, and the `rotation` (3, 3) that the hand is to have."""
    out = np.zeros(7)
    out[:3] = np.clip(gain * way / METRES_PER_DECISION, -limit, limit)
    if rotation is not None:
        error = rotation_vector(rotation @ scene.eef_mat.T)
        out[3:6] = np.clip(0.5 * error / RADIANS_PER_DECISION, -0.5, 0.5)
    out[6] = gripper
    return out


def travel(scene, way, rotation, gripper, ignore=()):
    """`command` for a long way: over what stands between, first up and then across where that is near."""
    if scene.free or np.linalg.norm(way[:2]) < 0.03:
        return command(scene, way, rotation, gripper)
    rise = scene.safe_height(scene.eef + way, 0.0, 0.0, ignore) - scene.eef[2]
    out = command(scene, np.array([*way[:2], max(way[2], rise)]), rotation, gripper)
    out[:2] *= np.clip(1.0 - rise / 0.04, 0.0, 1.0)
    return out
