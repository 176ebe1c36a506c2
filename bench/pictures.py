"""Light pictures against exact ones: how alike, and how much faster.

python -m bench pictures                          # every task of four suites
python -m bench pictures --suites libero_90
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.common import table
from support.cli import flag

os.environ["LP_NUM_THREADS"] = (
    "0"  # Mesa draws in the calling thread; it reads this when the simulator is imported
)
from simulator.suites import check_task_ids  # noqa: E402
from simulator.task import TaskSim  # noqa: E402


@dataclass
class Args:
    suites: str = flag("libero_object,libero_spatial,libero_goal,libero_10", "LIBERO suites")
    task_ids: list[int] | None = flag(None, "tasks of each", default="all", min=0)
    repeats: int = flag(5, "pictures timed of each kind", min=1)
    out: Path = flag(Path("runs/bench-pictures.json"), "where the numbers go")


def psnr(a, b):
    """Peak signal-to-noise ratio of two uint8 pictures, in dB."""
    return float(10 * np.log10(255.0**2 / np.square(a.astype(float) - b).mean()))


def measure(args):
    """First frame of initial state 0 of each task, light and exact: PSNR, and CPU time while the arm moves."""
    wanted = [
        (suite, task) for suite in args.suites.split(",") for task in check_task_ids(suite, args.task_ids)
    ]
    upwards = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])  # a light picture draws what moves: here the arm
    rows = []
    for suite, task_id in tqdm(wanted, desc="pictures", unit="task", leave=False):
        frames, times = {}, {}
        for kind in ("exact", "light"):
            task = TaskSim(suite, task_id, render=kind)
            episode = task.episode()
            episode.reset(0)
            frames[kind], spent = episode.render(), []
            for _ in range(args.repeats + 1):
                episode.step(upwards)
                began = time.process_time()
                episode.render()
                spent.append(1e3 * (time.process_time() - began))
            times[kind] = float(np.mean(spent[1:]))
            task.close()
        rows.append(dict(suite=suite, task_id=task_id, psnr=psnr(frames["exact"], frames["light"]), ms=times))
    return dict(tasks=rows)


def show(r):
    summary = []
    for suite in dict.fromkeys(row["suite"] for row in r["tasks"]):
        rows = [row for row in r["tasks"] if row["suite"] == suite]
        worst, mean = min(rows, key=lambda row: row["psnr"]), float(np.mean([row["psnr"] for row in rows]))
        light, exact = (float(np.mean([row["ms"][kind] for row in rows])) for kind in ("light", "exact"))
        summary.append((suite, len(rows), worst["psnr"], worst["task_id"], mean, light, exact, exact / light))
    columns = [
        "",
        "tasks:d",
        "lowest PSNR:.1f",
        "in task:d",
        "mean:.1f",
        "light ms:.1f",
        "exact ms:.1f",
        "ratio:.1f",
    ]
    table(columns, summary)
    print("PSNR in dB; milliseconds of CPU time of a picture while the arm moves, one core")
