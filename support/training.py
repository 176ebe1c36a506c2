"""What a long training on data needs besides the training: a state that survives a kill, an end on request, a curve."""

import contextlib
import json
import os
import pickle
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from support.cli import parse_settings
from support.errors import UserError
from support.files import atomic_write, read_json


def open_directory(args):
    """(args, directory, path of the state): with `--resume` the settings are those of the training in that directory.

    The log there holds the settings; the state is there until the training is done. Raises UserError where there is nothing to
    resume, or where a new training would overwrite an unfinished one.
    """
    out = Path(args.resume or args.out)
    state, log = out / "training.pt", out / "sft_log.json"
    if args.resume:
        args = parse_settings(type(args), read_json(log).get("args"), log)
        if not state.exists():
            raise UserError(f"{out} holds no unfinished training: {state} is missing")
    elif state.exists():
        raise UserError(
            f"{out} holds an unfinished training: --resume {shlex.quote(str(out))}, or another --out"
        )
    return args, out, state


def write_log(out, args, log):
    """The last entry to the terminal; settings and all entries to sft_log.json; the curve to sft.png."""
    atomic_write(out / "sft_log.json", json.dumps({"args": asdict(args), "log": log}, indent=1))
    if log:
        words = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in log[-1].items())
        tqdm.write("  ".join(words))
        plot_imitation(log, out / "sft.png")


def make_directory(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc


def save_state(state, path):
    """Write a `state_dict` so that `path` holds the old or the new one, whatever happens meanwhile. Not through memory: at 7B
    it has gigabytes."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as exc:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = str(exc).strip().splitlines()[0]
        before = "the one before is intact" if path.exists() else "there is none before it"
        raise UserError(f"cannot write {path}: {why}; {before}") from exc


def load_state(owner, path):
    """`owner.load_state_dict` with what `save_state` wrote. UserError for a file that is missing, damaged or another run's."""
    try:
        owner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        why = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise UserError(f"cannot resume from {path} ({why}): start again with another --out") from exc


class StopRequest:
    """Ctrl-C and SIGTERM set `requested`, which the loop reads after every step; a second one ends the process at once."""

    def __init__(self, print0=print):
        self.requested, self.print0 = False, print0  # of several ranks, one speaks
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        self.requested = True
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)
        self.print0("\nstopping after this step (once more: at once)", file=sys.stderr, flush=True)


def plot_imitation(log, path):
    """Losses (left axis), held-out accuracy and success in the simulator (right axis) against steps, as a PNG.

    log: list of {"step": ..., "train_loss": ..., "held_out_loss": ..., ...}; an entry may lack any but the step.
    """
    import matplotlib  # late: it takes a second, and a training draws a few times an hour

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, left = plt.subplots(figsize=(7, 4), dpi=130)
    right = left.twinx()
    lines = (
        (left, "train_loss", "training loss", 1, "C0-"),
        (left, "held_out_loss", "held-out loss", 1, "C1-"),
        (right, "held_out_accuracy_within_5_bins", "held-out tokens within 5 bins", 100, "C2--"),
        (right, "success_rate", "success in the simulator", 100, "C3o-"),
    )
    for axis, key, label, scale, style in lines:
        points = [(entry["step"], scale * entry[key]) for entry in log if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), style, ms=4, label=label)
    left.set(xlabel="optimiser steps", ylabel="nats per token")
    right.set(ylabel="%", ylim=(0, 100))
    fig.legend(loc="upper center", ncols=2, fontsize=8)
    temporary = path.with_suffix(".tmp.png")
    fig.savefig(temporary)
    plt.close(fig)
    os.replace(temporary, path)
