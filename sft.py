"""Imitation: from demonstrations to the policy that reinforcement learning starts from (supervised fine-tuning).

OpenVLA learns to act as a language model learns to write: each of the 7 action dimensions is one token, and the loss is the
cross entropy of the demonstrated tokens given image, instruction and the tokens before them (teacher forcing). Five things
around that loss:

* Statistics. The 1st and 99th percentile of each of the six motions bound what is mapped to [-1, 1]; the gripper stays 0 or
  1. All are put into 256 bins. They are saved with the weights, one entry per data set, because decoding needs the same numbers.
* Soft targets. Neighbouring bins mean nearly the same motion. The tiny model, which starts from random weights, is told so:
  the target of a translation is a narrow Gaussian over bins (`--label-sigma`); 0 is plain cross entropy. Rotations keep one-hot
  targets: nearly all are close to zero, a few turns set their range, and where zero lies at its end a Gaussian that is cut off
  there leans inwards. Sampled at each decision, that turned the hand by 90 degrees in a few seconds.
* A prefix as the policy will sample it. A token is predicted from those before it, and with soft targets these, too, are
  drawn from their targets, not taken from the demonstration. Otherwise the model learns from them what it should learn from the
  picture: the expert lifts with sideways motion of exactly zero, so that bin came to mean "lift"; a sampled action rarely
  hits it, and the policy held the bowl without lifting it.
* Augmentation, as in official training: a random crop of 90 % of the area, and colour jitter.
* An average. The saved weights are an exponential moving average over the steps, which acts better in closed loop.

Held-out loss and accuracy are measured on whole demonstrations that were left out. They do not tell how the policy acts;
`--eval-every` does, in the simulator.

    python sft.py --suite libero_object --data data --out runs/object/policy
    python sft.py --resume runs/object/policy              # go on exactly where a training was stopped

At 7B adapters are trained instead of the weights, with the official recipe, on one GPU or, by torchrun, several:

    python sft.py --init openvla/openvla-7b --lora-rank 32 --lr 5e-4 --label-sigma 0 --jitter 1 --ema 0 --batch-size 128 \
        --micro-batch-size 8 --gradient-checkpointing --merge --suite libero_goal --data official-files --out runs/goal-7b
"""

from dataclasses import dataclass

from support.cli import flag, parse_args


