r"""RPRM, the robotic process reward model (paper, section 3.4): a dense reward learned without human labels.

The idea. LIBERO pays 1 at the end of an episode and 0 before, which is little to learn from. A vision-language model
that has seen successful trajectories can say earlier whether a step makes progress. The labels it learns from cost
nothing, because manipulation has a rhythm that the robot itself measures:

    gripper   open ________________                  ____________
                                   \________________/                milestones: the gripper's opening changes
    speed     /\    /\              /\       /\
             /  \__/  \____________/  \_____/  \____                  keyframes: the hand comes to rest inside a segment
    label     - + +  - + +         -  + +   - + +                    positive: the steps that lead to a keyframe

The model is OpenVLA itself, started from the imitation policy and fine-tuned by next-token prediction (Eq. 3):

    maximise log p("1" or "0" | image, instruction, 7 action tokens)

During RL it is frozen; its score p("1") / (p("1") + p("0")), brought back from the balanced labels of training to the rate
at which positives occur (`score_of`), enters the reward through `shaping_reward`.

    python reward_model.py label --demos data/libero_object --plot out/labels    look at the labels first
    python reward_model.py train --demos ... --policy <sft> --out <rprm>         the model, with held-out metrics
    python reward_model.py score --demos ... --rprm <rprm> --plot out/scores     scores of recorded trajectories
    python reward_model.py evaluate --suite ... --rprm <rprm> --policy <sft>     is it safe to optimise? (simulator)
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from support.cli import parse_command
from support.errors import main_guard, UserError
from support.files import atomic_write, read_json, safe_name
from support.quiet import progress_bar
from demos import demo_files, demo_path, read_demos, write_demos
from policy import ACTION_DIM, OpenVLA, explain_out_of_memory, policy_convention

CONTROL_HZ = 20.0  # LIBERO's control steps per second
STROKE = 0.08  # metres between the fingers of the open Panda gripper
COMMAND_SPEED = 0.25  # m/s of the hand under a full translation command

# --------------------------------------------------------------------------------------------------------------------
# Pseudo labels: numpy only, no model
# --------------------------------------------------------------------------------------------------------------------

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class LabelRule:
    """Parameters of the label rule.

    Times are in seconds, so that files at 20 Hz (official) and at 5 Hz (one row = 4 control steps) get the same labels.
    """

    gripper_change: float = 0.01  # metres; a swing of the opening smaller than this is noise or a slipping object
    gripper_still: float = 0.03  # m/s; fingers slower than this have arrived, and the new segment starts there
    slip: float = 0.6  # seconds; a change of the gripper that is taken back sooner is none
    near_zero: float = 0.2  # "near zero" speed, as a fraction of the trajectory's 90th-percentile speed
    window: float = 0.6  # seconds before a keyframe (its own row included) whose actions are positive
    margin: float = 0.2  # seconds after a keyframe that carry no label: image and action look like the keyframe's own
    smooth: float = 0.15  # seconds of moving average over the speed


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
    milestones, opening, arrived, extreme, turned = [], True, True, openness[0], False  # arrived: where they last stopped
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
    `action_repeat` control steps. Never raises for what a file may contain: `problems` says what was wrong.

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
    return Labels(labels, keyframes, milestones, speed, openness, near, rate, problems, "no_keyframe" not in problems)


class LabelSummary:
    """Counts what the label rule met, so that nothing is dropped in silence. `add` each result; `str()` is one line."""

    def __init__(self):
        self.trajectories = self.used = 0
        self.rows = {POSITIVE: 0, NEGATIVE: 0, IGNORED: 0}
        self.problems = dict.fromkeys(PROBLEMS, 0)

    def add(self, result):
        self.trajectories += 1
        self.used += result.usable
        for problem in result.problems:
            self.problems[problem] += 1
        if result.usable:
            for value in self.rows:
                self.rows[value] += int((result.labels == value).sum())

    def __str__(self):
        found = [f"{name} {count} ({PROBLEMS[name]})" for name, count in self.problems.items() if count]
        return (
            f"{self.used} of {self.trajectories} trajectories used; rows: {self.rows[POSITIVE]} positive, "
            f"{self.rows[NEGATIVE]} negative, {self.rows[IGNORED]} without label; "
            + ("; ".join(found) if found else "no problems")
        )


# --------------------------------------------------------------------------------------------------------------------
# One picture per trajectory
# --------------------------------------------------------------------------------------------------------------------


def plot_trajectory(path, frames, result, title, scores=None):
    """Draw what the label rule saw, so that a person can judge it: thumbnails, speed, gripper, labels (and scores).

    path: PNG to write. frames (T, H, W, 3) uint8 upright. result: Labels. scores (T,) in [0, 1] or None.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    T, seconds = len(frames), np.arange(len(frames)) / result.rate
    rows = 4 if scores is not None else 3
    figure = Figure(figsize=(12, 2.2 * rows + 1.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 2.2 * rows - 1.0])
    top.suptitle(f"{title}\n{', '.join(result.problems) or 'no problems'}", fontsize=10)

    # Frames at the keyframes first, the rest of the strip filled evenly.
    room = 9
    shown = list(result.keyframes[:room])
    for t in np.linspace(0, T - 1, room).round().astype(int).tolist():
        if len(shown) < room and t not in shown:
            shown.append(t)
    for axis, t in zip(np.atleast_1d(top.subplots(1, len(shown))), sorted(shown), strict=True):
        axis.imshow(frames[t])
        key = t in result.keyframes
        axis.set_title(f"{seconds[t]:.1f} s" + (" key" if key else ""), fontsize=8, color="tab:red" if key else "black")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color="tab:red" if key else "black", linewidth=2.5 if key else 0.8)

    axes = bottom.subplots(rows, 1, sharex=True, height_ratios=[2, 2, 2, 0.7] if scores is not None else [2, 2, 0.7])
    speed_axis, gripper_axis, label_axis = axes[0], axes[1], axes[-1]
    if len(result.speed):
        edges = [0, *result.milestones, T]
        for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            left, right = (np.array([start, end]) - 0.5) / result.rate
            for axis in axes[:-1]:
                axis.axvspan(left, right, color=("tab:blue", "tab:orange")[number % 2], alpha=0.10, linewidth=0)
            gripper_axis.text(left, 84, f" {number + 1}", fontsize=8, va="bottom")
        for k in result.keyframes:
            for axis in axes[:-1]:
                axis.axvline(seconds[k], color="tab:red", linewidth=0.8, alpha=0.6)
        speed_axis.plot(seconds, 100 * result.speed, ".-", color="black", linewidth=1.2, markersize=4)
        speed_axis.axhline(100 * result.near, color="tab:red", linestyle="--", linewidth=1, label="near zero")
        key = result.keyframes
        speed_axis.plot(seconds[key], 100 * result.speed[key], "v", color="tab:red", label="keyframe")
        speed_axis.legend(loc="upper right", fontsize=8)
        gripper_axis.plot(seconds, 1000 * result.openness, ".-", color="black", linewidth=1.2, markersize=4)
    speed_axis.set_ylabel("hand speed\ncm/s")
    gripper_axis.set(ylabel="gripper, mm\nand segments", ylim=(-5, 98))
    if scores is not None:
        axes[2].plot(seconds, scores, ".-", color="tab:purple", linewidth=1.2, markersize=4)
        axes[2].set(ylabel="RPRM\nscore", ylim=(-0.05, 1.05))
    colours = {POSITIVE: ("tab:green", "positive"), NEGATIVE: ("tab:gray", "negative"), IGNORED: ("white", "no label")}
    for value, (colour, name) in colours.items():
        spans = [((t - 0.5) / result.rate, 1 / result.rate) for t in np.flatnonzero(result.labels == value)]
        caption = f"{name} ({len(spans)})"
        label_axis.broken_barh(spans, (0, 1), color=colour, edgecolor="black", linewidth=0.2, label=caption)
    limits = (-0.5 / result.rate, (T - 0.5) / result.rate)
    label_axis.set(yticks=[], ylabel="label", xlabel="time, s", ylim=(0, 1), xlim=limits)
    label_axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9), ncols=3, fontsize=8, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())


