r"""RPRM, the robotic process reward model (paper, section 3.4): a dense reward learned without human labels.

The idea. LIBERO pays 1 at the end of an episode and 0 before, which is little to learn from. A vision-language model
that has seen successful trajectories can tell earlier whether a step makes progress. The labels it learns from cost
nothing, because manipulation has a rhythm that the robot itself measures: hand and gripper.

The model is OpenVLA itself, started from the imitation policy and fine-tuned by next-token prediction (Eq. 3):

    maximise log p("1" or "0" | image, instruction, 7 action tokens)

"1" is the answer on the promising steps of successes, as in the paper; "0" on their other steps and, here, on all steps
of failed episodes: without those the score of failures was the higher one (docs/rprm.md). During RL the model is frozen. Its
score is p("1") / (p("1") + p("0")), corrected from training, where both labels are drawn equally often, to the rate at which
"1" occurs (`models.answer.score_of`). `shaping_reward` makes reward of it.

Reading order: pseudo labels, the model, what train.py does with it, training. The commands that make one from recordings
are those of scripts/rprm.py.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from models.adapters import LORA_TARGETS, Adapter, read_tensors_for, save_adapter
from models.answer import answer_token_ids, prior_of, score_of
from models.checkpoints import replace_files, resolve_checkpoint
from models.vlm import VLM
from policy import ACTION_DIM, OpenVLA, policy_convention
from support.errors import UserError, explain_out_of_memory
from support.files import read_json
from support.labels import IGNORED, NEGATIVE, POSITIVE, LabelRule, Labels
from support.metrics import auroc, binary_metrics
from support.quiet import progress_bar

# --------------------------------------------------------------------------------------------------------------------
# Pseudo labels: which steps of a trajectory lead to a keyframe
# --------------------------------------------------------------------------------------------------------------------
#
#     gripper   open ________________                  ____________
#                                    \________________/                milestones: the gripper's opening changes
#     speed     /\    /\              /\       /\
#              /  \__/  \____________/  \_____/  \____                  keyframes: the hand comes to rest inside a segment
#     label     - + +  - + +         -  + +   - + +                    positive: the steps that lead to a keyframe
#
# Milestones divide a trajectory into segments, keyframes are the stops inside each and the end of a success, and the actions
# of the last moments before a keyframe are positive. `python -m scripts.rprm label --plot` draws what this section found.

CONTROL_HZ = 20.0  # LIBERO's control steps per second
STROKE = 0.08  # metres between the fingers of the open Panda gripper
COMMAND_SPEED = 0.25  # m/s of the hand under a full translation command


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
    milestones, opening, extreme, turned = [], True, openness[0], False
    arrived = True  # where the fingers last stopped: at "open"
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
    """Rows at which the hand comes to rest, inside each segment: slower than `near`, and no slower in the next row.

    speed (T,) and near in m/s; milestones: increasing rows, the ends of segments. Returns increasing rows.

    A stop begins with a minimum of the speed below `near` and lasts until the speed exceeds 2 x `near`. It gives one
    keyframe, that first minimum: with one per minimum, hovering would be all keyframes. The stop at which a segment ends
    gives a second one, its last minimum: there the gripper acts, or the task is done. The stop with which an episode or a
    segment starts gives none: no action led to it.
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
    `action_repeat` control steps. Returns Labels (support/labels.py): of every row 1, 0 or -1 (ignored), with keyframes and
    milestones. Never raises for what a file may contain: `problems` tells what was wrong.

    disturbed: the actions are clean labels, but something else was executed (the recoveries in the demonstrations of
    demos.py). The hand, pushed about, then never comes to rest, and the speed that the actions ask for takes the place
    of the measured one.

    A success ends with a keyframe, moving or not: the task is done. A push, a door or a knob has no other one there.

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
    if success and keyframes[-1:] != [T - 1]:
        keyframes.append(T - 1)  # the task is done
    problems = [] if measured else ["gripper_from_command"]
    problems += [] if milestones else ["no_gripper_change"]
    problems += ["no_motion"] if success and near == 0 else []

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
        labels, keyframes, milestones, speed, openness, near, rate, problems, "no_motion" not in problems
    )


