"""What the label rule of reward_model.py is set by, gives and meets. Without torch, so that the scripts that take the rule's
settings as flags answer `--help` at once."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from support.cli import flag

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
    """Result of the label rule for one trajectory of T rows. Without a speed (a problem says why) `labels` is
    all IGNORED, speed and openness are empty."""

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
    "no_motion": "a success in which the hand stands still (not used)",
    "no_gripper_change": "one segment (used)",
    "gripper_from_command": "no finite gripper measurement, the command stands in (used)",
}


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