@dataclass
class Args:
    suite: str = flag("libero_object", "data sets, as in libero_object,libero_goal: keys of the statistics")
    data: str = flag("data", "directory with <suite>/<task>_demo.hdf5 (see demos.py)")
    out: str = flag("runs/sft", "directory of the checkpoint to write")
    resume: str | None = flag(None, "directory of a training to go on with, with its own settings")
    init: str | None = flag(None, "checkpoint to start from", default="openvla-tiny, random weights")
    max_demos: int = flag(0, "use only so many demonstrations of each file; 0 = all", min=0)
    steps: int = flag(8000, "optimiser steps", min=1)
    batch_size: int = flag(32, "frames per optimiser step, over all ranks", min=1)
    micro_batch_size: int | None = flag(None, "frames per backward pass (memory only)", min=1, default="all")
    lora_rank: int = flag(
        0, "train adapters of this rank on all linear layers; 0 = all weights", min=0, max=4096
    )
    lora_alpha: int = flag(16, "their scale is alpha / rank", min=1)
    merge: bool = flag(
        False, "with --lora-rank: write the merged policy too, which eval.py and train.py load"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    dtype: str = flag("auto", "of frozen weights", choices=("auto", "bfloat16", "float32"))
    lr: float = flag(1e-3, "peak learning rate (AdamW); cosine decay to 2 %", min=0)
    warmup: int = flag(200, "steps of linear learning-rate warm-up", min=1)
    weight_decay: float = flag(0.05, "AdamW weight decay of the matrices", min=0)
    label_sigma: float = flag(8.0, "width, in bins, of soft targets of translations; 0 = one-hot", min=0)
    jitter: float = flag(0.2, "colour jitter; 1 = OpenVLA's training recipe", min=0)
    ema: float = flag(0.998, "decay per step of the averaged weights that are saved", min=0, max=1)
    held_out: float = flag(0.05, "share of demonstrations kept for measuring", min=0, max=0.9)
    save_every: int = flag(1000, "steps between checkpoints, each with held-out loss", min=1)
    eval_every: int = flag(
        0, "steps between evaluations in the simulator, a multiple of --save-every; 0 = none", min=0
    )
    eval_episodes: int = flag(
        50, "episodes of each evaluation, spread over the tasks (fewer: over the first)", min=1
    )
    threads: int = flag(0, "torch threads; 0 = torch's choice", min=0)
    seed: int = flag(0, "seed of initial weights, split, order and augmentation", min=0, max=2**32 - 1)


if __name__ == "__main__":  # before the imports below, which take seconds: --help answers at once
    args = parse_args(Args, "Imitation: supervised fine-tuning of OpenVLA on demonstrations.")

import contextlib
import itertools
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from eval import NUM_INIT_STATES, evaluate
from models.checkpoints import resolve_checkpoint
from models.images import crop_and_normalize, resize_frames
from models.memory import choose_dtype
from policy import ActorCritic, OpenVLA, build_tiny, policy_convention
from simulator.render import default_render
from simulator.sentences import sentence_of
from simulator.suites import num_tasks
from support.demonstrations import Refused, demo_files, read_demos
from support.distributed import ALONE, ends_together, join
from support.errors import UserError, explain_out_of_memory, main_guard
from support.files import atomic_write
from support.machine import seed_everything
from support.quiet import progress_bar
from support.training import (
    StopRequest,
    load_state,
    make_directory,
    open_directory,
    save_state,
    write_log,
)

# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def group_actions(actions, repeat):
    """Actions of `repeat` consecutive control steps as one decision: deltas averaged, the gripper's last command.

    actions (T, 7), one row per control step -> (T - repeat + 1, 7), one row per possible first step. This is how an official
    demonstration (20 Hz) trains a policy that acts every `repeat` steps; a delta command held for k steps is their mean.
    """
    if repeat == 1:
        return actions
    if len(actions) < repeat:
        return actions[:0]
    windows = np.lib.stride_tricks.sliding_window_view(actions, repeat, axis=0)  # (T - k + 1, 7, k)
    return np.concatenate([windows[:, :6].mean(-1), windows[:, 6:, -1]], axis=1)


def dataset_statistics(actions, num_trajectories):
    """OpenVLA's `norm_stats` entry of actions (F, 7): per-dimension statistics; the gripper (last) is not normalised."""
    return {
        "action": {
            "mean": actions.mean(0).tolist(),
            "std": actions.std(0).tolist(),
            "min": actions.min(0).tolist(),
            "max": actions.max(0).tolist(),
            "q01": np.quantile(actions, 0.01, axis=0).tolist(),
            "q99": np.quantile(actions, 0.99, axis=0).tolist(),
            "mask": [True] * 6 + [False],
        },
        "num_transitions": len(actions),
        "num_trajectories": num_trajectories,
    }


class Dataset:
    """Every frame of some data sets in memory, already through the JPEG and resize of the policy's preprocessing.

    actions (F, 7) policy convention; per frame the index of its instruction, demonstration and data set (F,).
    """

    def __init__(self, sources, image_size, action_repeat, max_demos=0):
        """sources: {name of the data set: directory or file}."""
        self._images = []  # one (T, 3, S, S) uint8 per demonstration: joined, they would need the memory twice
        self.suites, self.instructions, actions, indices = list(sources), [], [], []
        files = [(suite, file) for suite, path in sources.items() for file in demo_files(path, action_repeat)]
        refused = Refused()
        for suite, file in progress_bar(files, desc="loading demonstrations", unit="file"):
            for demo in itertools.islice(read_demos(file, refused=refused), max_demos or None):
                a = policy_convention(demo["actions"])
                a = group_actions(a, action_repeat // demo["action_repeat"])  # (T, 7)
                if len(a) == 0:
                    refused.add(f"{file} {demo['name']}", "too short for one decision")
                    continue
                sentence = sentence_of(suite, file, demo["instruction"])
                if sentence not in self.instructions:
                    self.instructions.append(sentence)
                numbers = self.instructions.index(sentence), len(actions), self.suites.index(suite)
                indices += [(*numbers, t) for t in range(len(a))]
                self._images.append(resize_frames(demo["agentview"][: len(a)], image_size))
                actions.append(a)
        refused.report(len(actions))
        self.actions, self.num_demos = np.concatenate(actions), len(actions)
        self.instruction, self.demo, self.suite, self._frame = torch.tensor(indices).T

    def images(self, rows):
        """(B, 3, S, S) uint8 of frames `rows` (B,)."""
        where = zip(self.demo[rows].tolist(), self._frame[rows].tolist(), strict=True)
        return torch.stack([self._images[demo][t] for demo, t in where])

    def split(self, held_out, generator):
        """Frame indices (train, held out), whole demonstrations on either side."""
        order = torch.randperm(self.num_demos, generator=generator)
        held = torch.zeros(self.num_demos, dtype=torch.bool)
        held[order[: min(round(held_out * self.num_demos), self.num_demos - 1)]] = True
        return (~held[self.demo]).nonzero()[:, 0], held[self.demo].nonzero()[:, 0]

    def tokenize(self, model):
        """Targets of every frame: tokens (F, 7), and where they may be soft (F, 7) bool: translations that vary. Each data
        set by its own statistics, which the model keeps."""
        tokens = torch.empty(self.actions.shape, dtype=torch.long)
        soft = torch.zeros(self.actions.shape, dtype=torch.bool)
        for k, suite in enumerate(self.suites):
            rows = self.suite == k
            actions = self.actions[rows.numpy()]
            model.norm_stats[suite] = dataset_statistics(actions, len(self.demo[rows].unique()))
            tokens[rows] = torch.from_numpy(np.asarray(model.encode_actions(actions, suite)))
            soft[rows, :3] = torch.from_numpy(np.ptp(actions, axis=0) > 1e-6)[:3]
        return tokens, soft


# --------------------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------------------


def soft_targets(bins, sigma, num_bins=256):
    """Gaussians of width `sigma` bins around `bins` (...) int64, cut off at the ends: probabilities (..., num_bins) float32."""
    distance = torch.arange(num_bins, device=bins.device) - bins[..., None]
    return torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)


def action_loss(logits, bins, sigma, soft):
    """Cross entropy of the action tokens, with Gaussian targets over neighbouring bins where that makes sense.

    logits (B, 7, 256) float32; bins (B, 7) int64, the demonstrated bin; sigma: width in bins (0 = one-hot);
    soft (B, 7) or (7,) bool: where targets are soft. Returns (B, 7) nats.
    """
    log_p = logits.log_softmax(-1)
    hard = -log_p.gather(-1, bins[..., None])[..., 0]
    if sigma == 0 or not soft.any():
        return hard
    target = soft_targets(bins, sigma, logits.shape[-1])
    return torch.where(soft, -(target * log_p).sum(-1), hard)


def draw_prefix(bins, sigma, soft, generator):
    """Bins (B, 7) as a policy that has learnt the targets of `action_loss` samples them: what the next token then follows.

    bins (B, 7) int64, sigma and soft as above; generator: of the CPU, where bins are.
    """
    if sigma == 0 or not soft.any():
        return bins
    drawn = torch.multinomial(soft_targets(bins, sigma).flatten(0, -2), 1, generator=generator).view_as(bins)
    return torch.where(soft, drawn, bins)


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class Training:
    """What training changes: weights, their average, optimiser, generator, step and log. `state_dict` is all of it.

    weights: {name: parameter} of what is trained. Several ranks draw the same random numbers, and each computes its share
    of every mini-batch, so that the steps are those of a single process.
    """

    def __init__(self, args, model, weights, data, ranks=ALONE):
        self.args, self.model, self.weights, self.data, self.ranks = args, model, weights, data, ranks
        self.generator = torch.Generator().manual_seed(args.seed)
        self.train_rows, self.held_rows = data.split(args.held_out, self.generator)
        self.tokens, self.soft = data.tokenize(model)
        self.input_ids, self.mask = model.tokenize(data.instructions)
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        groups = (
            {"params": [p for p in weights.values() if p.ndim >= 2], "weight_decay": args.weight_decay},
            {"params": [p for p in weights.values() if p.ndim < 2], "weight_decay": 0.0},
        )
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
        self.step, self.seconds, self.running_loss, self.log = 0, 0.0, float("nan"), []

    def draw_prefixes(self, rows, generator):
        """Tokens (B, 7) that the tokens of frames `rows` are learnt behind."""
        bins = self.model.action_tokenizer.token_to_bin(self.tokens[rows])
        drawn = draw_prefix(bins, self.args.label_sigma, self.soft[rows], generator)
        return self.model.action_tokenizer.bin_to_token(drawn)

    def loss_and_logits(self, rows, prefixes, pixel_values):
        """Next-token prediction of frames `rows`: loss (B, 7) nats, logits (B, 7, 256), demonstrated bins (B, 7)."""
        device, prompt = self.model.device, self.data.instruction[rows]
        bins = self.model.action_tokenizer.token_to_bin(self.tokens[rows]).to(device)
        logits = self.model.action_logits(
            self.input_ids[prompt],
            self.mask[prompt],
            prefixes.to(device),
            pixel_values=pixel_values.to(device),
        )
        return action_loss(logits, bins, self.args.label_sigma, self.soft[rows].to(device)), logits, bins

    def train_step(self, step):
        """One optimiser step; steps count from 1."""
        args, self.step = self.args, step
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * (min(1.0, step / args.warmup) * cosine)

        # A mini-batch of frames, each seen through another crop and other colours.
        drawn = torch.randint(len(self.train_rows), (args.batch_size,), generator=self.generator)
        rows = self.train_rows[drawn]
        pixels = crop_and_normalize(self.data.images(rows), "random", args.jitter, self.generator)
        prefixes = self.draw_prefixes(rows, self.generator)

        # The loss is a mean over the mini-batch, its gradient the sum over micro-batches and ranks.
        self.optimizer.zero_grad(set_to_none=True)
        losses, own = [], torch.arange(args.batch_size)[self.ranks.rank :: self.ranks.size]
        for micro in own.split(args.micro_batch_size or args.batch_size):
            loss = self.loss_and_logits(rows[micro], prefixes[micro], pixels[micro])[0].mean() * (
                len(micro) / args.batch_size
            )
            loss.backward()
            losses.append(loss.detach())
        loss = self.ranks.sum_(torch.stack(losses).sum())
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {step}: lower --lr; the last checkpoint is intact"
            )
        self.ranks.sum_gradients_(self.weights.values())
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()

        # The average has a short memory at first, when the weights still move fast.
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        first, loss = math.isnan(self.running_loss), loss.item()
        self.running_loss = loss if first else 0.98 * self.running_loss + 0.02 * loss

    @contextlib.contextmanager
    def averaged_weights(self):
        """The model with the averaged weights, which are what is measured and saved."""
        now = {name: p.detach().clone() for name, p in self.weights.items()}
        try:
            self._assign(self.average)
            yield self.model
        finally:
            self._assign(now)

    @torch.no_grad()
    def _assign(self, tensors):
        for name, p in self.weights.items():
            p.copy_(tensors[name])

    @torch.no_grad()
    def measure(self):
        """Held-out loss and accuracy (exact bin; within 5 bins, 2 % of the range; gripper), centre crop, no jitter."""
        if not len(self.held_rows):
            return {}
        sums = torch.zeros(4)
        prefixes = self.draw_prefixes(self.held_rows, torch.Generator().manual_seed(0))  # the same every time
        own = torch.arange(len(self.held_rows))[self.ranks.rank :: self.ranks.size]
        for part in own.split(self.args.micro_batch_size or 256) if len(own) else ():
            rows = self.held_rows[part]
            pixels = crop_and_normalize(self.data.images(rows))
            loss, logits, bins = self.loss_and_logits(rows, prefixes[part], pixels)
            off = (logits.argmax(-1) - bins).abs()
            exact, near = (off == 0).float(), (off <= 5).float()
            sums += torch.stack((loss.mean(1), exact.mean(1), near.mean(1), exact[:, 6])).sum(1).cpu()
        names = ("loss", "accuracy", "accuracy_within_5_bins", "gripper_accuracy")
        means = (self.ranks.sum_(sums) / len(self.held_rows)).tolist()
        return {f"held_out_{name}": round(mean, 4) for name, mean in zip(names, means, strict=True)}

    _COUNTERS = ("step", "seconds", "running_loss", "log")

    def state_dict(self):
        return {
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "data": self._data_identity(),
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def load_state_dict(self, state):
        if state["data"] != self._data_identity():
            raise UserError("these are not the demonstrations that the training began with: put those back")
        self._assign(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        for name in self._COUNTERS:
            setattr(self, name, state[name])

    def _data_identity(self):
        return [self.data.num_demos, len(self.data.actions), float(self.data.actions.sum())]


def success_rate(args, model, ranks):
    """Success in closed loop on the first protocol states of every task, mean over the suites.

    These are states that eval.py plays, so that the numbers compare. That is fair as long as nothing is chosen by it: what
    is saved is always the last average. Sampled as reinforcement learning will, at the checkpoint's temperature.
    """
    rates = []
    for suite in args.suite.split(","):
        task_ids = list(range(min(num_tasks(suite), args.eval_episodes)))
        per_task = min(NUM_INIT_STATES, args.eval_episodes // len(task_ids))
        rates.append(
            evaluate(
                model, suite, task_ids, per_task, 16, render=default_render(),
                progress=ranks.is_main_process, ranks=ranks,
            ).success_rate
        )  # fmt: skip
    return float(np.mean(rates))


def prepare_model(args, device):
    """(OpenVLA, {name: parameter} of what is trained, function that writes the policy to a directory)."""
    if args.dtype == "bfloat16" and not args.lora_rank:
        raise UserError(
            "--dtype bfloat16 is for frozen weights: give --lora-rank too (an Adam step is below its rounding)"
        )
    if args.init:
        frozen = args.lora_rank > 0
        dtype = choose_dtype(args.dtype, resolve_checkpoint(args.init), device) if frozen else torch.float32
        model = OpenVLA.from_pretrained(args.init, dtype=dtype, device=device)
    else:
        model = build_tiny(args.seed, device=device)
    model.gradient_checkpointing = args.gradient_checkpointing
    if not args.lora_rank:
        return model, dict(model.named_parameters()), model.save_pretrained
    actor = ActorCritic(model, args.lora_rank, args.lora_alpha, "all", critic="none")

    def save(out):
        """The adapter in peft's format, and the statistics that its actions are read with; with --merge the whole policy."""
        actor.save_adapters(out / "adapters")
        if args.merge:
            actor.save_policy(out)
        atomic_write(out / "dataset_statistics.json", json.dumps(model.norm_stats, indent=1))

    return model, actor.policy.named_parameters(), save


@main_guard
@ends_together
def main(args):
    ranks = join()  # this process among those of torchrun; alone, each of its methods is the identity
    resumed = args.resume is not None
    args, out, state = open_directory(args)  # with --resume the settings are those of that training
    if args.batch_size < ranks.size:
        raise UserError(f"--batch-size {args.batch_size} leaves some of {ranks.size} ranks without a frame")
    if args.threads:
        torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    if args.lora_rank:
        remedy = "use --dtype bfloat16, or lower --lora-rank"
    else:
        remedy = "give --lora-rank 32, which trains adapters alone"
    with explain_out_of_memory(remedy):
        model, weights, save_policy = prepare_model(args, ranks.device)
    ranks.broadcast_(weights.values())
    suites = args.suite.split(",")
    for suite in suites if args.eval_every else ():
        num_tasks(suite)  # UserError, now and not hours later, where there is nothing to evaluate on
    sources = {suite: Path(args.data) / suite for suite in suites}
    if len(suites) == 1 and not sources[args.suite].is_dir():
        sources = {args.suite: args.data}
    data = Dataset(sources, model.image_size, model.action_repeat, args.max_demos)
    training = Training(args, model, weights, data, ranks)
    if resumed:
        load_state(training, state)
    ranks.print0(
        f"sft: {len(training.train_rows)} frames of {data.num_demos} demonstrations, {len(data.instructions)} "
        f"instructions, {sum(p.numel() for p in weights.values()) / 1e6:.2f} M trained parameters, {args.steps} steps of "
        f"{args.batch_size}" + (f"; resumed after step {training.step}" if resumed else "")
    )

    main_process, stop = ranks.is_main_process, StopRequest(ranks.print0)
    began = time.time() - training.seconds
    if main_process:
        make_directory(out)
        write_log(out, args, training.log)  # the settings, for --resume
        if not resumed:
            save_state(training.state_dict(), state)  # while it is there, the training is not done
    steps, shape = range(training.step + 1, args.steps + 1), dict(initial=training.step, total=args.steps)
    bar = progress_bar(steps, desc="sft", unit="step", disable=not main_process, **shape)
    with explain_out_of_memory("lower --micro-batch-size, or turn on --gradient-checkpointing"):
        for step in bar:
            training.train_step(step)
            training.seconds = time.time() - began
            if step % 20 == 0:
                bar.set_postfix(loss=f"{training.running_loss:.3f}", refresh=False)
            last, stopping = step == args.steps, ranks.any(stop.requested)
            due = last or step % args.save_every == 0

            # Now and then: how good is the average on what was left out, and in the simulator?
            if due:
                entry = dict(step=step, samples=step * args.batch_size, seconds=round(training.seconds, 1))
                entry["train_loss"] = training.running_loss
                with training.averaged_weights():
                    entry |= training.measure()
                    if args.eval_every and (last or step % args.eval_every == 0):
                        entry["success_rate"] = success_rate(args, model, ranks)
                    if main_process:
                        save_policy(out)
                training.log.append(entry)
                if main_process:
                    write_log(out, args, training.log)

            if main_process and (due or stopping):
                save_state(training.state_dict(), state)
            if stopping and not last:
                ranks.barrier()
                hint = (
                    f"stopped after step {step}; go on with: python sft.py --resume {shlex.quote(str(out))}"
                )
                ranks.print0(hint, file=sys.stderr)
                sys.exit(130)
    if main_process:
        state.unlink()
    if args.lora_rank and not args.merge:
        adapter = f"--adapter {out}/adapters/policy --base {args.init}"
        ranks.print0(f"saved {out}; make it a policy with: python -m models.merge {adapter} --out DIRECTORY")
    else:
        ranks.print0(f"saved {out}; evaluate it with: python eval.py --suite {suites[0]} --checkpoint {out}")


if __name__ == "__main__":
    main(args)