# --------------------------------------------------------------------------------------------------------------------
# The model: OpenVLA with an answer after the action
# --------------------------------------------------------------------------------------------------------------------


class RPRM:
    """OpenVLA that answers "1" or "0", frozen except in `fit`. info: the content of rprm.json (label rule, training, metrics).

    `models.vlm.VLM` has the same methods from `action_statistics` on (its `add_adapter` takes the statistics as well).
    """

    CHUNK, ROWS = 64, 256  # pictures embedded, and examples scored at a time

    def __init__(self, model, info):
        self.model, self.info = model.eval().requires_grad_(False), info
        self.token_ids = answer_token_ids(lambda text: [model.tokenizer.token_to_id(text)])
        self.prior, self.adapter = prior_of(info), None
        self.parameters = list(model.language_model.parameters())  # what `fit` changes; see `shares_vision`
        # An embedding of a picture takes 12 kB in half precision at the tiny size, but 2 MB at 7B.
        self.keeps_frames = 2 * model.num_patches * model.text["hidden_size"] > 256 * 256 * 3

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """What `save` wrote: a whole checkpoint, or an adapter, which is merged into the checkpoint that it names."""
        path = Path(directory) / "rprm.json"
        if not path.is_file():
            raise UserError(
                f"{directory} holds no rprm.json, so it is no reward model: give the --out of "
                "`python -m scripts.rprm train`"
            )
        info = read_json(path)
        if "vlm" in info:
            raise UserError(f"{directory} is a tuned VLM, where an RPRM made from the policy is needed")
        if "adapter" not in info:
            return cls(
                OpenVLA.from_pretrained(directory, dtype=dtype, device=device, kind="reward model"), info
            )
        base, rank = info["adapter"]["base"], info["adapter"]["rank"]
        reward_model = cls(OpenVLA.from_pretrained(base, dtype=dtype, device=device), info)
        reward_model.add_adapter(base, rank)
        file, adapter = Path(directory) / "adapter" / "adapter_model.safetensors", reward_model.adapter
        parameters = {f"base_model.model.{name}": p for name, p in adapter.named_parameters().items()}
        for parameter, tensor in read_tensors_for(file, parameters, adapter.base_fingerprint):
            parameter.data.copy_(tensor)
        for layer in adapter.layers.values():
            layer.merge()
        reward_model.model.requires_grad_(False)
        return reward_model

    @torch.no_grad()
    def score(self, input_ids, attention_mask, action_tokens=None, **images):
        """Score of the answer, (B,) float32 in [0, 1]: is this action (with None: this state) one of progress?

        input_ids, attention_mask (B, L) from `model.tokenize`; action_tokens (B, 7) int64 or None; one of pixel_values
        (B, 6, S, S) and patch_embeddings (B, P, d). Rows do not influence each other.
        """
        logits = self._logits(input_ids, attention_mask, action_tokens, self.token_ids, **images)
        return score_of(logits, self.prior)

    def _logits(self, input_ids, attention_mask, action_tokens, token_ids, **images):
        """Next-token logits (B, len(token_ids)) after image + prompt + 7 action tokens.

        A state without action has the same length: seven times the "0" token, which no action is written with, stand in
        for the tokens. Training shows this to a part of each batch, so one model gives both scores.
        """
        if action_tokens is None:
            action_tokens = input_ids.new_full((len(input_ids), ACTION_DIM), self.token_ids[1])
        prompt = (input_ids, attention_mask, action_tokens)
        return self.model.text_after_actions_logits(*prompt, token_ids=token_ids, **images)

    def shares_vision(self, policy):
        """True when the OpenVLA `policy` computes the same patch embeddings, so that one vision pass can serve both in a
        rollout. `fit` leaves the vision side of the SFT policy as it was, for this reason."""
        states = (model.state_dict().items() for model in (self.model, policy))  # of towers and projector:
        mine, theirs = ({k: v for k, v in state if not k.startswith("language_model.")} for state in states)
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine)

    def action_statistics(self, unnorm_key):
        """(q01, q99, mask), each (7,): what action tokens mean to it."""
        return self.model.action_statistics(unnorm_key)

    def score_frames(self, frames, instructions, actions=None):
        """Scores (B,) float64 numpy of frames (B, H, W, 3) uint8 upright, each with its instruction and, where `actions`
        (B, 7) of `encode_actions` are given, its action."""
        scores = []
        for i in range(0, len(frames), self.CHUNK):
            rows = slice(i, i + self.CHUNK)
            tokens = None if actions is None else actions[rows].to(self.model.device)
            embeddings = embed_frames(self.model, frames[rows])
            score = self.score(*self.model.tokenize(instructions[rows]), tokens, patch_embeddings=embeddings)
            scores.append(score.double().cpu().numpy())
        return np.concatenate(scores)

    def encode_images(self, frames):
        """Frames (n, H, W, 3) uint8 upright -> what `Examples` keeps: patch embeddings, or frames where they are smaller."""
        if self.keeps_frames:
            return torch.from_numpy(np.ascontiguousarray(frames))
        return embed_frames(self.model, frames).to("cpu", torch.float16)

    def encode_actions(self, actions, suite):
        """Actions (n, 7) in the policy's convention -> what `Examples` keeps of them: action tokens (n, 7) int64."""
        return torch.from_numpy(self.model.encode_actions(actions, self.model.unnorm_key_for(suite)))

    def decode_actions(self, actions, suite):
        """Inverse of `encode_actions` up to rounding: (n, 7) float64."""
        return self.model.decode_actions(actions, self.model.unnorm_key_for(suite))

    def answer_logits(self, batch, hidden, whole_vocabulary=False):
        """Logits of the tokens "1" and "0" (B, 2), or of all tokens (B, V), for the Examples `batch`; with gradient.
        hidden (B,) bool: rows whose action is not shown."""
        model = self.model
        tokens = torch.where(hidden[:, None], self.token_ids[1], batch.actions).to(model.device)
        vocabulary = list(range(model.text["vocab_size"])) if whole_vocabulary else self.token_ids
        images = embed_frames(model, batch.images.numpy()) if self.keeps_frames else batch.images
        images = images.to(model.device, model.dtype)
        return self._logits(*model.tokenize(batch.instructions), tokens, vocabulary, patch_embeddings=images)

    def add_adapter(self, base, rank):
        """Train a LoRA adapter of the language model instead of all its weights: 7B then fits one GPU. base: its path."""
        from peft import LoraConfig  # late: seconds to import, and few need it

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS["language"])
        self.adapter = Adapter(self.model, "rprm", config)
        self.parameters = list(self.adapter.named_parameters().values())
        self.model.gradient_checkpointing = True
        self.info = {**self.info, "adapter": {"base": str(base), "rank": rank}}

    def save(self, directory, info):
        """A checkpoint in the official layout with rprm.json in it; or the adapter in peft's format, rprm.json last."""
        text = json.dumps({**info, **self.info, "prior": self.prior}, indent=1)
        if self.adapter is None:
            self.model.side_files["rprm.json"] = text.encode()
            self.model.save_pretrained(directory)
        else:
            with replace_files(directory) as part:
                save_adapter(part / "adapter", self.adapter)
                (part / "rprm.json").write_text(text)


