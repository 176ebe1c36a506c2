r"""RPRM, the robotic process reward model (paper, section 3.4): a dense reward learned without human labels.

The idea. LIBERO pays 1 at the end of an episode and 0 before, which is little to learn from. A vision-language model
that has seen successful trajectories can tell earlier whether a step makes progress. The labels it learns from cost
nothing: pseudo_labels.py finds them in the rhythm of hand and gripper.

The model is OpenVLA itself, started from the imitation policy and fine-tuned by next-token prediction (Eq. 3):

    maximise log p("1" or "0" | image, instruction, 7 action tokens)

During RL it is frozen; its score p("1") / (p("1") + p("0")), brought back from the balanced labels of training to the rate
at which positives occur (`models.answer.score_of`), enters the reward through `shaping_reward`.

    python reward_model.py label --demos data/libero_object --plot out/labels    look at the labels first
    python reward_model.py record --policy <sft> --out data/rollouts             the policy's own successes and failures
    python reward_model.py train --demos ... --policy <sft> --out <rprm>         the model, with held-out metrics
    python reward_model.py score --demos ... --rprm <rprm> --plot out/scores     scores of recorded trajectories
    python -m bench rprm --rprm <rprm> --policy <sft>                            is it safe to optimise? (simulator)
"""

# ruff: noqa: E402 (flags come before the slow imports, so that --help and a mistyped flag answer at once)

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from pseudo_labels import LabelRule
from support.cli import flag, parse_command


@dataclass
class DataArgs(LabelRule):
    demos: Path = flag(Path("data/libero_object"), "HDF5 file in LIBERO's layout, or a directory of them")
    limit: int | None = flag(None, "at most this many trajectories of each file of --demos", min=1)
    skip: int = flag(0, "leave out so many at the start of each file, such as those trained on", min=0)


@dataclass
class LabelArgs(DataArgs):
    plot: Path | None = flag(None, "directory for one PNG per trajectory")


@dataclass
class RecordArgs:
    suite: str = flag("libero_object", "LIBERO suite to roll out on")
    policy: str | None = flag(None, "policy checkpoint that acts", default="checkpoints/SUITE/policy")
    out: Path = flag(Path("data/rollouts"), "directory; files go to OUT/success and OUT/failure, one a task")
    task_ids: list[int] | None = flag(None, "tasks, such as 0,1", min=0, default="all of the suite")
    episodes_per_task: int = flag(100, "episodes per task, from random placements", min=1)
    temperature: float = flag(1.0, "sampling temperature of the policy; higher gives more failures", min=0.0)
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(1, "seed of placements and sampling; take another one to measure", min=0, max=2**32 - 1)


@dataclass
class TrainArgs(DataArgs):
    suite: str = flag("libero_object", "suite whose action statistics the policy's checkpoint is read with")
    policy: str | None = flag(
        None, "SFT checkpoint to start from, or a hub id", default="checkpoints/SUITE/policy"
    )
    vlm: str | None = flag(None, "instead: a VLM of transformers, by LoRA; --policy gives action statistics")
    out: Path = flag(Path("runs/rprm"), "directory for the reward model")
    successes: Path | None = flag(None, "the same of the policy's own successes, used like demonstrations")
    failures: Path | None = flag(None, "HDF5 file or directory of failed trajectories: hard negatives")
    epochs: int = flag(2, "most passes over the training rows; the learning rate falls to 0", min=1)
    patience: int = flag(1, "stop after this many epochs without a better held-out loss", min=1)
    batch_size: int = flag(64, "rows per optimiser step", min=2)
    micro_batch_size: int | None = flag(
        None, "rows per backward pass", min=1, default="all; 4 with an adapter"
    )
    lr: float = flag(5e-4, "peak learning rate of AdamW (7B: 1e-5; with an adapter: 1e-4)", min=0.0)
    lora_rank: int | None = flag(
        None,
        "train an adapter of this rank, not all weights: for 7B",
        min=1,
        max=4096,
        default="off; 16 with --vlm",
    )
    action_dropout: float = flag(0.3, "share of rows shown without their action", min=0.0, max=1.0)
    held_out: float = flag(0.15, "share of trajectories kept for validation", min=0.01, max=0.9)
    whole_vocabulary: bool = flag(False, "Eq. 3 over all tokens, not over the two answers that are compared")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(0, "seed of the split and of the batches", min=0, max=2**32 - 1)


