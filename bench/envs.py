"""How fast the environments are, beside the stock ones.

    python -m bench envs
    python -m bench envs --suite libero_spatial --out runs/bench-envs-spatial.json

Four ways to run the same task: the stock environment with its two default cameras, the stock environment with `agentview`
alone, ours with `exact` pictures and ours with `light` ones. Three rules keep it fair:

1. Each variant lives in a process of its own (bench/variants.py), so that memory is its own and no setting leaks from one
   to the other.
2. All are built first and then take turns, round by round, so that whatever else the machine does hits all of them.
3. One core each (software OpenGL draws in the calling thread), and rates are given per second of CPU time too: those
   hold on a busy machine.
"""

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from bench import variants
from bench.common import table
from bench.variants import VARIANTS
from envs import LiberoVecEnv
from simulator.suites import check_task_ids
from support import machine
from support.cli import flag
from support.errors import UserError


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_id: int = flag(0, "task of that suite", min=0)
    rounds: int = flag(2, "turns of each variant; every turn begins with a reset", min=1)
    seconds: float = flag(4.0, "seconds of control steps in each turn", min=0.1)
    workers: list[int] | None = flag(None, "numbers of workers to try", default="1 and one per core", min=1)
    envs_per_worker: int = flag(4, "environments per worker in that part", min=1)
    out: Path = flag(Path("runs/bench-envs.json"), "where the numbers go")


def receive(conn, kind):
    try:
        answer = conn.recv()
    except EOFError:
        raise UserError(f"the benchmark process of {kind!r} died; its last words are above") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def measure_workers(args, count):
    """Rates of `count` worker processes behind `LiberoVecEnv`, and where a step of all environments goes."""
    n = args.envs_per_worker * count
    envs = LiberoVecEnv(
        args.suite, n, [args.task_id], num_workers=count, progress=False, init_states="protocol"
    )
    envs.reset(seed=0)
    rng, steps = np.random.default_rng(0), 0
    spent = dict.fromkeys(("wall", "busiest", "physics", "render", "reset"), 0.0)
    for _ in range(3):  # warm
        envs.step(rng.uniform(-1, 1, (n, 7)))
    while spent["wall"] < args.seconds:
        envs.step(rng.uniform(-1, 1, (n, 7)))
        for name in spent:
            spent[name] += envs.timing[name]
        steps += 1
    memory = [psutil.Process(pid).memory_info().rss / 1e6 for pid in envs.worker_pids]
    envs.close()
    work = (spent["physics"] + spent["render"] + spent["reset"]) / count  # of an average worker
    return dict(
        workers=count,
        environments=n,
        steps_per_s=n * steps / spent["wall"],
        physics_ms=1e3 * spent["physics"] / (n * steps),
        render_ms=1e3 * spent["render"] / (n * steps),
        # Not physics, picture or reset: Python in the worker, waiting for the slowest worker, messages, main process.
        overhead_share=1.0 - work / spent["wall"],
        transport_share=1.0 - spent["busiest"] / spent["wall"],
        memory_per_worker=float(np.mean(memory)),
    )


def measure(args):
    check_task_ids(args.suite, [args.task_id])
    cores = machine.cores()
    counts = args.workers or sorted({1, cores})
    os.environ["LP_NUM_THREADS"] = "0"  # for the processes below: Mesa draws in the calling thread
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    context, children, results = multiprocessing.get_context("spawn"), {}, {}
    bar = tqdm(
        total=len(VARIANTS) * (1 + args.rounds) + len(counts), desc="building", unit="part", leave=False
    )
    try:
        for kind in VARIANTS:
            conn, theirs = context.Pipe()
            arguments = theirs, kind, args.suite, args.task_id
            process = context.Process(target=variants.serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            children[kind] = conn, process
        for kind, (conn, _) in children.items():
            results[kind] = {**receive(conn, kind), "turns": []}
            bar.update()
        for number in range(args.rounds):
            for kind, (conn, _) in children.items():
                bar.set_description(f"round {number + 1}: {kind}")
                conn.send(("turn", args.seconds, number))
                results[kind]["turns"].append(receive(conn, kind))
                bar.update()
        light = children["ours light"][0]
        extra = {}
        for name, question in (
            ("split", ("split", 60)),
            ("more_memory", ("more",)),
            ("renderer", ("renderer",)),
        ):
            light.send(question)
            extra[name] = receive(light, "ours light")
        for conn, process in children.values():
            conn.send(None)
            process.join()
        scaling = []
        for count in counts:
            bar.set_description(f"{count} workers")
            scaling.append(measure_workers(args, count))
            bar.update()
    finally:
        bar.close()
        for _, process in children.values():
            process.kill()
    for result in results.values():
        turns = result["turns"]
        total = {name: sum(turn[name] for turn in turns) for name in turns[0]}
        result["steps_per_s"] = total["steps"] / total["wall"]
        result["steps_per_cpu_s"] = total["steps"] / total["cpu"]
        result["resets_per_s"] = len(turns) / total["reset_wall"]
        result["resets_per_cpu_s"] = len(turns) / total["reset_cpu"]
    return dict(
        suite=args.suite, task_id=args.task_id, cores=cores, variants=results, workers=scaling, **extra
    )


def show(r):
    print(f"\n{r['suite']} task {r['task_id']}, {r['renderer']}, {r['machine']['cpu']}, one core each")
    base, rows = r["variants"]["stock agentview"], []
    for kind, label in VARIANTS.items():
        v = r["variants"][kind]
        steps, resets = (v[name] / base[name] for name in ("steps_per_cpu_s", "resets_per_cpu_s"))
        row = (label, v["steps_per_s"], v["steps_per_cpu_s"], steps, v["resets_per_s"], resets)
        rows.append((*row, v["build"], v["memory"]))
    columns = [
        "",
        "steps/s:.1f",
        "per CPU s:.1f",
        "ratio:.1f",
        "resets/s:.2f",
        "ratio:.1f",
        "build s:.1f",
        "MB:.0f",
    ]
    table(columns, rows)
    print(
        "ratio: to stock with agentview alone, per CPU second. A reset goes up to the first policy step: reset,\n"
        "initial state, ten no-ops. MB: of the process, beyond its imports; ours: "
        + ", ".join(f"{name} {mb:+.0f}" for name, mb in r["more_memory"].items())
    )
    split, total = r["split"], sum(r["split"].values())
    parts = (f"{name} {ms:.2f} ({100 * ms / total:.0f} %)" for name, ms in split.items())
    print(f"\none light control step: {total:.1f} ms = {' + '.join(parts)}")
    columns = ["workers:d", "environments:d", "steps/s:.1f", "physics ms:.2f", "render ms:.2f"]
    columns += ["overhead:.1%", "transport:.1%", "MB/worker:.0f"]
    names = ("workers", "environments", "steps_per_s", "physics_ms", "render_ms")
    names += ("overhead_share", "transport_share", "memory_per_worker")
    table(columns, [[w[name] for name in names] for w in r["workers"]])
    print(
        "overhead: share of the wall time in which a worker neither simulates nor renders (Python, waiting for the\n"
        "slowest worker, messages, main process); transport: messages and main process alone"
    )
