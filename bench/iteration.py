"""Where an iteration of train.py goes: from a short run of it, and one update taken apart.

python -m bench iteration
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import ROOT, table, training_flags
from bench.update import rollout_buffer
from policy import ActorCritic, OpenVLA
from ppo import PPOConfig, ppo_update
from support.cli import flag
from support.errors import UserError


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: list[int] | None = flag(None, "tasks", default="all of the suite, as train.py", min=0)
    iterations: int = flag(
        4, "iterations that are measured, with policy updates, after one to warm up", min=1
    )
    num_envs: int = flag(16, "environments, as train.py's default for openvla-tiny", min=1)
    num_steps: int = flag(128, "decisions per environment and rollout, as there", min=1)
    epochs: int = flag(3, "passes over a rollout, as there", min=1)
    minibatch_size: int = flag(256, "decisions per optimiser step, as there", min=1)
    rounds: int = flag(3, "updates taken apart, after one to warm up", min=1)
    out: Path = flag(Path("runs/bench-iteration.json"), "where the numbers go")


def train(args, out):
    """Means of the time/... entries of metrics.jsonl over the measured iterations, in seconds."""
    flags = training_flags(
        suite=args.suite,
        **({} if args.task_ids is None else {"task_ids": ",".join(map(str, args.task_ids))}),
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        epochs=args.epochs,
        minibatch_size=args.minibatch_size,
        total_steps=args.num_envs * args.num_steps * (1 + args.iterations),
        critic_warmup=0,
        out=out,
    )
    run = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py failed: {run.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["iteration"] > 1]
    names = [name for name in lines[0] if name.startswith("time/")]
    seconds = {name.removeprefix("time/"): float(np.mean([line[name] for line in lines])) for name in names}
    decisions = args.num_envs * args.num_steps
    return {"whole": float(np.mean([decisions / line["charts/SPS"] for line in lines])), **seconds}


@contextlib.contextmanager
def timed(spent, **methods):
    """Add up the seconds in `methods`, {part: (owner, name of its method)}, while the context lasts."""
    originals = {part: getattr(owner, name) for part, (owner, name) in methods.items()}

    def wrapper(part):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return originals[part](*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        return call

    for part, (owner, name) in methods.items():
        setattr(owner, name, wrapper(part))
    try:
        yield
    finally:
        for part, (owner, name) in methods.items():
            setattr(owner, name, originals[part])


def take_update_apart(args):
    """Seconds of the parts of one PPO update of a rollout and mini-batches of the sizes given, and the operators that take most
    of it."""
    model = OpenVLA.from_pretrained(ROOT / "checkpoints" / args.suite / "policy")
    actor_critic = ActorCritic(model, targets="language")
    rollout = rollout_buffer(actor_critic, model, args.num_envs * args.num_steps, "patch_embeddings")
    policy, critic = (
        torch.optim.AdamW(parameters, lr=1e-6, eps=1e-5, weight_decay=0.0)
        for parameters in (actor_critic.policy_parameters(), actor_critic.critic_parameters())
    )
    config = PPOConfig(
        temperature=1.0,
        epochs=args.epochs,
        minibatch_size=args.minibatch_size,
        micro_batch_size=min(128, args.minibatch_size),  # train.py's default
    )

    def update():
        ppo_update(actor_critic, rollout, policy, critic, config, True, torch.Generator().manual_seed(0))

    update()  # warm
    spent, began = Counter(), time.perf_counter()
    parts = {
        "batch from storage": (rollout, "batch"),
        "policy, forward": (actor_critic, "evaluate_actions"),
        "critic, forward": (actor_critic, "value"),
        "backward": (torch.Tensor, "backward"),
        "clip gradients": (torch.nn.utils, "clip_grad_norm_"),
        "policy optimiser": (policy, "step"),
        "critic optimiser": (critic, "step"),
    }
    with timed(spent, **parts):
        for _ in range(args.rounds):
            update()
    whole = (time.perf_counter() - began) / args.rounds
    seconds = {part: spent[part] / args.rounds for part in parts}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        update()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    operators = [(e.key, e.count, e.self_cpu_time_total / total) for e in events[:12]]
    return dict(whole=whole, parts=seconds | {"rest": whole - sum(seconds.values())}, operators=operators)


def measure(args):
    with tempfile.TemporaryDirectory() as folder:
        iteration = train(args, Path(folder) / "run")
    return dict(iteration=iteration, update=take_update_apart(args))


def show(r):
    it, update = r["iteration"], r["update"]
    print(
        f"\nan iteration of train.py: {it['whole']:.2f} s (physics, render, reset: by the clock, summed over all environments)"
    )
    rows = [(part, seconds, seconds / it["whole"]) for part, seconds in it.items() if part != "whole"]
    table(["part", "s:.2f", "share:.0%"], rows)
    print(f"\nan update alone: {update['whole']:.2f} s")
    table(["part", "s:.2f", "share:.0%"], [(p, s, s / update["whole"]) for p, s in update["parts"].items()])
    print("\noperators by their own time")
    table(["operator", "calls:d", "share:.0%"], update["operators"])