# --------------------------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------------------------


def auroc(scores, labels):
    """Probability that a positive scores higher than a negative, ties counted half; NaN when a class is missing."""
    from scipy.stats import rankdata

    labels = np.asarray(labels, bool)
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if not n1 or not n0:
        return math.nan
    return float((rankdata(scores)[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def auroc_interval(value, positives, negatives):
    """95 % interval [low, high] of an AUROC from so many positives and negatives (Hanley and McNeil, 1982); NaN for NaN."""
    if math.isnan(value):
        return [math.nan, math.nan]
    one, two = value / (2 - value), 2 * value**2 / (1 + value)  # P(two positives above one negative), P(one above two)
    variance = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    half = 1.96 * math.sqrt(variance / (positives * negatives))
    return [max(0.0, value - half), min(1.0, value + half)]


def average_precision(scores, labels):
    """Sum over thresholds of precision x gain in recall (no interpolation; equal scores share one threshold)."""
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if not labels.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last row of each group of equal scores
    gains = np.diff(hits[last], prepend=0)
    return float((gains * hits[last] / (last + 1)).sum() / labels.sum())


def calibration(scores, labels, bins=10):
    """{"ece", "brier"} of scores (n,) in [0, 1] read as probabilities of labels (n,); NaN where a class is missing.

    ECE: mean over equal-width bins of |share of positives - mean score|. Brier: mean squared error of the score.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    n1 = labels.sum()
    if n1 == 0 or n1 == len(labels):
        return {"ece": math.nan, "brier": math.nan}
    which = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(which, (labels - scores) / len(labels), bins)
    return {"ece": float(np.abs(gaps).sum()), "brier": float(((scores - labels) ** 2).mean())}


def spearman(x, y):
    """Rank correlation; NaN where one side is constant (nothing to rank)."""
    from scipy.stats import spearmanr

    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(spearmanr(x, y).statistic)


# --------------------------------------------------------------------------------------------------------------------
# The model: OpenVLA with a verdict after the action
# --------------------------------------------------------------------------------------------------------------------

MODES = ("none", "sum", "potential")


def shaping_reward(scores, next_scores, mode, weight, gamma, terminated):
    """Reward to add to the sparse one. All arguments broadcast; arrays may be numpy or torch; shape and dtype are kept.

    scores, next_scores: RPRM in [0, 1] at step t and t + 1 (of a cut episode: of its final observation).
      none       0
      sum        weight * score, the paper's rule ("sparse reward + RPRM prediction"). Easy to learn from, but it pays
                 by the step: hovering where the score is high can earn more than finishing (`evaluate` measures it).
      potential  weight * (gamma * phi(s') * (not terminated) - phi(s)). Over an episode it telescopes to
                 -weight * phi(s_0), whatever the agent does: the optimal policy is that of the sparse reward.
    The condition of that theorem (Ng, Harada and Russell, 1999): phi depends on the state alone, is 0 after
    termination, and `gamma` is the one of GAE. A score that also sees the action it judges breaks it: every action's
    advantage then loses phi(s, a), which punishes just the actions that RPRM likes. So `potential` wants the state-only
    score, `RewardModel.score(..., action_tokens=None)`.
    A time-limit cut is not a termination: phi(s') stays, as the bootstrap value does.
    """
    if mode == "none":
        return 0.0 * scores
    if mode == "sum":
        return weight * scores
    if mode == "potential":
        return weight * (gamma * next_scores * (1.0 - 1.0 * terminated) - scores)
    raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")


class RewardModel:
    """An RPRM, frozen except in `fit`. `model` is an OpenVLA, `info` the content of rprm.json (label rule, training, metrics)."""

    CHUNK = 256  # rows judged at a time

    def __init__(self, model, info):
        self.model, self.info = model.eval().requires_grad_(False), info
        self.token_ids = verdict_token_ids(model)
        self.prior = prior_of(info)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        info = Path(directory) / "rprm.json"
        if not info.is_file():
            raise UserError(f"{directory} holds no rprm.json, so it is no reward model: give the --out of `train`")
        if "vlm" in read_json(info):
            raise UserError(f"{directory} is a tuned VLM; this needs an RPRM that was made from the policy (`train` without --vlm)")
        return cls(OpenVLA.from_pretrained(directory, dtype=dtype, device=device), read_json(info))

    @torch.no_grad()
    def score(self, input_ids, attention_mask, action_tokens=None, *, pixel_values=None, patch_embeddings=None):
        """`score_of` the verdict, (B,) float32 in [0, 1]: is this action (with None: this state) one of progress?

        input_ids, attention_mask (B, L) from `model.tokenize`; action_tokens (B, 7) int64 or None; one of pixel_values
        (B, 6, S, S) and patch_embeddings (B, P, d). Rows do not influence each other.
        """
        logits = verdict_logits(
            self.model, input_ids, attention_mask, action_tokens, self.token_ids, pixel_values, patch_embeddings
        )
        return score_of(logits, self.prior)

    def score_frames(self, frames, instruction, actions, unnorm_key=None, chunk=64):
        """Scores (T,) float64 of a recording: frames (T, H, W, 3) uint8 upright, actions (T, 7) in file convention."""
        tokens, scores = action_tokens_of(self.model, actions, unnorm_key).to(self.model.device), []
        for i in range(0, len(frames), chunk):
            part = frames[i : i + chunk]
            embeddings = embed_frames(self.model, part)
            ids, mask = self.model.tokenize([instruction] * len(part))
            score = self.score(ids, mask, tokens[i : i + chunk], patch_embeddings=embeddings)
            scores.append(score.double().cpu().numpy())
        return np.concatenate(scores)

    # What training wants of a judge; `vlm.VLM` has the same methods.

    def images_of(self, frames):
        """Frames (n, H, W, 3) uint8 upright -> what `Examples` keeps of them."""
        return embed_frames(self.model, frames).to("cpu", torch.float16)  # 25 kB each at the tiny size

    def actions_of(self, actions, unnorm_key):
        """Actions (n, 7) in file convention -> what `Examples` keeps of them, (n, 7) int64."""
        return action_tokens_of(self.model, actions, unnorm_key)

    def values_of(self, actions, unnorm_key):
        """Inverse of `actions_of` up to rounding, in the policy's convention: (n, 7) float64."""
        return self.model.decode_actions(actions, unnorm_key)

    def trainable(self):
        """The parameters that `fit` changes. The vision side stays the policy's; see `shares_vision`."""
        return list(self.model.language_model.parameters())

    def verdicts(self, batch, hidden, whole_vocabulary=False):
        """Logits of the tokens "1" and "0" (B, 2), or of all tokens (B, V), for the Examples `batch`; with gradient.
        hidden (B,) bool: rows whose action is not shown."""
        model = self.model
        input_ids, attention_mask = model.tokenize(batch.instructions)
        tokens = torch.where(hidden[:, None], self.token_ids[1], batch.actions)
        vocabulary = list(range(model.text["vocab_size"])) if whole_vocabulary else self.token_ids
        embeddings = batch.images.to(model.device, model.dtype)
        return verdict_logits(model, input_ids, attention_mask, tokens.to(model.device), vocabulary, patch_embeddings=embeddings)

    def save(self, directory, info):
        self.model.side_files["rprm.json"] = json.dumps({**info, "prior": self.prior}, indent=1).encode()
        self.model.save_pretrained(directory)

    def shares_vision(self, policy):
        """True when `policy` computes the same patch embeddings, so that one vision pass can serve both in a rollout.

        `train` leaves the vision side of the SFT policy as it was, for this reason.
        """
        mine, theirs = vision_state(self.model), vision_state(policy)
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine)


def vision_state(model):
    """The tensors that patch embeddings are made of: both towers and the projector."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("language_model.")}


def score_of(logits, prior):
    """p("1") / (p("1") + p("0")) of verdict logits (B, 2), at the rate `prior` of positives -> (B,) in [0, 1].

    Training shows both labels equally often, so the bare softmax answers for a world in which every second row leads to a
    keyframe. By Bayes' rule the odds where a share `prior` does are prior / (1 - prior) times as large (Elkan, 2001). It
    changes no ranking of rows, but that of episodes: hovering where some rows of successes are positive gets 0.6 from the bare
    softmax, two thirds of what a sure keyframe gets, and a failed episode hovers for long. 0.5 leaves the softmax as it is.
    """
    return (logits[:, 0] - logits[:, 1] + math.log(prior / (1 - prior))).sigmoid()


def prior_of(info):
    """Share of positives among the rows that a judge learnt from, as its rprm.json (a dict) has it; 0.5 for one that stores none."""
    prior = info.get("prior", 0.5)
    if not (isinstance(prior, float) and 0 < prior < 1):
        raise UserError(f'the reward model\'s rprm.json has "prior": {json.dumps(prior)}, which is no number between 0 and 1')
    return prior


def verdict_token_ids(model):
    """Ids of the success token "1" and the no-success token "0", in that order."""
    ids = [model.tokenizer.token_to_id(text) for text in ("1", "0")]
    if None in ids:
        raise UserError('the checkpoint\'s tokenizer has no tokens "1" and "0", which the reward model answers with')
    return ids


def verdict_logits(
    model, input_ids, attention_mask, action_tokens, token_ids, pixel_values=None, patch_embeddings=None
):
    """Next-token logits (B, len(token_ids)) after image + prompt + 7 action tokens.

    A state without action has the same length: seven times the "0" token, which no action is written with, stand in for
    the tokens. Training shows this to a part of each batch, so one model gives both scores.
    """
    if action_tokens is None:
        blank = verdict_token_ids(model)[1]
        action_tokens = torch.full((len(input_ids), ACTION_DIM), blank, dtype=torch.int64, device=input_ids.device)
    return model.text_after_actions_logits(
        input_ids,
        attention_mask,
        action_tokens,
        pixel_values=pixel_values,
        patch_embeddings=patch_embeddings,
        token_ids=token_ids,
    ).float()


def load_reward_model(path, dtype=torch.float32, device="cpu"):
    """What `train.py --reward-model` names: an RPRM, tiny or an adapter of a VLM, or else a stock VLM (directory or hub id)."""
    from models.vlm import VLM

    folder, config, info = Path(path), Path(path) / "config.json", Path(path) / "rprm.json"
    hub_id = not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.is_dir()
    is_stock = hub_id or (config.is_file() and '"openvla"' not in config.read_text(errors="replace"))
    is_tuned = info.is_file() and "vlm" in read_json(info)
    return (VLM if is_stock or is_tuned else RewardModel).from_pretrained(path, dtype=dtype, device=device)


# --------------------------------------------------------------------------------------------------------------------
# Training (Eq. 3)
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Labelled rows of many trajectories, in the form that the judge reads (`RewardModel` or `vlm.VLM`)."""

    instructions: list  # n strings
    images: torch.Tensor  # on the CPU. RewardModel: patch embeddings (n, P, d) float16, since its vision is frozen; VLM: frames
    actions: torch.Tensor  # (n, 7) int64. RewardModel: action tokens; VLM: levels 0 to 255
    labels: torch.Tensor  # (n,) float32, 1 or 0
    trajectory: torch.Tensor  # (n,) int64, number of the trajectory that the row is from

    def __len__(self):
        return len(self.labels)

    def select(self, rows):
        rows = torch.as_tensor(rows)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        tensors = (self.images, self.actions, self.labels, self.trajectory)
        return Examples([self.instructions[i] for i in rows.tolist()], *(x[rows] for x in tensors))


def make_examples(judge, trajectories, rule, unnorm_key, summary):
    """Label trajectories (of `read_trajectories`), keep the labelled rows -> Examples. Counts into `summary`."""
    instructions, parts = [], []
    for number, trajectory in enumerate(trajectories):
        result = label(trajectory, rule)
        summary.add(result)
        rows = np.flatnonzero(result.labels != IGNORED)
        if not result.usable or not len(rows):
            continue
        instructions += [trajectory["instruction"]] * len(rows)
        images, actions = judge.images_of(trajectory["frames"][rows]), judge.actions_of(trajectory["actions"][rows], unnorm_key)
        labels = torch.from_numpy(result.labels[rows]).float()
        parts.append((images, actions, labels, torch.full((len(rows),), number)))
    if not parts:
        raise UserError(f"no trajectory can be used: {summary}")
    return Examples(instructions, *(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def embed_frames(model, frames, chunk=64):
    """(n, H, W, 3) uint8 upright -> (n, P, d) patch embeddings, a chunk at a time to bound the memory."""
    chunks = [frames[i : i + chunk] for i in range(0, len(frames), chunk)]
    return torch.cat([model.embed_images(model.preprocess(c).to(model.device, model.dtype)) for c in chunks])


@torch.no_grad()
def predict(judge, examples, state_only=False):
    """Scores (n,) numpy float64 of all rows; with state_only, of the state without its action."""
    scores = []
    for rows in torch.arange(len(examples)).split(judge.CHUNK):
        logits = judge.verdicts(examples.select(rows), torch.full((len(rows),), state_only))
        scores.append(score_of(logits, judge.prior).double().cpu())
    return torch.cat(scores).numpy()


def measure(judge, examples):
    """Held-out metrics of a judge: a dict of floats. `nll` is the mean -log p(label), p the score at the judge's prior."""
    labels = examples.labels.numpy()
    scores, state_scores = predict(judge, examples), predict(judge, examples, state_only=True)
    right = np.clip(np.where(labels == 1, scores, 1 - scores), 1e-7, 1)
    return {
        "auroc": auroc(scores, labels),
        "average_precision": average_precision(scores, labels),
        "prevalence": float(labels.mean()),  # what a random score's average precision would be
        **calibration(scores, labels),
        "nll": float(-np.log(right).mean()),
        "auroc_state_only": auroc(state_scores, labels),
        "rows": len(examples),
    }


def fit(judge, train, held_out, *, epochs, batch_size, lr, patience, action_dropout, whole_vocabulary, seed, micro_batch_size=None):
    """Fine-tune `judge` in place (RewardModel: its language model; VLM: its adapter) and set its prior; early stop on the
    held-out loss; the best weights are kept. micro_batch_size: rows per backward pass (memory only).

    Returns (metrics of the kept epoch with "epoch", list of metrics by epoch; entry 0 is before training).
    """
    parameters = judge.trainable()
    for parameter in parameters:
        parameter.requires_grad_(True)
    answers = torch.tensor(judge.token_ids, device=judge.model.device)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(train) / batch_size)
    positives = train.labels.sum()
    if not 0 < positives < len(train):
        raise UserError(f"{int(positives)} of {len(train)} training rows are positive; both kinds are needed")
    # Class balance: positives and negatives are drawn equally often, and no negative is thrown away for it.
    weights = torch.where(train.labels == 1, 0.5 / positives, 0.5 / (len(train) - positives))
    judge.prior = float(positives / len(train))

    history = [{"epoch": 0, **measure(judge, held_out)}]
    best, best_weights = history[0], [p.detach().cpu().clone() for p in parameters]
    with progress_bar(total=epochs * steps, desc="RPRM", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            for rows in torch.multinomial(weights, steps * batch_size, True, generator=generator).split(batch_size):
                hidden = torch.rand(batch_size, generator=generator) < action_dropout  # these are shown without action
                for group in optimiser.param_groups:  # linear decay to zero
                    group["lr"] = lr * (1 - bar.n / bar.total)
                optimiser.zero_grad(set_to_none=True)
                total = 0.0
                for part in torch.arange(batch_size).split(micro_batch_size or batch_size):
                    batch = train.select(rows[part])
                    logits = judge.verdicts(batch, hidden[part], whole_vocabulary)  # (B, 2) or (B, V)
                    wrong = (batch.labels == 0).long().to(logits.device)  # column 0 is "1", column 1 is "0"
                    # Eq. 3: -log p(verdict token | action tokens, image, instruction)
                    loss = F.cross_entropy(logits, answers[wrong] if whole_vocabulary else wrong) * len(part) / batch_size
                    loss.backward()
                    total += loss.item()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                bar.update()
            history.append({"epoch": epoch, "train_loss": total, **measure(judge, held_out)})
            bar.set_postfix({k: f"{history[-1][k]:.3f}" for k in ("auroc", "nll")})
            if history[-1]["nll"] < best["nll"]:
                best, best_weights = history[-1], [p.detach().cpu().clone() for p in parameters]
            elif epoch - best["epoch"] >= patience:
                break
    for parameter, kept in zip(parameters, best_weights, strict=True):
        parameter.data.copy_(kept)
        parameter.requires_grad_(False)
    return best, history


# --------------------------------------------------------------------------------------------------------------------
# Checks in the simulator: does the score follow the task, and is it safe to optimise?
# --------------------------------------------------------------------------------------------------------------------


class TaskProgress:
    """True progress of a pick-and-place task in [0, 1], from the simulator: the mean over the task's goals of

    reach (hand to object), lift (5 cm is all of it) and carry (object to its goal, seen from above), each in [0, 1]
    relative to the start of the episode and each at its best so far: a hand that has let go of the object has not lost
    the task.
    """

    def __init__(self, sim, start):
        goals = sim.env.env.parsed_problem["goal_state"]  # e.g. [["in", "butter_1", "basket_1_contain_region"]]
        self.pairs = []
        for predicate, *names in goals:
            places = [o for o in start["objects"] if len(names) == 2 and names[1].startswith(o)]
            if predicate.lower() in ("in", "on") and places and names[0] in start["objects"]:
                self.pairs.append((names[0], max(places, key=len)))
        if not self.pairs:
            raise UserError(
                f"{sim.suite} task {sim.task_id} ({sim.instruction}) has no goal of the kind object in or on object, "
                "so its progress is not known; use libero_object or libero_spatial"
            )
        self.start = [self._measure(start, *pair) for pair in self.pairs]
        self.best = np.zeros((len(self.pairs), 3))

    @staticmethod
    def _measure(state, name, place):
        position, goal = state["objects"][name][0], state["objects"][place][0]
        return np.linalg.norm(position - state["eef_pos"]), position[2], np.linalg.norm((position - goal)[:2])

    def __call__(self, state):
        for i, (pair, (reach0, height0, carry0)) in enumerate(zip(self.pairs, self.start, strict=True)):
            reach, height, carry = self._measure(state, *pair)
            now = np.clip([1 - reach / reach0, (height - height0) / 0.05, 1 - carry / max(carry0, 1e-6)], 0, 1)
            self.best[i] = np.maximum(self.best[i], now)
        return float(self.best.mean())


@torch.no_grad()
def roll(rprm, model, sim, episodes, limit, choose):
    """Run started episodes of one task in lockstep for at most `limit` decisions, scoring every step.

    choose(rows, input_ids, attention_mask, patch_embeddings) -> action tokens (n, 7), actions (n, 7) of the episodes
    `rows`. model: the OpenVLA that `choose` uses. Returns one dict per episode: success, scores (T,), state_scores
    (T + 1,), progress (T + 1,), states (T), actions (T), frames (T). rprm None: the three before states are empty.
    """
    shared = rprm is None or rprm.shares_vision(model)
    progress = [TaskProgress(sim, episode.privileged()) for episode in episodes if rprm is not None]
    names = ("scores", "state_scores", "progress", "states", "actions", "frames", "ee_pos", "gripper_states")
    runs = [{"success": False, **{name: [] for name in names}} for _ in episodes]
    for step in progress_bar(range(limit + 1), desc=f"task {sim.task_id}", unit="decision", leave=False):
        rows = [i for i, run in enumerate(runs) if not run["success"]]
        if not rows:
            break
        frames = np.stack([episodes[i].render() for i in rows])
        input_ids, attention_mask = model.tokenize([sim.instruction] * len(rows))
        own = embed_frames(model if rprm is None else rprm.model, frames)
        if rprm is not None:
            for i, score in zip(rows, rprm.score(input_ids, attention_mask, None, patch_embeddings=own), strict=True):
                runs[i]["state_scores"].append(float(score))
                runs[i]["progress"].append(progress[i](episodes[i].privileged()))
        if step == limit:
            break
        tokens, actions = choose(rows, input_ids, attention_mask, own if shared else embed_frames(model, frames))
        if rprm is not None:
            for i, score in zip(rows, rprm.score(input_ids, attention_mask, tokens, patch_embeddings=own), strict=True):
                runs[i]["scores"].append(float(score))
        for k, i in enumerate(rows):
            run, state = runs[i], episodes[i].privileged()
            run["states"].append(episodes[i].get_state())
            run["actions"].append(actions[k])
            run["frames"].append(frames[k])
            run["ee_pos"].append(state["eef_pos"])
            run["gripper_states"].append(state["gripper_qpos"])
            for _ in range(model.action_repeat):
                run["success"] = run["success"] or episodes[i].step(actions[k])
            if run["success"]:
                run["state_scores"].append(0.0)  # phi after termination
                run["progress"].append(1.0)
    return runs


def shaped_return(run, mode, weight, gamma):
    """Discounted return of a run (dict of `roll`) under sparse + shaping reward."""
    T = len(run["scores"])
    scores = np.array(run["state_scores"][:T] if mode == "potential" else run["scores"])
    terminated = np.zeros(T, bool)
    terminated[-1] = run["success"]
    rewards = 1.0 * terminated + shaping_reward(
        scores, np.array(run["state_scores"][1:]), mode, weight, gamma, terminated
    )
    return float((gamma ** np.arange(T) * rewards).sum())


def loiter(rprm, model, sim, runs, limit, unnorm_key):
    """For each successful run, the same agent hovering from its best-scored step on until the limit -> list of runs.

    It holds its position and its gripper. This is what an agent that maximises `sum` is tempted to do.
    """
    starts = [int(np.argmax(run["scores"])) for run in runs]
    episodes, actions = [], []
    for run, t in zip(runs, starts, strict=True):
        episodes.append(sim.episode())
        episodes[-1].set_state(run["states"][t])
        actions.append(np.array([0, 0, 0, 0, 0, 0, float(run["actions"][t][6] > 0.5)]))
    actions = np.array(actions)
    tokens = torch.from_numpy(model.encode_actions(actions, unnorm_key)).to(model.device)
    tails = roll(rprm, model, sim, episodes, limit - min(starts), lambda rows, *_: (tokens[rows], actions[rows]))
    result = []
    for run, t, tail in zip(runs, starts, tails, strict=True):
        keep = limit - t  # episodes that were left later have less time to hover
        scores, state_scores = tail["scores"][:keep], tail["state_scores"][: keep + 1]
        ended = tail["success"] and len(tail["scores"]) <= keep  # the object fell into place by itself
        joined = {"scores": run["scores"][:t] + scores, "state_scores": run["state_scores"][:t] + state_scores}
        result.append({"success": ended, **joined})
    return result


def record_runs(directory, sim, runs, action_repeat):
    """Write runs in LIBERO's layout: <directory>/success and <directory>/failure, in each one file a task."""
    for kind in ("success", "failure"):
        demos = []
        for run in runs:
            if run["success"] == (kind == "success"):
                actions = np.array(run["actions"])
                actions[:, 6] = np.where(actions[:, 6] > 0.5, -1.0, 1.0)  # files: -1 open, +1 close
                arrays = {key: np.array(run[key]) for key in ("ee_pos", "gripper_states")}
                if kind == "failure":  # a demonstration's last row has a 1 in both
                    arrays.update({key: np.zeros(len(actions), np.uint8) for key in ("rewards", "dones")})
                demos.append({"actions": actions, "agentview_rgb": np.array(run["frames"])[:, ::-1, ::-1], **arrays})
        if demos:
            path = demo_path(directory, kind, sim.name)  # not the instruction: tasks of libero_90 share those
            write_demos(path, demos, action_repeat, sim.instruction, suite=sim.suite, task_id=sim.task_id)


def policy_runs(rprm, model, suite, task_ids, *, episodes_per_task, temperature, seed, record=None):
    """Yield (TaskSim, limit in decisions, finished runs of `roll`) per task, the policy acting from random placements.

    Not from the 50 test states: episodes that are recorded (HDF5 under `record`) may be used for training.
    """
    from simulator.render import default_render
    from simulator.suites import max_steps
    from simulator.task import TaskSim

    limit, generator = max_steps(suite) // model.action_repeat, torch.Generator().manual_seed(seed)
    for task_id in progress_bar(task_ids, desc="rolling out", unit="task"):
        sim = TaskSim(suite, task_id, default_render())
        episodes = [sim.episode() for _ in range(episodes_per_task)]
        for i, episode in enumerate(episodes):
            episode.reset(None, np.random.default_rng([seed, task_id, i]))

        def policy(rows, input_ids, attention_mask, embeddings):
            how = {"patch_embeddings": embeddings, "temperature": temperature, "generator": generator}
            tokens = model.generate_actions(input_ids, None, attention_mask, **how).tokens
            return tokens, model.decode_actions(tokens, suite)

        done = roll(rprm, model, sim, episodes, limit, policy)
        if record:
            record_runs(record, sim, done, model.action_repeat)
        for run in done:
            del run["frames"]  # 200 kB each
        yield sim, limit, done
        sim.close()


def evaluate(rprm, model, suite, task_ids, *, episodes_per_task, temperature, weight, gamma, seed):
    """Roll the policy out and measure the reward model on it -> `report` dict."""
    runs, hovers = [], []
    how = {"episodes_per_task": episodes_per_task, "temperature": temperature, "seed": seed}
    for sim, limit, done in policy_runs(rprm, model, suite, task_ids, **how):
        won = [run for run in done if run["success"]]
        hovers += loiter(rprm, model, sim, won, limit, suite) if won else []
        runs += done
    setting = {"suite": suite, "task_ids": list(task_ids), "temperature": temperature, "seed": seed}
    return {**setting, **report(runs, hovers, weight, gamma, CONTROL_HZ / model.action_repeat)}


def report(runs, hovers, weight, gamma, rate):
    """Numbers from runs (of `roll`) and the hovering twins of the successful ones, in order; NaN: nothing was seen.

    "state_score" and "state_only" are about the score without the action, which `--prm-mode potential` takes
    differences of; the others about the score of the action in its context, which `sum` adds up.
    """

    def mean(values):
        values = [v for v in values if not math.isnan(v)]
        return float(np.mean(values)) if values else math.nan

    won = [run for run in runs if run["success"]]
    names = ("cumulative_score", "time_alone", "score_and_next_second", "state_score", "state_score_and_next_second")
    correlations = {name: [] for name in names}
    for run in won:
        scores, state_scores, progress = (np.array(run[name]) for name in ("scores", "state_scores", "progress"))
        T = len(scores)
        gain = progress[np.minimum(np.arange(T) + max(1, round(rate)), T)] - progress[:-1]
        values = np.cumsum(scores), np.arange(T), scores, state_scores[:T], state_scores[:T]
        for name, value, truth in zip(names, values, (progress[1:], progress[1:], gain, progress[:-1], gain), strict=True):
            correlations[name].append(spearman(value, truth))

    pairs = [pair for pair in zip(won, hovers, strict=True) if not pair[1]["success"]]  # some objects fall into place
    loitering = {}
    for mode in MODES:
        sparse = [shaped_return(run, "none", 0.0, gamma) for run, _ in pairs]
        success = [shaped_return(run, mode, 1.0, gamma) - s for (run, _), s in zip(pairs, sparse, strict=True)]
        hovering = [shaped_return(hover, mode, 1.0, gamma) for _, hover in pairs]
        # A return is linear in the weight: hovering wins where weight x (its gain in shaping) exceeds the sparse reward
        gains = [h - s for h, s in zip(hovering, success, strict=True)]
        loitering[mode] = {
            "success_return": mean(s + weight * x for s, x in zip(sparse, success, strict=True)),
            "loiter_return": mean(weight * h for h in hovering),
            "loiter_wins": sum(weight * gain > s for gain, s in zip(gains, sparse, strict=True)),
            "pairs": len(pairs),
            # below this weight no loiterer wins; None: none wins at any weight
            "safe_weight": min((s / gain for gain, s in zip(gains, sparse, strict=True) if gain > 0), default=None),
        }
    succeeded = [run["success"] for run in runs]
    separation = auroc([np.mean(run["scores"]) for run in runs], succeeded)
    state_only = auroc([np.mean(run["state_scores"][: len(run["scores"])]) for run in runs], succeeded)
    return {
        "episodes": len(runs),
        "successes": len(won),
        "episode_auroc": separation,
        "episode_auroc_95": auroc_interval(separation, len(won), len(runs) - len(won)),
        "episode_auroc_state_only": state_only,
        "episode_auroc_state_only_95": auroc_interval(state_only, len(won), len(runs) - len(won)),
        "mean_score": {
            kind: mean(float(np.mean(run["scores"])) for run in runs if run["success"] == (kind == "success"))
            for kind in ("success", "failure")
        },
        "spearman_with_progress": {name: mean(values) for name, values in correlations.items()},
        "weight": weight,
        "gamma": gamma,
        "loitering": loitering,
    }


def without_nan(value):
    """The same nested value with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_report(numbers):
    """One table on the terminal; nan where no episode of the kind was seen."""
    means, s = numbers["mean_score"], numbers["spearman_with_progress"]
    (low, high), (state_low, state_high) = numbers["episode_auroc_95"], numbers["episode_auroc_state_only_95"]
    tasks = ",".join(map(str, numbers["task_ids"]))
    print(
        f"{numbers['suite']}, tasks {tasks}: {numbers['successes']} of {numbers['episodes']} episodes succeeded\n"
        f"mean score of successes / failures    {means['success']:.3f} / {means['failure']:.3f}\n"
        f"episode AUROC (95 %)                  {numbers['episode_auroc']:.3f} ({low:.2f} to {high:.2f}); of the score without the "
        f"action {numbers['episode_auroc_state_only']:.3f} ({state_low:.2f} to {state_high:.2f})\n"
        f"Spearman with true progress           sum of scores {s['cumulative_score']:.3f}, time alone {s['time_alone']:.3f}, "
        f"score without the action {s['state_score']:.3f}\n"
        f"  with the next second's progress     score {s['score_and_next_second']:.3f}, without the action "
        f"{s['state_score_and_next_second']:.3f}\n"
        f"loitering, weight {numbers['weight']:g}, gamma {numbers['gamma']:g}\n"
        f"  {'mode':<10}{'return of success':>19}{'of hovering':>13}{'hovering wins':>15}{'safe weight':>13}"
    )
    for mode, row in numbers["loitering"].items():
        safe = f"< {row['safe_weight']:.4f}" if row["safe_weight"] is not None else "any" if row["pairs"] else "nan"
        wins = f"{row['loiter_wins']} of {row['pairs']}"
        print(f"  {mode:<10}{row['success_return']:>19.3f}{row['loiter_return']:>13.3f}{wins:>15}{safe:>13}")


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def flag(default, text, /, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


_RULE = LabelRule()


@dataclass
class RuleArgs:
    demos: Path = flag(Path("data/libero_object"), "HDF5 file in LIBERO's layout, or a directory of them")
    limit: int | None = flag(None, "at most this many trajectories of each file of --demos", min=1)
    skip: int = flag(0, "leave out so many at the start of each file, such as those that the reward model learnt from", min=0)
    gripper_change: float = flag(_RULE.gripper_change, "smallest swing of the gripper that ends a segment, m", min=1e-4)
    gripper_still: float = flag(_RULE.gripper_still, "fingers slower than this have stopped, m/s", min=1e-4)
    slip: float = flag(_RULE.slip, "a gripper change that is taken back within so many seconds is none", min=0.0)
    near_zero: float = flag(_RULE.near_zero, "near-zero speed, as a fraction of the 90th percentile", min=0.0, max=1.0)
    window: float = flag(_RULE.window, "seconds before a keyframe that are positive", min=0.0)
    margin: float = flag(_RULE.margin, "seconds after a keyframe without label", min=0.0)
    smooth: float = flag(_RULE.smooth, "seconds of moving average over the speed", min=0.0)

    def rule(self):
        return LabelRule(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LabelRule)})


@dataclass
class LabelArgs(RuleArgs):
    plot: Path | None = flag(None, "directory for one PNG per trajectory")


@dataclass
class TrainArgs(RuleArgs):
    suite: str = flag("libero_object", "suite whose action statistics the policy's checkpoint is read with")
    policy: str = flag("checkpoints/libero_object/policy", "SFT checkpoint to start from (directory or hub id)")
    vlm: str | None = flag(
        None, "instead: a VLM of transformers (hub id or directory), by LoRA; of --policy only action statistics are used"
    )
    out: Path = flag(Path("runs/rprm"), "directory for the reward model")
    successes: Path | None = flag(None, "the same of the policy's own successes, used like demonstrations")
    failures: Path | None = flag(None, "HDF5 file or directory of failed trajectories: hard negatives")
    epochs: int = flag(2, "most passes over the training rows; the learning rate falls to zero over them", min=1)
    patience: int = flag(1, "stop after this many epochs without a better held-out loss", min=1)
    batch_size: int = flag(64, "rows per optimiser step", min=2)
    micro_batch_size: int | None = flag(None, "rows per backward pass (memory only)", min=1, default="all; 4 with --vlm")
    lr: float = flag(5e-4, "peak learning rate of AdamW (7B: 1e-5; --vlm: 1e-4)", min=0.0)
    lora_rank: int = flag(16, "rank of the adapter of --vlm", min=1, max=4096)
    action_dropout: float = flag(0.3, "share of rows shown without action, for the state-only score", min=0.0, max=1.0)
    held_out: float = flag(0.15, "share of trajectories kept for validation", min=0.01, max=0.9)
    whole_vocabulary: bool = flag(False, "Eq. 3 over all tokens, not over the two verdicts that the score compares")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(0, "seed of the split and of the batches", min=0, max=2**32 - 1)


@dataclass
class ScoreArgs(RuleArgs):
    suite: str = flag("libero_object", "suite whose action statistics the checkpoint is read with")
    rprm: str | None = flag(None, "reward model directory (--out of train, with --vlm or without)")
    vlm: str | None = flag(None, "instead: a stock VLM of transformers (hub id or directory), asked zero-shot")
    plot: Path | None = flag(None, "directory for one PNG per trajectory, score included")
    json: Path | None = flag(None, "file for the scores of every step")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))


@dataclass
class EvaluateArgs:
    suite: str = flag("libero_object", "LIBERO suite to roll out on")
    rprm: str = flag("checkpoints/libero_object/rprm", "reward model directory")
    policy: str = flag("checkpoints/libero_object/policy", "policy checkpoint that acts")
    task_ids: list[int] | None = flag(None, "tasks, such as 0,1", min=0, default="all of the suite")
    episodes_per_task: int = flag(5, "episodes per task, from random placements", min=1)
    temperature: float = flag(1.0, "sampling temperature of the policy; higher gives more failures", min=0.0)
    weight: float = flag(0.1, "--prm-weight of the RL run to check", min=0.0)
    gamma: float = flag(0.99, "discount per decision", min=0.0, max=1.0)
    json: Path | None = flag(None, "file for the report")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(2, "seed of placements and sampling; not one that data was recorded with", min=0, max=2**32 - 1)


@dataclass
class RecordArgs:
    suite: str = flag("libero_object", "LIBERO suite to roll out on")
    policy: str = flag("checkpoints/libero_object/policy", "policy checkpoint that acts")
    out: Path = flag(Path("data/rollouts"), "directory; files go to OUT/success and OUT/failure, one a task")
    task_ids: list[int] | None = flag(None, "tasks, such as 0,1", min=0, default="all of the suite")
    episodes_per_task: int = flag(100, "episodes per task, from random placements", min=1)
    temperature: float = flag(1.0, "sampling temperature of the policy; higher gives more failures", min=0.0)
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(1, "seed of placements and sampling; take another one for `evaluate`", min=0, max=2**32 - 1)


def label(trajectory, rule):
    """`label_trajectory` for a dict of `read_trajectories`."""
    arrays = (trajectory[key] for key in ("actions", "ee_pos", "gripper_states", "action_repeat"))
    return label_trajectory(*arrays, rule, success=trajectory["success"], disturbed=trajectory["disturbed"])


def action_tokens_of(model, actions, unnorm_key):
    """Actions (n, 7) of a file -> action tokens (n, 7) int64 of an OpenVLA."""
    return torch.from_numpy(model.encode_actions(policy_convention(actions), unnorm_key))


def read_trajectories(path, limit=None, success=True, skip=0):
    """Demonstrations or recorded rollouts of a file, or of all files in a directory, as dicts: `demos.read_demos` plus
    `frames` (its `agentview`), `success` as given, and `disturbed` (bool: the file also holds what was executed)."""
    for file in demo_files(path):
        for demo in itertools.islice(read_demos(file), skip, None if limit is None else skip + limit):
            with h5py.File(file, "r") as handle:
                disturbed = "executed_actions" in handle["data"][demo["name"]]
            name = f"{Path(file).stem}_{demo['name']}"
            yield {**demo, "name": name, "frames": demo["agentview"], "success": success, "disturbed": disturbed}


def run_label(args):
    rule, summary = args.rule(), LabelSummary()
    for trajectory in read_trajectories(args.demos, args.limit, skip=args.skip):
        result = label(trajectory, rule)
        summary.add(result)
        if args.plot:
            plot_trajectory(
                args.plot / f"{safe_name(trajectory['name'])}.png", trajectory["frames"], result, trajectory["name"]
            )
    print(summary)


def split(examples, share, seed):
    """Bool mask (n,) of the held-out rows: whole trajectories, since neighbouring frames are nearly the same image.

    Successes (with positives) and failures (without) are held out in the same share, at least one success.
    """
    numbers, generator = torch.unique(examples.trajectory), torch.Generator().manual_seed(seed)
    won = torch.isin(numbers, examples.trajectory[examples.labels == 1])
    if won.sum() < 2:
        raise UserError(f"{int(won.sum())} usable successful trajectories are too few, since one is held out")
    chosen = []
    for group, least in ((numbers[won], 1), (numbers[~won], 0)):
        order = group[torch.randperm(len(group), generator=generator)]
        chosen.append(order[: max(least, round(share * len(group)))])
    return torch.isin(examples.trajectory, torch.cat(chosen))


def run_train(args):
    rule, summary = args.rule(), LabelSummary()
    if args.vlm:
        from models.vlm import VLM

        statistics = OpenVLA.from_pretrained(args.policy).action_statistics(args.suite)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32  # of the frozen weights; adapters are float32
        judge = VLM.from_pretrained(args.vlm, dtype, args.device).to_be_tuned(args.vlm, statistics, args.lora_rank)
    else:
        judge = RewardModel(OpenVLA.from_pretrained(args.policy, device=args.device), {})

    def trajectories():
        yield from read_trajectories(args.demos, args.limit, skip=args.skip)
        if args.successes:
            yield from read_trajectories(args.successes)
        if args.failures:
            yield from read_trajectories(args.failures, success=False)

    bar = progress_bar(trajectories(), desc="label and embed", unit="trajectory")
    examples = make_examples(judge, bar, rule, args.suite, summary)
    print(summary)
    held_out = split(examples, args.held_out, args.seed)
    options = {name: getattr(args, name) for name in
               ("epochs", "batch_size", "lr", "patience", "action_dropout", "whole_vocabulary", "seed")}
    micro_batch_size = args.micro_batch_size or (4 if args.vlm else None)
    best, history = fit(judge, examples.select(~held_out), examples.select(held_out), micro_batch_size=micro_batch_size, **options)
    # A keyframe is where the hand stops, so a small command alone gives the label away to some extent. What a model
    # should add to that, it has to see.
    moves = judge.values_of(examples.actions[held_out], args.suite)[:, :3]
    shortcut = auroc(-np.linalg.norm(moves, axis=1), examples.labels[held_out].numpy())
    best = {**best, "auroc_small_command": shortcut}
    info = {
        "label_rule": dataclasses.asdict(rule), "labels": str(summary), "suite": args.suite, "policy": str(args.policy),
        "data": {name: str(getattr(args, name)) for name in ("demos", "successes", "failures") if getattr(args, name)},
        "train_rows": int((~held_out).sum()), "training": options, "held_out": best, "history": history,
    }
    judge.save(args.out, without_nan(info))
    print(
        f"held out ({best['rows']} rows, epoch {best['epoch']}): AUROC {best['auroc']:.3f}, average precision "
        f"{best['average_precision']:.3f} (random {best['prevalence']:.3f}), ECE {best['ece']:.3f}, Brier "
        f"{best['brier']:.3f}\nfor comparison, AUROC of the image without the action {best['auroc_state_only']:.3f}, "
        f"of a small command alone {best['auroc_small_command']:.3f}\nsaved {args.out}"
    )


def run_score(args):
    if (args.rprm is None) == (args.vlm is None):
        raise UserError("give one of --rprm and --vlm")
    rule, summary, records = args.rule(), LabelSummary(), []
    judge = load_reward_model(args.vlm or args.rprm, device=args.device)
    found = read_trajectories(args.demos, args.limit, skip=args.skip)
    for trajectory in progress_bar(found, desc="score", unit="trajectory"):
        result = label(trajectory, rule)
        summary.add(result)
        scores = judge.score_frames(trajectory["frames"], trajectory["instruction"], trajectory["actions"], args.suite)
        labels = result.labels if result.usable else np.full_like(result.labels, IGNORED)
        records.append({"name": trajectory["name"], "labels": labels.tolist(), "scores": scores.tolist()})
        if args.plot:
            path = args.plot / f"{safe_name(trajectory['name'])}.png"
            plot_trajectory(path, trajectory["frames"], result, trajectory["name"], scores)
    if not records:
        raise UserError(f"{args.demos} has no trajectory after the first {args.skip} of each file; lower --skip")
    scores, labels = (np.concatenate([r[key] for r in records]) for key in ("scores", "labels"))
    scores, labels = scores[labels != IGNORED], labels[labels != IGNORED] == POSITIVE
    errors, prevalence = calibration(scores, labels), np.mean(labels) if len(labels) else math.nan
    print(
        f"{summary}\nagainst the pseudo labels ({len(labels)} rows): AUROC {auroc(scores, labels):.3f}, average precision "
        f"{average_precision(scores, labels):.3f} (random {prevalence:.3f}), ECE {errors['ece']:.3f}, Brier {errors['brier']:.3f}"
    )
    if args.json:
        atomic_write(args.json, json.dumps(records))


def run_evaluate(args):
    from simulator.suites import check_task_ids

    task_ids = check_task_ids(args.suite, args.task_ids)
    rprm = RewardModel.from_pretrained(args.rprm, device=args.device)
    model = OpenVLA.from_pretrained(args.policy, device=args.device)
    options = {name: getattr(args, name) for name in ("episodes_per_task", "temperature", "weight", "gamma", "seed")}
    numbers = evaluate(rprm, model, args.suite, task_ids, **options)
    print_report(numbers)
    if args.json:
        atomic_write(args.json, json.dumps(without_nan(numbers), indent=1))


def run_record(args):
    from simulator.suites import check_task_ids

    task_ids = check_task_ids(args.suite, args.task_ids)
    model = OpenVLA.from_pretrained(args.policy, device=args.device)
    options = {name: getattr(args, name) for name in ("episodes_per_task", "temperature", "seed")}
    if (there := [args.out / kind for kind in ("success", "failure") if any((args.out / kind).glob("*.hdf5"))]):
        raise UserError(f"{there[0]} already holds recordings: choose another --out")
    won = total = 0
    for _, _, done in policy_runs(None, model, args.suite, task_ids, record=args.out, **options):
        won, total = won + sum(run["success"] for run in done), total + len(done)
    print(f"{won} successes and {total - won} failures in {args.out}")


@main_guard
def main(argv=None):
    commands = {
        "label": (LabelArgs, "pseudo labels of demonstrations: counts, and a plot per trajectory"),
        "train": (TrainArgs, "fine-tune the imitation policy into a reward model"),
        "score": (ScoreArgs, "scores of recorded trajectories"),
        "record": (RecordArgs, "the policy's own successes and failures, as more data for train"),
        "evaluate": (EvaluateArgs, "checks in the simulator: progress, success against failure, loitering"),
    }
    run = {"label": run_label, "train": run_train, "score": run_score, "record": run_record, "evaluate": run_evaluate}
    name, args = parse_command(commands, "RPRM: label, train, score, record, evaluate", argv)
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    with explain_out_of_memory("use --device cpu, or a lower --batch-size for train"):
        run[name](args)


if __name__ == "__main__":
    main()
