"""Supervised fine-tuning: from demonstrations to the imitation policy that reinforcement learning starts from.

OpenVLA learns to act as a language model learns to write: each of the 7 action dimensions is one token, and the loss is the
cross entropy of the demonstrated tokens given image, instruction and the tokens before them (teacher forcing). Here:

* `dataset_statistics` gives the 1st and 99th percentile of every action dimension; between them an action is mapped to
  [-1, 1] and cut into 256 bins. The statistics are saved with the weights, because decoding needs the same numbers.
* Neighbouring bins mean nearly the same motion. The tiny model, which starts from random weights, is told so: the target of
  a continuous dimension is a narrow Gaussian over bins (`--label-sigma`), which is plain cross entropy at 0.
* Images are augmented as in official training: a random crop of 90 % of the area, and colour jitter.
* The saved weights are an exponential moving average over the training steps, which acts better in closed loop.

Held-out loss and action accuracy are measured on whole demonstrations that were left out.

    python sft.py --suite libero_object --data data --out checkpoints/libero_object/policy
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from tqdm import tqdm

import demos
from support.cli import parse_args
from support.errors import main_guard, UserError
from support.files import atomic_write
from support.machine import seed_everything
from support.quiet import progress_bar
from policy import OpenVLA, build_tiny, crop_and_normalize, explain_out_of_memory, resize_frames


@dataclass
class Args:
    suite: str = field(default="libero_object", metadata={"help": "suite name; also the key of the action statistics"})
    data: str = field(default="data", metadata={"help": "directory with <suite>/<task>_demo.hdf5 (see demos.py)"})
    out: str = field(default="runs/sft", metadata={"help": "directory of the checkpoint to write"})
    init: Optional[str] = field(
        default=None, metadata={"help": "checkpoint directory to start from", "default": "openvla-tiny, random weights"}
    )
    max_demos: int = field(default=0, metadata={"help": "use only so many demonstrations per task; 0 = all", "min": 0})
    steps: int = field(default=8000, metadata={"help": "optimiser steps", "min": 1})
    batch_size: int = field(default=32, metadata={"help": "frames per optimiser step", "min": 1})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate (AdamW); cosine decay to 2 %", "min": 0})
    warmup: int = field(default=200, metadata={"help": "steps of linear learning-rate warm-up", "min": 1})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of the matrices", "min": 0})
    label_sigma: float = field(
        default=8.0,
        metadata={"help": "width, in bins, of the soft targets of continuous dimensions; 0 = one-hot", "min": 0},
    )
    jitter: float = field(default=0.2, metadata={"help": "colour jitter; 1 = OpenVLA's training recipe", "min": 0})
    ema: float = field(
        default=0.998, metadata={"help": "decay per step of the averaged weights that are saved", "max": 1}
    )
    held_out: float = field(
        default=0.05, metadata={"help": "share of demonstrations kept for measuring", "min": 0, "max": 0.9}
    )
    eval_every: int = field(default=1000, metadata={"help": "steps between measurements and checkpoints", "min": 1})
    threads: int = field(default=0, metadata={"help": "torch threads; 0 = torch's choice", "min": 0})
    seed: int = field(
        default=0,
        metadata={"help": "seed of initial weights, split, order and augmentation", "min": 0, "max": 2**32 - 1},
    )


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def to_policy_convention(actions):
    """LIBERO file actions (T, 7) -> OpenVLA's: gripper -1 = open, +1 = close becomes 1 = open, 0 = close."""
    actions = np.array(actions, np.float64)
    actions[:, 6] = (actions[:, 6] < 0).astype(np.float64)
    return actions


