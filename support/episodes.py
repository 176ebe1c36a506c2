"""What is kept of evaluated episodes {"task_id", "init_state", "success", "steps"}: a table, a log, films."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from support.errors import UserError
from support.files import write_film
from support.statistics import wilson_interval


@dataclass
class EvalResult:
    """Episodes of a suite, and what follows from them. `instructions`: of every task of the suite."""

    suite: str
    instructions: list
    episodes: list

    @property
    def success_rate(self):
        return float(np.mean([e["success"] for e in self.episodes])) if self.episodes else 0.0

    def row(self, task_id=None):
        """Counts, rate, Wilson 95 % interval and mean steps to success: of one task, or of all episodes (None)."""
        episodes = [e for e in self.episodes if task_id is None or e["task_id"] == task_id]
        steps, n = [e["steps"] for e in episodes if e["success"]], len(episodes)
        low, high = wilson_interval(len(steps), n)
        return {
            "task_id": task_id,
            "instruction": "all tasks" if task_id is None else self.instructions[task_id],
            "successes": len(steps),
            "episodes": n,
            "success_rate": len(steps) / n if n else 0.0,
            "low": low,
            "high": high,
            "mean_steps": float(np.mean(steps)) if steps else None,
        }

    def rows(self):
        return [self.row(t) for t in sorted({e["task_id"] for e in self.episodes})] + [self.row()]

    def to_dict(self):
        *tasks, total = self.rows()
        episodes = sorted(self.episodes, key=lambda e: (e["task_id"], e["init_state"]))
        return {"suite": self.suite, "total": total, "tasks": tasks, "episodes": episodes}

    def to_markdown(self):
        """Table with a row per task; "steps" are control steps to success, averaged over the successes."""
        lines = ["| task | | success | 95 % interval | episodes | steps |", "|---|---|---:|---:|---:|---:|"]
        for r in self.rows():
            task = "" if r["task_id"] is None else r["task_id"]
            steps = "" if r["mean_steps"] is None else f"{r['mean_steps']:.0f}"
            interval = f"{100 * r['low']:.1f} to {100 * r['high']:.1f} %"
            rate = f"{100 * r['success_rate']:.1f} %"
            lines.append(f"| {task} | {r['instruction']} | {rate} | {interval} | {r['episodes']} | {steps} |")
        if unstable := [f"{e['task_id']}/{e['init_state']}" for e in self.episodes if e.get("unstable")]:
            lines += [
                "",
                f"Failures because the simulation diverged (task/initial state): {', '.join(unstable)}",
            ]
        return "\n".join(lines)


class EpisodeLog:
    """`episodes.jsonl`: a line of settings, then a line per finished episode, each on the disk when `append` returns.

    An existing file is continued; UserError if it is no such log or has other settings, for those must not mix.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self.episodes = path, settings, []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror}; choose another --out") from exc
        self.file.seek(0)
        text = self.file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a kill during a write leaves half a line at the end: drop it
        self.file.truncate(len(whole))
        if not whole:
            self.append({"settings": settings})
            return
        try:
            header, *self.episodes = [json.loads(line) for line in whole.splitlines()]
            found = dict(header["settings"])
            for e in self.episodes:
                if not isinstance(e, dict) or not {"task_id", "init_state", "success", "steps"} <= e.keys():
                    raise ValueError(e)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"{path} is not a log of episodes; move it away or choose another --out"
            ) from None
        if found != settings:
            absent = ...  # None is a value
            key = next(k for k in [*settings, *found] if settings.get(k, absent) != found.get(k, absent))
            raise UserError(
                f"{path} has episodes with {key} = {found.get(key)}, this command has {settings.get(key)}; "
                f"choose another --out or delete the file"
            )

    @classmethod
    def of_rank(cls, directory, settings, ranks):
        """The log that this rank writes (support/distributed.py); its `episodes` are those that all ranks had finished before."""
        log = None
        if ranks.is_main_process:
            log = cls(directory / "episodes.jsonl", settings)
            log.absorb()
        finished = ranks.gather(log and log.episodes)[0]
        log = log or cls(directory / f"episodes-rank{ranks.rank}.jsonl", settings)
        log.episodes = finished
        return log

    def absorb(self):
        """Take over what other ranks logged, each in a file of its own beside this one (also in an earlier attempt)."""
        for path in sorted(self.path.parent.glob("episodes-rank*.jsonl")):
            for episode in EpisodeLog(path, self.settings).episodes:
                if episode not in self.episodes:
                    self.episodes.append(episode)
                    self.append(episode)
            path.unlink()

    def append(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def write_episode_film(directory, frames, episode, action_repeat):
    """mp4 in real time, with the control step and the outcome drawn on. frames: one per decision, and the last."""
    outcome = "success" if episode["success"] else "failure"
    drawn = []
    for k, frame in enumerate(frames):
        step = f"{k * action_repeat}" if k < len(frames) - 1 else f"{episode['steps']}  {outcome}"
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, image.width, 14), fill=(0, 0, 0))
        text = f"task {episode['task_id']}  state {episode['init_state']}  step {step}"
        draw.text((4, 2), text, fill=(255, 255, 255))
        drawn.append(np.asarray(image))
    drawn += [drawn[-1]] * 3  # players tend to swallow the last frames
    write_film(film_path(directory, episode), drawn, 20 / action_repeat)


def film_path(directory, episode):
    """Where `write_episode_film` puts an episode's film."""
    outcome = "success" if episode["success"] else "failure"
    return Path(directory) / f"task{episode['task_id']:02d}_state{episode['init_state']:02d}_{outcome}.mp4"