@dataclass
class ScoreArgs(DataArgs):
    suite: str = flag("libero_object", "suite whose action statistics the checkpoint is read with")
    rprm: str | None = flag(None, "reward model directory (--out of train, with --vlm or without)")
    vlm: str | None = flag(None, "instead: a stock VLM of transformers (hub id or directory)")
    plot: Path | None = flag(None, "directory for one PNG per trajectory, score included")
    json: Path | None = flag(None, "file for the scores of every step")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))


COMMANDS = {
    "label": (LabelArgs, "pseudo labels of demonstrations: counts, and a plot per trajectory"),
    "record": (RecordArgs, "the policy's own successes and failures, as more data for train"),
    "train": (TrainArgs, "fine-tune the imitation policy into a reward model"),
    "score": (ScoreArgs, "scores of recorded trajectories"),
}

if __name__ == "__main__":
    command, args = parse_command(COMMANDS, "RPRM: label, record, train, score")

import itertools
import json
import math
import shutil

import numpy as np
import torch
import torch.nn.functional as F

from demos import Refused, demo_files, demo_path, read_demos, write_demos
from models.adapters import LORA_TARGETS, Adapter, read_tensors_for, save_adapter
from models.answer import answer_token_ids, prior_of, score_of
from models.checkpoints import resolve_checkpoint
from models.vlm import VLM
from policy import ACTION_DIM, OpenVLA, policy_convention
from pseudo_labels import IGNORED, POSITIVE, LabelSummary, label_trajectory
from support.errors import UserError, explain_out_of_memory, main_guard
from support.files import atomic_write, read_json, safe_name
from support.metrics import auroc, binary_metrics, in_words, without_nan
from support.quiet import progress_bar

# --------------------------------------------------------------------------------------------------------------------
# The model: OpenVLA with an answer after the action
# --------------------------------------------------------------------------------------------------------------------


