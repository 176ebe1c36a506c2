"""Training for an hour while its simulator processes are killed and stopped at random: is every decision counted once?

    python -m bench soak --minutes 60

The training is train.py's own, with counters (bench/audit.py). Here is the hand that kills.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from bench.common import ROOT, training_flags
from support.cli import flag
from support.errors import UserError


@dataclass
class Args:
    minutes: float = flag(60.0, "time from the first finished iteration on", min=0.1)
    kill_every: float = flag(45.0, "mean seconds between faults; also at most one per iteration", min=1)
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: list[int] = flag([0, 1], "tasks", min=0)
    num_envs: int = flag(4, "environments", min=1, max=1000)
    num_workers: int = flag(2, "simulator processes", min=1)
    num_steps: int = flag(8, "decisions per environment and iteration", min=1)
    seed: int = flag(0, "seed of the run and of the faults", min=0, max=2**32 - 1)
    out: Path = flag(Path("runs/bench-soak.json"), "where the numbers go")


def start_training(args, folder):
    """The audited training as a process: (process, its report's path, its stderr's path)."""
    flags = training_flags(
        suite=args.suite,
        task_ids=",".join(map(str, args.task_ids)),
        num_envs=args.num_envs,
        num_workers=args.num_workers,
        num_steps=args.num_steps,
        seed=args.seed,
        out=folder / "run",
        total_steps=10**9,
        max_episode_steps=80,
        critic_warmup=1,
        video_every=5,
    )
    report, errors = folder / "audit.json", folder / "stderr.txt"
    command = [sys.executable, "-m", "bench.audit", str(report), *flags]
    with open(errors, "w") as stderr:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr), report, errors


def measure(args):
    rng, folder = np.random.default_rng(args.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    run, report, errors = start_training(args, folder)
    faults, samples, seen, began, done_at_fault = dict(SIGKILL=0, SIGSTOP=0), [], set(), None, 0
    bar = tqdm(total=round(60 * args.minutes), desc="soak", unit="s")
    try:
        main = psutil.Process(run.pid)
        while began is None or time.time() - began < 60 * args.minutes:
            time.sleep(1.0)
            if run.poll() is not None:
                last = (errors.read_text().strip().splitlines() or ["nothing on stderr"])[-1]
                raise UserError(f"training ended by itself with code {run.returncode}: {last}")
            if not report.exists():
                continue
            audit = json.loads(report.read_text())
            workers = {}  # process -> (MB, when it started)
            for pid in audit["workers"]:
                with contextlib.suppress(psutil.Error):  # some may be dying
                    p = psutil.Process(pid)
                    workers[p] = p.memory_info().rss / 1e6, p.create_time()
            if began is None:
                began, next_fault = time.time(), time.time() + rng.exponential(args.kill_every)
            seen |= set(workers)
            memory = {
                p.pid: megabytes for p, (megabytes, start) in workers.items() if time.time() - start > 60
            }
            samples.append((time.time() - began, main.memory_info().rss / 1e6, memory))
            bar.update(round(time.time() - began) - bar.n)
            if time.time() > next_fault and audit["updates"] > done_at_fault and workers:
                how = "SIGKILL" if rng.random() < 0.5 else "SIGSTOP"
                with contextlib.suppress(psutil.Error):  # gone in the meantime
                    list(workers)[rng.integers(len(workers))].send_signal(getattr(signal, how))
                faults[how] += 1
                next_fault, done_at_fault = (
                    time.time() + rng.exponential(args.kill_every),
                    audit["updates"] + 1,
                )
        stopping = time.time()
        run.send_signal(signal.SIGTERM)
        code = run.wait(60)
        stopped = time.time() - stopping
        orphans = [p for p in psutil.wait_procs(seen, 10)[1] if p.status() != psutil.STATUS_ZOMBIE]
        lines = errors.read_text()
    finally:
        bar.close()
        if run.poll() is None:
            run.kill()
            run.wait()
        shutil.rmtree(folder, ignore_errors=True)
    growth_main, growth_workers = memory_growth(samples)
    return dict(
        minutes=args.minutes,
        updates=audit["updates"],
        decisions=audit["decisions"],
        stored=audit["stored"],
        lost=audit["lost"] + abs(audit["decisions"] - audit["stored"]),
        episodes=audit["ended"],
        cut=audit["cut"],
        faults=faults,
        restarts=len(re.findall("restarting it", lines)),
        exit_code=code,
        exit_seconds=stopped,
        orphans=len(orphans),
        memory_main=float(np.mean([m for _, m, _ in samples[-max(1, len(samples) // 5) :]])),
        growth_main=growth_main,
        growth_workers=growth_workers,
    )


def memory_growth(samples):
    """MB from the first to the last fifth of the time, of the main process and of the worker that grew most; None where
    there is nothing to compare."""
    fifth = max(1, len(samples) // 5)

    def growth(values):
        first, last = np.mean(values[:fifth] or [np.nan]), np.mean(values[-fifth:] or [np.nan])
        return None if np.isnan(last - first) else float(last - first)

    pids = {pid for *_, workers in samples for pid in workers}
    lives = [[workers[pid] for *_, workers in samples if pid in workers] for pid in pids]
    lasting = [growth(life) for life in lives if len(life) >= 2 * fifth]
    return growth([main for _, main, _ in samples]), max(lasting, default=None)


def show(r):
    def megabytes(x):
        return "too short a run to tell" if x is None else f"{x:+.0f} MB"

    print(
        f"\n{r['minutes']:g} minutes of training: {r['updates']} iterations, {r['decisions']:,} decisions, "
        f"{r['episodes']} episodes\n"
        f"faults           {r['faults']['SIGKILL']} workers killed, {r['faults']['SIGSTOP']} stopped; "
        f"{r['restarts']} restarts, {r['cut']} episodes truncated with them\n"
        f"lost transitions {r['lost']} ({r['stored']:,} stored)\n"
        f"memory           main process {r['memory_main']:.0f} MB, {megabytes(r['growth_main'])} from the first to "
        f"the last fifth; worker that grew most: {megabytes(r['growth_workers'])}\n"
        f"end              {r['exit_seconds']:.1f} s after SIGTERM, code {r['exit_code']}, {r['orphans']} orphans"
    )
    if r["minutes"] < 60:
        print("the full hour: python -m bench soak --minutes 60")