@torch.no_grad()
def embed_frames(model, frames, chunk=64):
    """(n, H, W, 3) uint8 upright -> (n, P, d) patch embeddings, a chunk at a time to bound the memory."""
    chunks = [frames[i : i + chunk] for i in range(0, len(frames), chunk)]
    return torch.cat([model.embed_images(model.preprocess(c).to(model.device, model.dtype)) for c in chunks])


def read_reward_model(path, dtype=torch.float32, device="cpu"):
    """An RPRM, a tuned VLM or else a stock VLM, each by its directory or hub id, for frames and actions."""
    folder = resolve_checkpoint(path, "reward model")
    info, config = folder / "rprm.json", folder / "config.json"
    if info.is_file():
        is_vlm = "vlm" in read_json(info)
    else:
        is_vlm = '"openvla"' not in config.read_text(errors="replace")
    return (VLM if is_vlm else RPRM).from_pretrained(folder, dtype=dtype, device=device)


# --------------------------------------------------------------------------------------------------------------------
# In the RL loop: from a rollout to scores, from scores to a reward
# --------------------------------------------------------------------------------------------------------------------


def load_reward_model(path, actor_critic, mode, unnorm_key=None, dtype=torch.float32, device="cpu"):
    """What `train.py --reward-model` names, as an object with `score_rollout(rollout, mode)`.

    actor_critic: whose rollouts are scored; unnorm_key: of the statistics that its actions mean motions by (None: the only
    ones). Where its vision side is frozen and the RPRM's is the same, the patch embeddings that the rollout holds already
    serve both; an RPRM with another vision side looks at the frames.
    """
    if mode == "none":
        return NoReward()
    reward_model, policy = read_reward_model(path, dtype, device), actor_critic.model
    is_vlm = isinstance(reward_model, VLM)
    if not is_vlm:
        sizes = [(m.image_size, m.num_patches, m.text["vocab_size"]) for m in (reward_model.model, policy)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{path} was trained from another model than the policy: image or vocabulary differ"
            )
    if mode == "sum":  # the one mode that shows it the policy's action tokens
        ours, theirs = policy.action_statistics(unnorm_key), reward_model.action_statistics(unnorm_key)
        if theirs is not None and not all(map(np.array_equal, ours, theirs)):
            raise UserError(
                f"{path} has other action statistics than the policy, so it would read other motions than are made: "
                "train one from this policy (python -m scripts.rprm train), or take --prm-mode potential"
            )
    if is_vlm:
        return RolloutScorer(reward_model, "frames", policy.action_tokenizer.ascending_bins)
    if not actor_critic.vision_frozen:
        return RolloutScorer(reward_model, "pixel_values")
    shared = reward_model.shares_vision(policy)
    return RolloutScorer(reward_model, "patch_embeddings" if shared else "frames")


