r"""Pseudo labels for the reward model (paper, section 3.4): which steps of a trajectory lead to a keyframe.

No human labels anything, because manipulation has a rhythm that the robot itself measures:

    gripper   open ________________                  ____________
                                   \________________/                milestones: the gripper's opening changes
    speed     /\    /\              /\       /\
             /  \__/  \____________/  \_____/  \____                  keyframes: the hand comes to rest inside a segment
    label     - + +  - + +         -  + +   - + +                    positive: the steps that lead to a keyframe

Milestones divide a trajectory into segments, keyframes are the stops inside each, and the actions of the last moments before a
keyframe are positive. numpy only, no model. `python rprm.py label --plot` draws what this file found.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from support.cli import flag

CONTROL_HZ = 20.0  # LIBERO's control steps per second
STROKE = 0.08  # metres between the fingers of the open Panda gripper
COMMAND_SPEED = 0.25  # m/s of the hand under a full translation command

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass
class LabelRule:
    """Settings of the label rule. Times are in seconds, so that files at 20 Hz (official) and at 5 Hz (one row = 4 control
    steps) get the same labels."""

    gripper_change: float = flag(
        0.01, "smallest swing of the gripper that ends a segment, m; less is noise", min=1e-4
    )
    gripper_still: float = flag(
        0.03, "fingers slower than this have stopped, m/s: there a segment starts", min=1e-4
    )
    slip: float = flag(0.6, "a gripper change that is taken back within so many seconds is none", min=0.0)
    near_zero: float = flag(0.2, "near-zero speed, as a fraction of the 90th percentile", min=0.0, max=1.0)
    window: float = flag(0.6, "seconds before a keyframe that are positive, its own row included", min=0.0)
    margin: float = flag(0.2, "seconds after a keyframe without label: they look like it", min=0.0)
    smooth: float = flag(0.15, "seconds of moving average over the speed", min=0.0)


@dataclass
class Labels:
    """Result of the label rule for one trajectory of T rows. Arrays are empty when the trajectory cannot be used."""

    labels: np.ndarray  # (T,) int8: POSITIVE, NEGATIVE or IGNORED
    keyframes: list  # row indices
    milestones: list  # rows at which a new segment starts (0 not included)
    speed: np.ndarray  # (T,) m/s, smoothed; speed[t] is what the action of row t produced
    openness: np.ndarray  # (T,) metres between the fingers
    near: float  # the speed below which the hand counts as at rest, m/s
    rate: float  # rows per second
    problems: list  # names from PROBLEMS; empty for an ordinary trajectory
    usable: bool  # may be trained on


PROBLEMS = {
    "too_short": "fewer than two rows: no speed (not used)",
    "lengths_differ": "not one position for each action (not used)",
    "not_finite": "NaN or infinity in position or actions (not used)",
    "no_keyframe": "the hand never comes to rest: nothing positive (not used)",
    "no_gripper_change": "one segment (used)",
    "gripper_from_command": "no finite gripper measurement, the command stands in (used)",
}


def gripper_openness(actions, gripper_states=None):
    """(openness (T,) in metres, measured: bool): from `obs/gripper_states` (T, 2), else from the command actions[:, 6].

    Files of LIBERO write the command as -1 open, +1 close; it is scaled to the gripper's stroke so that one threshold
    in metres serves both. The measurement is better: it sees the fingers stop on an object, and does not chatter.
    """
    if gripper_states is not None:
        states = np.asarray(gripper_states, np.float64)
        if states.shape == (len(actions), 2) and np.isfinite(states).all():
            return states[:, 0] - states[:, 1], True
    return (1.0 - np.asarray(actions, np.float64)[:, 6]) / 2.0 * STROKE, False


def find_milestones(openness, change, still, hold):
    """Rows at which the gripper has finished to close or to open.

    openness (T,), change and still (per row) in metres, hold in rows -> row indices, increasing.

    Hysteresis on the turning point. While closing we follow the smallest opening seen, while opening the largest; the
    direction turns once the opening has moved by `change` away from that extreme. Noise smaller than `change` can never
    turn it, wherever in the stroke it happens, whereas a bare threshold fires on every crossing (and a fixed pair of
    thresholds would take a wide object, at which the fingers stop half open, for an open gripper).
    The milestone is the row at which the fingers have then stopped (they move less than `still` in the next row), so
    that the closing belongs to the segment that it completes, and its actions lead to that segment's end.
    Not significant: an opening before the first closing, which is the hand getting ready after reset (we start as
    "opening"), and a turn that is taken back within `hold` rows, which is a slip.
    """
    milestones, opening, arrived, extreme, turned = (
        [],
        True,
        True,
        openness[0],
        False,
    )  # arrived: where they last stopped
    motion = np.append(np.abs(np.diff(openness)), 0.0)
    for t, value in enumerate(openness):
        extreme = max(extreme, value) if opening else min(extreme, value)
        if abs(value - extreme) >= change:
            opening, extreme, turned = not opening, value, True
        if turned and motion[t] < still:
            turned = False
            if opening == arrived:  # they went back before they had stopped: nothing changed
                continue
            arrived = opening
            if milestones and t - milestones[-1] < hold:
                milestones.pop()
            else:
                milestones.append(t)
    return milestones


def find_keyframes(speed, milestones, near):
    """Rows at which the hand comes to rest, inside each segment: local minima of the speed below `near`.

    Rest, too, has hysteresis: once below `near`, the hand is at rest until it exceeds 2 x `near`. One stop gives one
    keyframe, its arrival (the first minimum), and not one per wiggle, or hovering would be all keyframes. The stop at
    which a segment ends gives a second, the last minimum: there the gripper acts, or the task is done. The stop that an
    episode or a segment starts with gives none: no action led to it.
    """
    keyframes = []
    bounds = [0, *milestones, len(speed)]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        resting = True
        arrival = last = None  # of the current stop
        for t in range(start, end):
            minimum = speed[t] < near and (t + 1 == end or speed[t] <= speed[t + 1])
            if speed[t] > 2 * near:
                resting, arrival, last = False, None, None
            elif minimum and not resting:
                keyframes.append(t)
                resting, arrival = True, t
            elif minimum and arrival is not None:
                last = t
        if last is not None:
            keyframes.append(last)
    return keyframes


def label_trajectory(
    actions, ee_pos, gripper_states=None, action_repeat=1, rule=LabelRule(), *, success=True, disturbed=False
):
    """Pseudo labels of section 3.4 for one trajectory.

    actions (T, 7) in the file convention, ee_pos (T, 3) in metres, gripper_states (T, 2) or None; one row is
    `action_repeat` control steps. Never raises for what a file may contain: `problems` tells what was wrong.

    disturbed: the actions are clean labels, but something else was executed (the recoveries in the demonstrations of
    demos.py). The hand, pushed about, then never comes to rest, and the speed that the actions ask for takes the place
    of the measured one.

    A failed trajectory (success=False) has no positives. What the rule calls negative stays negative; a window before a
    keyframe is a hard negative only in the last segment, the one whose milestone was never reached. Windows of earlier
    segments may have been real progress (the object was grasped, then dropped), so they carry no label.
    """
    actions, ee_pos = np.asarray(actions, np.float64), np.asarray(ee_pos, np.float64)
    rate, T = CONTROL_HZ / action_repeat, len(actions)
    empty = np.zeros(0)

    def unusable(problem):
        return Labels(np.full(T, IGNORED, np.int8), [], [], empty, empty, 0.0, rate, [problem], False)

    if T < 2:
        return unusable("too_short")
    if ee_pos.shape != (T, 3):
        return unusable("lengths_differ")
    if not (np.isfinite(actions).all() and np.isfinite(ee_pos).all()):
        return unusable("not_finite")

    if disturbed:
        speed = np.linalg.norm(actions[:, :3], axis=1) * COMMAND_SPEED  # (T,) m/s
    else:
        steps = np.linalg.norm(np.diff(ee_pos, axis=0), axis=1) * rate  # (T - 1,) m/s
        speed = np.append(steps, steps[-1])  # the last row's action has no successor in the file
    width = max(1, round(rule.smooth * rate)) // 2 * 2 + 1  # odd, to be centred: 3 rows at 20 Hz, 1 at 5 Hz
    padded = np.pad(speed, width // 2, mode="edge")
    speed = np.convolve(padded, np.full(width, 1 / width), mode="valid")  # (T,)
    near = rule.near_zero * float(np.percentile(speed, 90))

    openness, measured = gripper_openness(actions, gripper_states)
    milestones = find_milestones(openness, rule.gripper_change, rule.gripper_still / rate, rule.slip * rate)
    keyframes = find_keyframes(speed, milestones, near)
    problems = [] if measured else ["gripper_from_command"]
    problems += [] if milestones else ["no_gripper_change"]
    problems += [] if keyframes or not success else ["no_keyframe"]

    window, margin = max(1, round(rule.window * rate)), round(rule.margin * rate)
    labels = np.full(T, NEGATIVE, np.int8)
    for k in keyframes:
        labels[k + 1 : k + 1 + margin] = IGNORED
    for k in keyframes:  # after all margins: leading to the next keyframe outweighs having just left one
        labels[max(0, k + 1 - window) : k + 1] = POSITIVE
    if not success:
        last = milestones[-1] if milestones else 0
        labels[:last][labels[:last] == POSITIVE] = IGNORED
        labels[last:][labels[last:] == POSITIVE] = NEGATIVE
    return Labels(
        labels, keyframes, milestones, speed, openness, near, rate, problems, "no_keyframe" not in problems
    )


class LabelSummary:
    """Counts what the label rule met, so that nothing is dropped in silence. `add` each result; `str()` is one line."""

    def __init__(self):
        self.trajectories, self.used, self.rows, self.problems = 0, 0, Counter(), Counter()

    def add(self, result):
        self.trajectories += 1
        self.used += result.usable
        self.problems.update(result.problems)
        self.rows.update(result.labels.tolist() if result.usable else [])

    def __str__(self):
        found = [
            f"{name} {self.problems[name]} ({text})" for name, text in PROBLEMS.items() if self.problems[name]
        ]
        return (
            f"{self.used} of {self.trajectories} trajectories used; rows: {self.rows[POSITIVE]} positive, "
            f"{self.rows[NEGATIVE]} negative, {self.rows[IGNORED]} without label; "
            + ("; ".join(found) or "no problems")
        )