class RPRM:
    """OpenVLA that answers "1" or "0", frozen except in `fit`. info: the content of rprm.json (label rule, training, metrics).

    `models.vlm.VLM` has the same methods from `score_frames` on.
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
            raise UserError(f"{directory} holds no rprm.json, so it is no reward model: give train's --out")
        info = read_json(path)
        if "vlm" in info:
            raise UserError(f"{directory} is a tuned VLM, where an RPRM made from the policy is needed")
        if "adapter" not in info:
            return cls(OpenVLA.from_pretrained(directory, dtype=dtype, device=device), info)
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
        return self.model.text_after_actions_logits(*prompt, token_ids=token_ids, **images).float()

    def shares_vision(self, policy):
        """True when the OpenVLA `policy` computes the same patch embeddings, so that one vision pass can serve both in a
        rollout. `train` leaves the vision side of the SFT policy as it was, for this reason."""
        states = (model.state_dict().items() for model in (self.model, policy))  # of towers and projector:
        mine, theirs = ({k: v for k, v in state if not k.startswith("language_model.")} for state in states)
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine)

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
            Path(directory).mkdir(parents=True, exist_ok=True)
            shutil.rmtree(Path(directory) / "adapter", ignore_errors=True)
            save_adapter(Path(directory) / "adapter", self.adapter)
            atomic_write(Path(directory) / "rprm.json", text)


@torch.no_grad()
def embed_frames(model, frames, chunk=64):
    """(n, H, W, 3) uint8 upright -> (n, P, d) patch embeddings, a chunk at a time to bound the memory."""
    chunks = [frames[i : i + chunk] for i in range(0, len(frames), chunk)]
    return torch.cat([model.embed_images(model.preprocess(c).to(model.device, model.dtype)) for c in chunks])


def read_reward_model(path, dtype=torch.float32, device="cpu"):
    """An RPRM, a tuned VLM or else a stock VLM, each by its directory or hub id, for frames and actions."""
    folder = resolve_checkpoint(path, "reward model")
    info, config = folder / "rprm.json", folder / "config.json"
    is_vlm = (
        "vlm" in read_json(info) if info.is_file() else '"openvla"' not in config.read_text(errors="replace")
    )
    return (VLM if is_vlm else RPRM).from_pretrained(folder, dtype=dtype, device=device)


# --------------------------------------------------------------------------------------------------------------------
# In the RL loop: from a rollout to scores, from scores to a reward
# --------------------------------------------------------------------------------------------------------------------


def load_reward_model(path, policy, mode, dtype=torch.float32, device="cpu"):
    """What `train.py --reward-model` names, as an object with `score_rollout(rollout, mode)`.

    policy: the `ActorCritic` whose rollouts are scored. Where its vision side is frozen and the RPRM's is the same, the
    patch embeddings that the rollout holds already serve both; an RPRM with another vision side looks at the frames.
    """
    if mode == "none":
        return NoReward()
    reward_model, policy_model = read_reward_model(path, dtype, device), policy.model
    if isinstance(reward_model, VLM):
        return RolloutScorer(reward_model, "frames", policy_model.action_tokenizer.ascending_bins)
    sizes = [(m.image_size, m.num_patches, m.text["vocab_size"]) for m in (reward_model.model, policy_model)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{path} was trained from another model than the policy: image or vocabulary differ")
    if not policy.vision_frozen:
        return RolloutScorer(reward_model, "pixel_values")
    shared = reward_model.shares_vision(policy_model)
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
    """Reward to add to the sparse one. All arguments broadcast; arrays may be numpy or torch; shape and dtype are kept.

    scores, next_scores: RPRM in [0, 1] at step t and t + 1 (of a truncated episode: of its final observation).
      none       0
      sum        weight * score, the paper's rule ("sparse reward + RPRM prediction"). Easy to learn from, but it pays
                 by the step: hovering where the score is high can earn more than finishing (`python -m bench rprm`).
      potential  weight * (gamma * phi(s') * (not terminated) - phi(s)). Over an episode it telescopes to
                 -weight * phi(s_0), whatever the agent does: the optimal policy is that of the sparse reward.
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
        return weight * (gamma * next_scores * (1.0 - 1.0 * terminated) - scores)
    raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")


# --------------------------------------------------------------------------------------------------------------------
# Training (Eq. 3)
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Labelled rows of many trajectories, in the form that the reward model reads (`RPRM` or `VLM`)."""

    instructions: list  # n strings
    images: (
        torch.Tensor
    )  # what `encode_images` gives: patch embeddings (n, P, d) float16, or frames; on the CPU
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
    """The rows of `labelled` trajectories that carry a label -> Examples."""
    from simulator.sentences import sentence_in  # late: LIBERO takes seconds to import

    instructions, parts = [], []
    for number, (trajectory, result) in enumerate(trajectories):
        rows = np.flatnonzero(result.labels != IGNORED)
        if not result.usable or not len(rows):
            continue
        instructions += [sentence_in(suite, trajectory["instruction"])] * len(rows)
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
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
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
            drawn = torch.multinomial(weights, steps * batch_size, True, generator=generator)
            for rows in drawn.split(batch_size):
                hidden = torch.rand(batch_size, generator=generator) < action_dropout  # shown without action
                for group in optimiser.param_groups:  # linear decay to zero
                    group["lr"] = lr * (1 - bar.n / bar.total)
                optimiser.zero_grad(set_to_none=True)
                total = 0.0
                for part in torch.arange(batch_size).split(micro_batch_size or batch_size):
                    loss = answer_loss(reward_model, train.select(rows[part]), hidden[part], whole_vocabulary)
                    loss = loss * len(part) / batch_size  # Eq. 3, this micro-batch's share of it
                    loss.backward()
                    total += loss.item()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                bar.update()
            history.append({"epoch": epoch, "train_loss": total, **measure(reward_model, held_out)})
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
# Commands
# --------------------------------------------------------------------------------------------------------------------


def read_trajectories(path, limit=None, success=True, skip=0):
    """Demonstrations or recorded rollouts of a file, or of all files in a directory, as dicts: `demos.read_demos` plus
    `frames` (its `agentview`) and `success` as given."""
    refused, used = Refused(), 0
    for file in demo_files(path):
        demos = read_demos(file, refused=refused)
        for demo in itertools.islice(demos, skip, None if limit is None else skip + limit):
            if demo["ee_pos"] is None:
                refused.add(
                    f"{file} {demo['name']}", "neither obs/ee_pos nor obs/ee_states, which labels need"
                )
                continue
            used += 1
            more = {"frames": demo["agentview"], "success": success}
            yield {**demo, **more, "name": f"{Path(file).stem}_{demo['name']}"}
    if refused.reasons:
        refused.report(used)


def label(trajectory, rule):
    """`label_trajectory` for a dict of `read_trajectories`."""
    arrays = (trajectory[key] for key in ("actions", "ee_pos", "gripper_states", "action_repeat"))
    return label_trajectory(*arrays, rule, success=trajectory["success"], disturbed=trajectory["disturbed"])


def plot(directory, trajectory, result, scores=None):
    from support.trajectory_plot import plot_trajectory  # late: matplotlib takes a second to import

    path = directory / f"{safe_name(trajectory['name'])}.png"
    plot_trajectory(path, trajectory["frames"], result, trajectory["name"], scores)


def labelled(args, summary, successes=None, failures=None):
    """Yield (trajectory, `Labels`) of --demos, and of the other two where given. Counts into `summary`."""
    demos = (args.demos, args.limit, args.skip, True)
    for path, limit, skip, success in (demos, (successes, None, 0, True), (failures, None, 0, False)):
        for trajectory in read_trajectories(path, limit, success, skip) if path else ():
            result = label(trajectory, args)
            summary.add(result)
            yield trajectory, result


def run_label(args):
    summary = LabelSummary()
    for trajectory, result in labelled(args, summary):
        if args.plot:
            plot(args.plot, trajectory, result)
    print(summary)


def deciding(model, suite, temperature, seed):
    """The policy of an OpenVLA for `simulator.recording`: (frames, instruction) -> action tokens and actions (n, 7)."""
    generator, unnorm_key = torch.Generator().manual_seed(seed), model.unnorm_key_for(suite)

    def decide(frames, instruction):
        input_ids, attention_mask = model.tokenize([instruction] * len(frames))
        how = dict(temperature=temperature, generator=generator, patch_embeddings=embed_frames(model, frames))
        tokens = model.generate_actions(input_ids, None, attention_mask, **how).tokens
        return tokens.cpu(), model.decode_actions(tokens, unnorm_key)

    return decide


def run_record(args):
    from simulator.recording import runs_by_task  # late: LIBERO takes seconds to import
    from simulator.suites import check_task_ids

    task_ids = check_task_ids(args.suite, args.task_ids)
    model = OpenVLA.from_pretrained(args.policy, device=args.device)
    if there := [args.out / kind for kind in ("success", "failure") if any((args.out / kind).glob("*.hdf5"))]:
        raise UserError(f"{there[0]} already holds recordings: choose another --out")
    decide, won, total = deciding(model, args.suite, args.temperature, args.seed), 0, 0
    how = (args.episodes_per_task, model.action_repeat, args.seed, decide)
    for sim, _, runs in runs_by_task(args.suite, task_ids, *how):
        write_runs(args.out, sim, runs, model.action_repeat)
        won, total = won + sum(run["success"] for run in runs), total + len(runs)
    print(f"{won} successes and {total - won} failures in {args.out}")


def write_runs(directory, sim, runs, action_repeat):
    """Write runs in LIBERO's layout: <directory>/success and <directory>/failure, in each one file a task."""
    from simulator.recording import as_demonstration

    for kind, success in (("success", True), ("failure", False)):
        if found := [as_demonstration(run) for run in runs if run["success"] == success]:
            path = demo_path(directory, kind, sim.name)  # not the instruction: tasks of libero_90 share those
            write_demos(path, found, action_repeat, sim.instruction, suite=sim.suite, task_id=sim.task_id)


def run_train(args):
    torch.manual_seed(args.seed)  # of an adapter's first weights
    adapter = args.lora_rank is not None or args.vlm is not None
    dtype = torch.bfloat16 if adapter and args.device == "cuda" else torch.float32  # of frozen weights
    if args.vlm:
        policy = OpenVLA.from_pretrained(args.policy)
        statistics = policy.action_statistics(policy.unnorm_key_for(args.suite))
        reward_model = VLM.from_pretrained(args.vlm, dtype, args.device)
        reward_model.add_adapter(args.vlm, statistics, args.lora_rank or 16)
    else:
        reward_model = RPRM(OpenVLA.from_pretrained(args.policy, dtype, args.device), {})
        if adapter:
            reward_model.add_adapter(args.policy, args.lora_rank)

    summary = LabelSummary()
    trajectories = labelled(args, summary, args.successes, args.failures)
    bar = progress_bar(trajectories, desc="label and embed", unit="trajectory")
    examples = make_examples(reward_model, bar, args.suite, summary)
    print(summary)
    held_out = split(examples, args.held_out, args.seed)
    names = ("epochs", "batch_size", "lr", "patience", "action_dropout", "whole_vocabulary", "seed")
    options = {name: getattr(args, name) for name in names}
    best, history = fit(
        reward_model, examples.select(~held_out), examples.select(held_out), **options,
        micro_batch_size=args.micro_batch_size or (4 if adapter else None),
    )  # fmt: skip
    # A keyframe is where the hand stops, so a small command alone gives some labels away. More than that has to be seen.
    moves = reward_model.decode_actions(examples.actions[held_out], args.suite)[:, :3]
    shortcut = auroc(-np.linalg.norm(moves, axis=1), examples.labels[held_out].numpy())
    best = {**best, "auroc_small_command": shortcut}
    info = {
        "label_rule": {f.name: getattr(args, f.name) for f in dataclasses.fields(LabelRule)}, "labels": str(summary), "suite": args.suite, "policy": str(args.policy),
        "data": {name: str(getattr(args, name)) for name in ("demos", "successes", "failures") if getattr(args, name)},
        "train_rows": int((~held_out).sum()), "training": options, "held_out": best, "history": history,
    }  # fmt: skip
    reward_model.save(args.out, without_nan(info))
    print(
        f"held out ({best['rows']} rows, epoch {best['epoch']}): {in_words(best)}\nfor comparison, AUROC of the "
        f"image without the action {best['auroc_state_only']:.3f}, of a small command alone {shortcut:.3f}\n"
        f"saved {args.out}"
    )


def run_score(args):
    from simulator.sentences import sentence_in  # late, as above

    if (args.rprm is None) == (args.vlm is None):
        raise UserError("give one of --rprm and --vlm")
    summary, records = LabelSummary(), []
    reward_model = read_reward_model(args.vlm or args.rprm, device=args.device)
    for trajectory, result in progress_bar(labelled(args, summary), desc="score", unit="trajectory"):
        actions = reward_model.encode_actions(policy_convention(trajectory["actions"]), args.suite)
        instructions = [sentence_in(args.suite, trajectory["instruction"])] * len(trajectory["frames"])
        scores = reward_model.score_frames(trajectory["frames"], instructions, actions)
        labels = result.labels if result.usable else np.full_like(result.labels, IGNORED)
        records.append({"name": trajectory["name"], "labels": labels.tolist(), "scores": scores.tolist()})
        if args.plot:
            plot(args.plot, trajectory, result, scores)
    if not records:
        raise UserError(f"{args.demos}: no trajectory after the first {args.skip} of each file: lower --skip")
    scores, labels = (np.concatenate([r[key] for r in records]) for key in ("scores", "labels"))
    scores, labels = scores[labels != IGNORED], labels[labels != IGNORED] == POSITIVE
    print(summary)
    print(f"against the pseudo labels ({len(labels)} rows): {in_words(binary_metrics(scores, labels))}")
    if args.json:
        atomic_write(args.json, json.dumps(records))


@main_guard
def main(command, args):
    run = {"label": run_label, "record": run_record, "train": run_train, "score": run_score}[command]
    if "policy" in vars(args):
        args.policy = args.policy or f"checkpoints/{args.suite}/policy"
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    with explain_out_of_memory("use --device cpu, or a lower --batch-size or --micro-batch-size for train"):
        run(args)


if __name__ == "__main__":
    main(command, args)