class RolloutScorer:
    """A frozen reward model that scores `ppo.RolloutBuffer`s, in a few large batches after the last step of each.

    source: what of the rollout it reads, "patch_embeddings" or "pixel_values" (`rollout.images`), or "frames".
    encode: the policy's action tokens (n, 7) -> those of the reward model.
    """

    CHUNK = 256  # decisions at a time

    def __init__(self, reward_model, source, encode=lambda tokens: tokens):
        self.reward_model, self.source, self.encode = reward_model, source, encode

    def score_rollout(self, rollout, mode):
        """(scores, next_scores), each (T, N) float32. `sum`: scores of the action taken in o_t, and zeros. `potential`:
        scores of the state alone, of o_t and of the observation that followed (the final one of a truncated episode)."""
        T, N = rollout.rewards.shape
        with_action = mode == "sum"
        with explain_out_of_memory("use a smaller --reward-model, or --prm-mode none"):
            chunks = torch.arange(T * N).split(self.CHUNK)
            scores = [self._score(rollout, rows // N, rows % N, with_action) for rows in chunks]
            scores = torch.cat(scores).view(T, N)
            if with_action:
                return scores, torch.zeros(T, N)
            last = self._score(rollout, torch.full((N,), T), torch.arange(N), False)
            next_scores = torch.cat([scores[1:], last[None]])
            for (t, n), final in rollout.final_observations.items():
                one = torch.tensor([t]), torch.tensor([n])
                next_scores[t, n] = self._score(rollout, *one, False, final).item()
        return scores, next_scores

    def _score(self, rollout, t, n, with_action, final=None):
        """Scores (B,) of the observations at steps t (B,) of environments n (B,), or of the `final` one of its episode."""
        actions = self.encode(rollout.action_tokens[t, n]) if with_action else None  # (B, 7)
        if self.source == "frames":
            frames = rollout.frames[t, n] if final is None else final[0][None]  # (B, H, W, 3)
            instructions = [rollout.instructions[i][j] for i, j in zip(t.tolist(), n.tolist(), strict=True)]
            return torch.from_numpy(self.reward_model.score_frames(frames, instructions, actions)).float()
        device, mask = self.reward_model.model.device, rollout.attention_mask[t, n]  # (B, L)
        longest = max(int(mask.sum(1).max()), 1)  # the padding of other rows' longer prompts is left out
        images = rollout.images[t, n] if final is None else final[1][None]
        return self.reward_model.score(
            rollout.input_ids[t, n, :longest].to(device), mask[:, :longest].to(device),
            None if actions is None else actions.to(device), **{self.source: images.to(device)},
        ).cpu()  # fmt: skip


class NoReward:
    """`--prm-mode none`: the sparse reward alone."""

    def score_rollout(self, rollout, mode):
        return torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.rewards)


MODES = ("none", "sum", "potential")


def shaping_reward(scores, next_scores, mode, weight, gamma, terminated):
    """Reward to add to the sparse one. All arguments broadcast; arrays may be numpy or torch (which keeps the dtype).

    scores, next_scores: RPRM in [0, 1] at step t and t + 1 (of a truncated episode: of its final observation).
      none       0
      sum        weight * score, with weight 1 the paper's rule ("sparse reward + RPRM prediction"). Easy to learn from, but
                 it pays by the step: hovering where the score is high can earn more than finishing (`python -m bench rprm`).
      potential  weight * (gamma * phi(s') * (not terminated) - phi(s)). Discounted and summed over an episode that
                 terminates it is -weight * phi(s_0), whatever the agent does: the best policy is that of the sparse reward.
    The condition of that theorem (Ng, Harada and Russell, 1999): phi depends on the state alone, is 0 after
    termination, and `gamma` is the one of GAE. A score that also sees the action breaks it: every action's advantage
    then loses phi(s, a), which punishes just the actions that RPRM likes. So `potential` wants the score of the state
    alone, `RPRM.score(..., action_tokens=None)`.
    A time limit is not a termination: phi(s') stays, as the bootstrap value does.
    """
    if mode == "none":
        return 0.0 * scores
    if mode == "sum":
        return weight * scores
    if mode == "potential":
        goes_on = 1.0 - 1.0 * terminated  # numpy and torch alike: bool to float
        return weight * (gamma * next_scores * goes_on - scores)
    raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")


# --------------------------------------------------------------------------------------------------------------------
# Training (Eq. 3)
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Labelled rows of many trajectories, in the form that the reward model reads (`RPRM` or `VLM`)."""

    instructions: list  # n strings
    images: torch.Tensor  # of `encode_images`: patch embeddings (n, P, d) float16, or frames; on the CPU
    actions: torch.Tensor  # (n, 7) int64: what `encode_actions` gives
    labels: torch.Tensor  # (n,) float32, 1 or 0
    trajectory: torch.Tensor  # (n,) int64, number of the trajectory that the row is from

    def __len__(self):
        return len(self.labels)

    def select(self, rows):
        rows = torch.as_tensor(rows)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        tensors = (self.images, self.actions, self.labels, self.trajectory)
        return Examples([self.instructions[i] for i in rows.tolist()], *(x[rows] for x in tensors))


def make_examples(reward_model, trajectories, suite, summary):
    """The rows that carry a label, of (trajectory, Labels) pairs -> Examples. summary: for the error message.

    A trajectory is a dict of `scripts.rprm.read_trajectories`: "frames" (T, H, W, 3) uint8 upright, "actions" (T, 7) in the
    file convention, "file" and "instruction".
    """
    from simulator.sentences import sentence_of  # late: LIBERO takes seconds to import

    instructions, parts = [], []
    for number, (trajectory, result) in enumerate(trajectories):
        rows = np.flatnonzero(result.labels != IGNORED)
        if not result.usable or not len(rows):
            continue
        instructions += [sentence_of(suite, trajectory["file"], trajectory["instruction"])] * len(rows)
        images = reward_model.encode_images(trajectory["frames"][rows])
        actions = reward_model.encode_actions(policy_convention(trajectory["actions"][rows]), suite)
        labels = torch.from_numpy(result.labels[rows]).float()
        parts.append((images, actions, labels, torch.full((len(rows),), number)))
    if not parts:
        raise UserError(f"no trajectory can be used: {summary}")
    return Examples(instructions, *(torch.cat(column) for column in zip(*parts, strict=True)))


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


@torch.no_grad()
def predict(reward_model, examples, state_only=False):
    """Scores (n,) numpy float64 of all rows; with state_only, of the state without its action."""
    scores = []
    for rows in torch.arange(len(examples)).split(reward_model.ROWS):
        logits = reward_model.answer_logits(examples.select(rows), torch.full((len(rows),), state_only))
        scores.append(score_of(logits, reward_model.prior).double().cpu())
    return torch.cat(scores).numpy()


def measure(reward_model, examples):
    """Held-out metrics: a dict of floats. `nll` is the mean -log p(label), p the score at the reward model's prior."""
    labels = examples.labels.numpy()
    scores, state_scores = predict(reward_model, examples), predict(reward_model, examples, state_only=True)
    right = np.clip(np.where(labels == 1, scores, 1 - scores), 1e-7, 1)
    return {
        **binary_metrics(scores, labels),
        "nll": float(-np.log(right).mean()),
        "auroc_state_only": auroc(state_scores, labels),
        "rows": len(examples),
    }


def answer_loss(reward_model, batch, hidden, whole_vocabulary=False):
    """Eq. 3: the mean of -log p(answer token | action tokens, image, instruction) over the Examples `batch`.

    hidden (B,) bool: rows whose action is not shown. Of the two answers alone, or among all tokens.
    """
    logits = reward_model.answer_logits(batch, hidden, whole_vocabulary)  # (B, 2) or (B, V)
    wrong = (batch.labels == 0).long()  # column 0 is "1", column 1 is "0"
    targets = torch.tensor(reward_model.token_ids)[wrong] if whole_vocabulary else wrong
    return F.cross_entropy(logits, targets.to(logits.device))


def fit(
    reward_model, train, held_out, *, epochs, batch_size, lr, patience, action_dropout, whole_vocabulary, seed,
    micro_batch_size=None,
):  # fmt: skip
    """Fine-tune `reward_model` in place (its language model, or its adapter) and set its prior; early stop on the held-out
    loss; the best weights are kept. micro_batch_size: rows per backward pass (memory only).

    Returns (metrics of the kept epoch with "epoch", list of metrics by epoch; entry 0 is before training).
    """
    parameters = reward_model.parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(train) / batch_size)
    positives = train.labels.sum()
    if not 0 < positives < len(train):
        raise UserError(f"{int(positives)} of {len(train)} training rows are positive; both kinds are needed")
    # Class balance: positives and negatives are drawn equally often, and no negative is thrown away for it.
    weights = torch.where(train.labels == 1, 0.5 / positives, 0.5 / (len(train) - positives))
    reward_model.prior = float(positives / len(train))

    history = [{"epoch": 0, **measure(reward_model, held_out)}]
    best, best_weights = history[0], [p.detach().cpu().clone() for p in parameters]
    with progress_bar(total=epochs * steps, desc="RPRM", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            epoch_loss = 0.0
            drawn = torch.multinomial(weights, steps * batch_size, True, generator=generator)
            for step, rows in enumerate(drawn.split(batch_size), (epoch - 1) * steps):
                hidden = torch.rand(batch_size, generator=generator) < action_dropout  # shown without action
                for group in optimizer.param_groups:  # linear decay to zero
                    group["lr"] = lr * (1 - step / (epochs * steps))
                optimizer.zero_grad(set_to_none=True)
                for part in torch.arange(batch_size).split(micro_batch_size or batch_size):
                    loss = answer_loss(reward_model, train.select(rows[part]), hidden[part], whole_vocabulary)
                    loss = loss * len(part) / batch_size  # Eq. 3, this micro-batch's share of it
                    loss.backward()
                    epoch_loss += loss.item() / steps
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                bar.update()
            history.append({"epoch": epoch, "train_loss": epoch_loss, **measure(reward_model, held_out)})
            bar.set_postfix({k: f"{history[-1][k]:.3f}" for k in ("auroc", "nll")})
            if history[-1]["nll"] < best["nll"]:
                best, best_weights = history[-1], [p.detach().cpu().clone() for p in parameters]
            elif epoch - best["epoch"] >= patience:
                break
    for parameter, kept in zip(parameters, best_weights, strict=True):
        parameter.data.copy_(kept)
        parameter.requires_grad_(False)
    return best, history


if __name__ == "__main__":
    raise SystemExit(
        "error: reward_model.py is the model; its commands stand in scripts/rprm.py: python -m scripts.rprm --help"
    )
