"""Many ranks: train.py measured on 1, 2, 4 ... of this machine, and a simulation up to 64 GPUs from its parts.

    python -m bench scaling
    python -m bench scaling --no-measure --simulator-ms 12 --inference-ms 27 --inference-ms-per-env 21 \\
        --update-ms 63 --gradient-mb 882 --cores-per-gpu 16        # another machine, from numbers alone
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.common import ROOT, table, training_flags
from policy import ActorCritic, OpenVLA
from simulator.suites import instructions
from support import machine
from support.cli import flag
from support.errors import UserError


def _part(text, default="measured"):
    return flag(None, "simulation: " + text, default=default, min=0.0)


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_id: int = flag(0, "task of that suite", min=0)
    model: str = flag("openvla-tiny", "policy, as for train.py")
    ranks: list[int] | None = flag(
        None, "ranks to measure", default="1, 2, 4 ... up to the GPUs, else cores", min=1
    )
    envs: int = flag(4, "environments per rank or GPU", min=1)
    steps: int = flag(16, "decisions per environment and rollout", min=1)
    epochs: int = flag(1, "passes over each rollout", min=1)
    minibatch_size: int = flag(128, "decisions per optimiser step, over all ranks", min=1)
    iterations: int = flag(3, "iterations measured, after one to warm up", min=1)
    measure: bool = flag(True, "run train.py; without it, all parts below must be given")
    simulator_ms: float | None = _part("core-milliseconds of physics and picture per decision")
    inference_ms: float | None = _part("milliseconds of a decision, whatever the number of environments")
    inference_ms_per_env: float | None = _part("milliseconds of a decision that each environment adds")
    update_ms: float | None = _part("milliseconds of the update per decision and epoch")
    gradient_mb: float | None = _part("megabytes that an all-reduce sums", "of the model's adapters")
    cores_per_gpu: int | None = flag(None, "simulation: CPU cores per GPU", default="this machine's", min=1)
    bandwidth: float = flag(
        10.0, "simulation: gigabytes per second between neighbours in the all-reduce's ring", min=1e-3
    )
    latency_us: float = flag(10.0, "simulation: microseconds per hop of that ring", min=0.0)
    spread: float = flag(
        0.05, "simulation: standard deviation of a rank's rollout time, as a share of it", min=0.0
    )
    out: Path = flag(Path("runs/bench-scaling.json"), "where the numbers go")


PARTS = ("simulator_ms", "inference_ms", "inference_ms_per_env", "update_ms", "gradient_mb")


def train_run(args, model, ranks, out):
    """train.py on so many ranks: means over the measured iterations, in decisions per second and seconds."""
    flags = training_flags(
        suite=args.suite,
        task_ids=args.task_id,
        model=model,
        prm_mode="none",
        num_envs=ranks * args.envs,
        num_steps=args.steps,
        epochs=args.epochs,
        minibatch_size=args.minibatch_size,
        critic_warmup=0,
        total_steps=ranks * args.envs * args.steps * (1 + args.iterations),
        out=out,
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = subprocess.run(
        [sys.executable, *torchrun, "train.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(
            f"train.py on {ranks} ranks failed: {errors[0] if errors else run.stderr.strip()[-300:]}"
        )
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][1:]
    names = [name for name in lines[0] if name.startswith("time/")] + ["charts/SPS"]
    return {
        "ranks": ranks,
        **{name.split("/")[1]: float(np.mean([line[name] for line in lines])) for name in names},
    }


def inference_time(model_path, suite, envs):
    """Median milliseconds from pictures to tokens and values, for one environment and for `envs`; adapters in MB."""
    cuda = torch.cuda.is_available()
    model = OpenVLA.from_pretrained(
        model_path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu"
    )
    actor_critic = ActorCritic(model, targets="language" if "vision_configs" in model.config else "all")
    actor_critic.merge_for_rollout()
    instruction, times = instructions(suite)[0], {}
    for n in (1, envs):
        frames = np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), np.uint8)
        seconds = []
        for _ in range(12):
            began = time.perf_counter()
            ids, mask = model.tokenize([instruction] * n)
            tokens, _, _ = actor_critic.act(ids, mask, pixel_values=model.preprocess(frames).to(model.dtype))
            tokens.cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - began)
        times[n] = 1e3 * float(np.median(seconds[2:]))
    parameters = {*actor_critic.policy_parameters(), *actor_critic.critic_parameters()}
    return times[1], times[envs], sum(4 * p.numel() for p in parameters) / 1e6


def simulate_iteration(gpus, envs, parts, args, cores):
    """Seconds of each part of one iteration on `gpus` GPUs with `envs` environments each, and decisions per second.

    Rollouts end together: the expected slowest of G normal times is about sqrt(2 ln G) deviations late. The all-reduce is
    a ring: 2 (G - 1) / G of the bytes, 2 (G - 1) hops; one per mini-batch, of which train.py makes at most `steps` a pass.
    """
    M, batch = args.steps, args.steps * envs * gpus
    optimiser_steps = args.epochs * min(M, math.ceil(batch / args.minibatch_size))
    seconds = {
        "simulator": M * math.ceil(envs / cores) * parts["simulator_ms"] / 1e3,  # of the busiest worker
        "inference": M * (parts["inference_ms"] + envs * parts["inference_ms_per_env"]) / 1e3,
        "update": args.epochs * M * envs * parts["update_ms"] / 1e3,
    }
    rollout = seconds["simulator"] + seconds["inference"]
    seconds["slowest"] = args.spread * rollout * np.sqrt(2 * np.log(gpus))
    transfer, hops = 2 * (gpus - 1) / gpus * parts["gradient_mb"] / 1e3 / args.bandwidth, 2 * (gpus - 1)
    seconds["all-reduce"] = optimiser_steps * (transfer + hops * args.latency_us / 1e6)
    return {"gpus": gpus, "envs": envs, **seconds, "decisions_per_s": batch / sum(seconds.values())}


def balanced_envs(gpus, parts, args, cores, share=0.1):
    """Fewest environments per GPU at which what does not grow with them is at most `share` of the time; None beyond 1024."""
    for envs in range(1, 1025):
        s = simulate_iteration(gpus, envs, parts, args, cores)
        fixed = args.steps * parts["inference_ms"] / 1e3 + s["all-reduce"]
        if fixed <= share * args.steps * envs * gpus / s["decisions_per_s"]:
            return envs
    return None


def measure(args):
    parts = {name: getattr(args, name) for name in PARTS}
    missing = ["--" + name.replace("_", "-") for name, value in parts.items() if value is None]
    if missing and not args.measure:
        raise UserError(f"--no-measure needs all parts; missing: {', '.join(missing)}")
    gpus, machine_cores = torch.cuda.device_count(), machine.cores()
    places, kind = (gpus, "GPUs") if gpus else (machine_cores, "cores")
    cores = args.cores_per_gpu or max(1, machine_cores // max(1, gpus))
    measured = []
    if args.measure:
        counts = args.ranks or [2**k for k in range(places.bit_length()) if 2**k <= places]
        if max(counts) > places:
            raise UserError(f"--ranks {max(counts)}: this machine has {places} {kind}")
        with tempfile.TemporaryDirectory() as directory:
            for ranks in tqdm(counts, desc="train.py", unit="run", leave=False):
                measured.append(train_run(args, args.model, ranks, f"{directory}/{ranks}"))
        one = measured[0]
        decisions = args.steps * args.envs  # of a rank in an iteration
        tiny = ROOT / "checkpoints" / args.suite / "policy"
        path = str(tiny) if args.model == "openvla-tiny" else args.model
        first, all_of_them, megabytes = inference_time(path, args.suite, args.envs)
        per_env = max(0.0, (all_of_them - first) / max(1, args.envs - 1))
        found = dict(
            simulator_ms=1e3 * (one["physics"] + one["render"]) / decisions,
            inference_ms=max(0.0, first - per_env),
            inference_ms_per_env=per_env,
            update_ms=1e3 * one["update"] / (decisions * args.epochs),
            gradient_mb=megabytes,
        )
        parts = {name: found[name] if value is None else value for name, value in parts.items()}
    simulated = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        result = simulate_iteration(gpus, args.envs, parts, args, cores)
        simulated.append({**result, "balanced_envs": balanced_envs(gpus, parts, args, cores)})
    names = ("envs", "steps", "epochs", "minibatch_size", "bandwidth", "latency_us", "spread")
    settings = {name: getattr(args, name) for name in names}
    return dict(measured=measured, parts=parts, cores_per_gpu=cores, simulated=simulated, settings=settings)


def show(r):
    p, s = r["parts"], r["settings"]
    if r["measured"]:
        print(f"\nmeasured: train.py, {s['envs']} environments per rank, seconds per iteration")
        columns = [
            "ranks:d",
            "decisions/s:.1f",
            "ratio:.2f",
            "rollout:.2f",
            "inference:.2f",
            "slowest rank:.2f",
        ]
        first = r["measured"][0]["SPS"]
        rows = [
            (
                m["ranks"],
                m["SPS"],
                m["SPS"] / first,
                m["rollout"],
                m["inference"],
                m.get("slowest_rank"),
                m["update"],
            )
            for m in r["measured"]
        ]
        table([*columns, "update:.2f"], rows)
    print(
        f"\nsimulated from these parts: simulator {p['simulator_ms']:.1f} core-ms per decision on "
        f"{r['cores_per_gpu']} cores per GPU,\ninference {p['inference_ms']:.1f} + "
        f"{p['inference_ms_per_env']:.2f} per environment ms, update {p['update_ms']:.2f} ms per decision, all-reduce "
        f"of {p['gradient_mb']:.1f} MB\nat {s['bandwidth']:g} GB/s, {s['latency_us']:g} us per hop; {s['envs']} "
        f"environments per GPU, {s['steps']} decisions, {s['epochs']} epochs"
    )
    parts = ("simulator", "inference", "slowest", "update", "all-reduce")
    columns = ["GPUs:d", "decisions/s:.1f", "efficiency:.0%", *(f"{part}:.0%" for part in parts)]
    rows = []
    for x in r["simulated"]:
        total = sum(x[name] for name in parts)
        efficiency = x["decisions_per_s"] / (x["gpus"] * r["simulated"][0]["decisions_per_s"])
        shares = (x[name] / total for name in parts)
        balance = str(x["balanced_envs"] or "more than 1024")
        rows.append((x["gpus"], x["decisions_per_s"], efficiency, *shares, max(parts, key=x.get), balance))
    table([*columns, "most time in", "balance"], rows)
    one = r["simulated"][0]
    needed = s["steps"] * s["envs"] * p["simulator_ms"] / 1e3 / (one["inference"] + one["update"])
    print(
        "balance: the fewest environments per GPU at which what does not grow with them (launches, all-reduce) takes\n"
        f"at most 10 %. With {needed:.1f} cores per GPU, the simulator would take as long as inference and update together."
    )
