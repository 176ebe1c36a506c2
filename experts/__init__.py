"""Scripted experts on privileged poses: they read object poses that only the simulator knows and steer the gripper.

Three properties make them learnable by a small policy that sees one frame and has no memory:

1. Reactive. The command is a function of the current state alone: no timers, no hidden phase. A frame decides the action.
2. Phases look different. The gripper comes down a funnel (its height target falls with the horizontal distance) and leaves on
   a slant towards the goal, so that no picture belongs both to "closing in" and to "carrying away".
3. Recoveries. Noise disturbs what is *executed*; the stored label stays the clean command for the state that was reached
   (DART, arXiv 1703.09327).
"""

import numpy as np

METRES_PER_DECISION = (
    0.05  # displacement of a full command held for 4 control steps, measured in steady state
)
GAIN = np.array([0.5, 0.6, 0.8])  # share of the remaining way per decision, x y z


def object_extent(sim, data, name):
    """World-axis bounding box of an object's collision geometry: (low (3,), high (3,)) in metres."""
    m, body = sim.model, sim.objects[name]
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    corners = []
    for g in range(m.ngeom):
        b = m.geom_bodyid[g]
        while b and b != body:
            b = m.body_parentid[b]
        if b == body and m.geom_contype[g]:
            centre, half = m.geom_aabb[g][:3], m.geom_aabb[g][3:]
            corners.append(data.geom_xpos[g] + (centre + signs * half) @ data.geom_xmat[g].reshape(3, 3).T)
    corners = np.concatenate(corners)
    return corners.min(0), corners.max(0)


class PickAndPlaceExpert:
    """Grasp one object from above, carry it over a goal, let go. `action(episode)` depends on the current state alone.

    The grasp is read off the scene once per episode: the object's bounding box, its width between the fingers, the goal's
    height. The fingers open along world y in the arm's rest orientation, so that no rotation is ever commanded.
    """

    def __init__(self, episode, suite):
        sim = episode.sim
        self.target, self.goal = sim.env.obj_of_interest[:2]
        low, high = object_extent(sim, episode.data, self.target)
        goal_low, goal_high = object_extent(sim, episode.data, self.goal)
        self.rest = episode.privileged()["objects"][self.target][0]
        self.offset = 0.5 * (low + high) - self.rest  # from the body's origin to the middle of its box
        if suite.startswith("libero_spatial"):
            # A bowl is wider than the gripper: take it by the rim, on the side of +y. In a drawer the outer finger has no room
            # beyond its front: both go inside it, and the outer one pulls the rim in.
            inward = 0.034 if "drawer" in sim.instruction else 0.008
            self.offset = np.array([0.0, 0.5 * (high[1] - low[1]) - inward, high[2] - 0.02 - self.rest[2]])
            self.width = 0.014  # what the closed fingers leave of it at the thickest
            self.carry_height = max(goal_high[2] + 0.1, self.rest[2] + 0.12)
            self.release_height = goal_high[2] + 0.05
        else:
            # As deep as the palm allows (the pads end 3.3 cm below it), and no lower than the fingers clear the floor.
            self.offset[2] = max(low[2] + 0.012, high[2] - 0.027) - self.rest[2]
            self.width = high[1] - low[1]
            # The hand is 20 cm wide, and its palm comes down to 4 cm above the grasp point: lean away from a neighbour that
            # is taller than that, as far as the opening (8 cm) leaves room.
            room = max(0.0, 0.5 * (0.08 - self.width) - 0.005)
            for name in sim.env.env.objects_dict:
                if name in (self.target, self.goal):
                    continue
                near_low, near_high = object_extent(sim, episode.data, name)
                gap = 0.5 * (near_low + near_high) - 0.5 * (low + high)
                if (
                    near_high[2] > self.rest[2] + self.offset[2] + 0.04
                    and abs(gap[0]) < 0.08
                    and abs(gap[1]) < 0.15
                ):
                    self.offset[1] -= np.sign(gap[1]) * room
            self.carry_height = goal_high[2] + (self.rest[2] + self.offset[2] - low[2]) + 0.02
            self.release_height = self.carry_height
        self.clearance = (
            high[2] - (self.rest[2] + self.offset[2]) + 0.045
        )  # above the grasp point, free of the object

    def action(self, episode):
        """The clean command (7,) in policy convention (gripper 1 = open, 0 = close) for the episode's current state."""
        p = episode.privileged()
        eef, gap = p["eef_pos"], p["gripper_qpos"][0] - p["gripper_qpos"][1]
        obj, goal = p["objects"][self.target][0], p["objects"][self.goal][0]
        error = obj + self.offset - eef
        horizontal = np.linalg.norm(error[:2])
        started = (
            gap < 0.072
        )  # the fingers have begun to close: stay with it unless the object is clearly elsewhere
        between = horizontal < (0.03 if started else 0.014) and abs(error[2]) < (0.035 if started else 0.012)
        gripping = between and gap < self.width + 0.005
        moved = np.linalg.norm(obj - self.rest)  # a bowl from the cabinet's top ends lower than it began
        to_goal = goal[:2] - obj[:2]
        distance = np.linalg.norm(to_goal)

        command = np.zeros(7)
        if between and moved > 0.02 and distance < 0.03 and (eef[2] < self.release_height + 0.03):
            command[6] = 1.0  # over the goal: let go
        elif gripping:
            # Carry on a slant: rise and travel together, but stay a wall's width short of the goal until high enough.
            lifted = np.clip(
                (eef[2] - (self.rest + self.offset)[2]) / (self.carry_height - (self.rest + self.offset)[2]),
                0,
                1,
            )
            stop = 0.16 if lifted < 0.75 and distance > 0.1 else 0.0
            step = np.clip(distance - stop, 0.0, METRES_PER_DECISION / 0.8)
            command[:2] = 0.8 * to_goal / (distance + 1e-9) * step / METRES_PER_DECISION
            height = self.release_height + np.clip((distance - 0.03) / 0.04, 0, 1) * (
                self.carry_height - self.release_height
            )
            command[2] = np.clip(0.8 * (height - eef[2]) / METRES_PER_DECISION, -1.0, 1.0)
            if moved < 0.008:
                command[:3] *= 0.5  # the first centimetre slowly, while the fingers still tighten
        elif between:
            command[:3] = np.clip(0.3 * error / METRES_PER_DECISION, -0.2, 0.2)  # close, holding still
        else:
            # Down a funnel: full clearance outside 4 cm, the grasp height within 1 cm, higher still when far away.
            funnel = self.clearance * np.clip((horizontal - 0.01) / 0.03, 0.0, 1.0) + 0.3 * max(
                0.0, horizontal - 0.08
            )
            # The arm coasts 1 to 3 cm after a full command, so the horizontal gain is low enough to brake in time.
            command[:3] = np.clip(GAIN * (error + [0.0, 0.0, funnel]) / METRES_PER_DECISION, -1.0, 1.0)
            command[6] = 1.0
        return command


def disturb(command, rng, noise, kick):
    """What is executed instead of the clean command: Gaussian noise, now and then a push, rarely a gripper slip."""
    executed = command.copy()
    executed[:3] += rng.normal(0.0, noise, 3)
    if rng.random() < kick:
        executed[:3] = rng.uniform(-1.0, 1.0, 3)
    if rng.random() < 0.25 * kick:
        executed[6] = 1.0 - executed[6]
    return np.clip(executed, -1.0, 1.0)