def group_actions(actions, repeat):
    """Actions of `repeat` consecutive control steps as one decision: deltas averaged, the gripper's last command.

    actions (T, 7), one row per control step -> (T - repeat + 1, 7), one row per possible starting step. This is how an official
    demonstration (20 Hz) trains a policy that acts every `repeat` steps; a delta command held for k steps is their mean.
    """
    if repeat == 1 or len(actions) < repeat:
        return actions if repeat == 1 else actions[:0]
    windows = np.lib.stride_tricks.sliding_window_view(actions, repeat, axis=0)  # (T - k + 1, 7, k)
    return np.concatenate([windows[:, :6].mean(-1), windows[:, 6:, -1]], axis=1)


def dataset_statistics(actions, num_trajectories):
    """OpenVLA's `norm_stats` entry: per-dimension statistics; the gripper (last) is not normalised."""
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
    """Every frame of the demonstrations in memory, already through the JPEG and resize of the policy's preprocessing.

    images (F, 3, S, S) uint8; actions (F, 7) policy convention; instruction index (F,); demo index (F,).
    """

    def __init__(self, path, image_size, action_repeat, max_demos=0):
        images, actions, instruction, demo_index, self.instructions = [], [], [], [], []
        files = demos.demo_files(path)
        count = 0
        for file in progress_bar(files, desc="loading demonstrations", unit="file"):
            for k, demo in enumerate(demos.read_demos(file)):
                if max_demos and k >= max_demos:
                    break
                if action_repeat % demo["action_repeat"]:
                    raise UserError(
                        f"{file} was recorded with {demo['action_repeat']} control steps per row, the model acts every "
                        f"{action_repeat}: record again with `demos.py --action-repeat {action_repeat}`"
                    )
                a = group_actions(to_policy_convention(demo["actions"]), action_repeat // demo["action_repeat"])
                if len(a) == 0 or not np.isfinite(a).all():
                    raise UserError(f"{file} {demo['name']}: too short or not finite; remove that demonstration")
                if demo["instruction"] not in self.instructions:
                    self.instructions.append(demo["instruction"])
                images.append(resize_frames(demo["agentview"][: len(a)], image_size).numpy())
                actions.append(a)
                instruction += [self.instructions.index(demo["instruction"])] * len(a)
                demo_index += [count] * len(a)
                count += 1
        self.images = torch.from_numpy(np.concatenate(images))
        self.actions = np.concatenate(actions)
        self.instruction = torch.tensor(instruction)
        self.demo = torch.tensor(demo_index)
        self.num_demos = count

    def split(self, held_out, generator):
        """Frame indices (train, held out), whole demonstrations on either side."""
        order = torch.randperm(self.num_demos, generator=generator)
        held = torch.zeros(self.num_demos, dtype=torch.bool)
        held[order[: round(held_out * self.num_demos)]] = True
        return (~held[self.demo]).nonzero()[:, 0], held[self.demo].nonzero()[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------------------


def action_loss(logits, bins, sigma, soft_dims):
    """Cross entropy of the action tokens, with Gaussian targets over neighbouring bins where that makes sense.

    logits (B, 7, 256) float32; bins (B, 7) int64, the demonstrated bin; sigma: width in bins (0 = one-hot);
    soft_dims (7,) bool: continuous dimensions with a range (not the gripper, not a dimension that never moves).
    Returns (B, 7) nats.
    """
    log_p = logits.log_softmax(-1)
    hard = -log_p.gather(-1, bins[..., None])[..., 0]
    if sigma == 0 or not soft_dims.any():
        return hard
    distance = torch.arange(logits.shape[-1], device=logits.device) - bins[..., None]
    target = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)
    return torch.where(soft_dims, -(target * log_p).sum(-1), hard)


@torch.no_grad()
def measure(model, data, index, input_ids, mask, tokens, sigma, soft_dims, batch_size=256):
    """Held-out loss and accuracy (exact bin; within 5 bins, i.e. 2 % of the range; gripper), centre crop, no jitter."""
    sums, n = torch.zeros(4), 0
    for rows in index.split(batch_size):
        pixels = crop_and_normalize(data.images[rows]).to(model.device)
        where = data.instruction[rows]
        target = tokens[rows]
        bins = model.action_tokenizer.token_to_bin(target)
        logits = model.action_logits(input_ids[where], mask[where], target, pixel_values=pixels)
        loss = action_loss(logits, bins, sigma, soft_dims)
        off = (logits.argmax(-1) - bins).abs()
        sums += torch.stack(
            [
                loss.mean(1).sum(),
                (off == 0).float().mean(1).sum(),
                (off <= 5).float().mean(1).sum(),
                (off[:, 6] == 0).float().sum(),
            ]
        ).cpu()
        n += len(rows)
    names = ("loss", "accuracy", "accuracy_within_5_bins", "gripper_accuracy")
    return {k: float(v) / max(n, 1) for k, v in zip(names, sums, strict=True)}


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args, model, data, out):
    generator = torch.Generator().manual_seed(args.seed)
    train_index, held_index = data.split(args.held_out, generator)
    model.norm_stats[args.suite] = dataset_statistics(data.actions, data.num_demos)
    tokens = torch.from_numpy(np.asarray(model.encode_actions(data.actions, args.suite))).to(model.device)
    spread = np.ptp(data.actions, axis=0)
    soft_dims = torch.tensor([bool(s > 1e-6) for s in spread[:6]] + [False], device=model.device)
    input_ids, mask = model.tokenize(data.instructions)

    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    log = []
    print(
        f"sft: {len(train_index)} frames of {data.num_demos} demonstrations, {len(data.instructions)} instructions, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.steps} steps of {args.batch_size}"
    )

    def save(step):
        """Measure and save the averaged weights, then put the training weights back."""
        current = {k: v.detach().clone() for k, v in model.named_parameters()}
        with torch.no_grad():
            for k, v in model.named_parameters():
                v.copy_(average[k])
        metrics = measure(model, data, held_index, input_ids, mask, tokens, args.label_sigma, soft_dims)
        model.save_pretrained(out)
        with torch.no_grad():
            for k, v in model.named_parameters():
                v.copy_(current[k])
        log.append(
            {
                "step": step,
                "samples": step * args.batch_size,
                "seconds": round(time.time() - start, 1),
                "train_loss": running,
                **{f"held_out_{k}": round(v, 4) for k, v in metrics.items()},
            }
        )
        atomic_write(out / "sft_log.json", json.dumps({"args": vars(args), "log": log}, indent=1))
        tqdm.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in log[-1].items()))

    running, start = float("nan"), time.time()
    bar = progress_bar(range(1, args.steps + 1), desc="sft", unit="step")
    for step in bar:
        scale = min(1.0, step / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        rows = train_index[torch.randint(len(train_index), (args.batch_size,), generator=generator)]
        pixels = crop_and_normalize(data.images[rows], crop="random", jitter=args.jitter, generator=generator)
        where, target = data.instruction[rows], tokens[rows]
        logits = model.action_logits(input_ids[where], mask[where], target, pixel_values=pixels.to(model.device))
        loss = action_loss(logits, model.action_tokenizer.token_to_bin(target), args.label_sigma, soft_dims).mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {step}: lower --lr; the last checkpoint in {out} is intact"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        d = min(args.ema, (1 + step) / (10 + step))  # a short memory at first, when the weights still move fast
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - d)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        if step % args.eval_every == 0 or step == args.steps:
            save(step)


@main_guard
def main():
    args = parse_args(Args, "Supervised fine-tuning of OpenVLA on demonstrations (imitation learning).")
    if args.threads:
        torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OpenVLA.from_pretrained(args.init, device=device) if args.init else build_tiny(args.seed, device=device)
    source = Path(args.data) / args.suite
    data = Dataset(source if source.is_dir() else args.data, model.image_size, model.action_repeat, args.max_demos)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc
    with explain_out_of_memory("lower --batch-size"):
        train(args, model, data, out)
    print(f"saved {out}; evaluate it with: python eval.py --suite {args.suite} --checkpoint {out}")


if __name__ == "__main__":
    main()
