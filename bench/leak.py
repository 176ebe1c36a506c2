"""Do the simulator processes grow? Resident memory over many short episodes.

python -m bench leak                              # 1,000 episodes of 20 control steps
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from bench.common import memory, table
from envs import LiberoVecEnv
from support.cli import flag

EVERY = 50  # ended episodes between two samples
SETTLED = 100  # ended episodes after which growth counts


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: list[int] | None = flag(None, "tasks", default="all of the suite", min=0)
    episodes: int = flag(1000, f"episodes in all, the first {SETTLED} to settle", min=110)
    max_steps: int = flag(20, "control steps of an episode: a leak is most likely at its ends", min=1)
    num_envs: int = flag(8, "environments", min=1, max=1000)
    num_workers: int | None = flag(None, "simulator processes", default="one per core", min=1)
    out: Path = flag(Path("runs/bench-leak.json"), "where the numbers go")


def measure(args):
    """MB of each worker and of the main process, whenever `EVERY` more episodes have ended."""
    envs = LiberoVecEnv(
        args.suite,
        args.num_envs,
        args.task_ids,
        action_repeat=4,
        max_steps=args.max_steps,
        num_workers=args.num_workers,
    )
    rng, ended, samples = np.random.default_rng(0), 0, []
    bar = tqdm(total=args.episodes, desc="playing", unit="episode", leave=False)
    try:
        processes = [psutil.Process(pid) for pid in envs.worker_pids]
        envs.reset(seed=0)
        while ended < args.episodes:
            _, _, terminated, truncated, _ = envs.step(rng.uniform(-1, 1, (args.num_envs, 7)))
            ended += int((terminated | truncated).sum())
            bar.update(min(ended, args.episodes) - bar.n)
            if ended >= EVERY * (len(samples) + 1) or ended >= args.episodes:
                samples.append((ended, [p.memory_info().rss / 1e6 for p in processes], memory()))
    finally:
        bar.close()
        envs.close()
    settled = next(s for s in samples if s[0] >= SETTLED)
    growth = [last / first - 1 for first, last in zip(settled[1], samples[-1][1], strict=True)]
    return dict(
        suite=args.suite,
        samples=samples,
        settled_at=settled[0],
        growth_workers=growth,
        growth_main=samples[-1][2] / settled[2] - 1,
    )


def show(r):
    print(f"\n{r['suite']}: resident memory in MB")
    rows = [
        (ended, "  ".join(f"{mb:.1f}" for mb in workers), main) for ended, workers, main in r["samples"][1::2]
    ]
    table(["episodes:d", "workers", "main process:.1f"], rows)
    print(
        f"from episode {r['settled_at']} to {r['samples'][-1][0]}: workers "
        f"{', '.join(f'{100 * g:+.2f} %' for g in r['growth_workers'])}; "
        f"main process {100 * r['growth_main']:+.2f} %"
    )
