"""What a run shows a person: success curves, comparisons, films, the table before / after.

    python -m support.report --runs runs/rl-sum-seed0,runs/rl-none-seed0 --out comparison.png
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.cli import parse_args
from support.errors import UserError, main_guard
from support.files import write_film
from support.statistics import wilson_interval


def plot_curve(lines, path, title):
    """Success against decisions: training episodes (running mean), and evaluations with Wilson 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = np.array([m["charts/decisions"] for m in lines])
    wins = np.array([m["charts/successes"] for m in lines], float)
    episodes = np.array([m["charts/episodes"] for m in lines], float)
    fig, ax = plt.subplots(figsize=(7, 4), dpi=130)
    if len(x):
        window = np.ones(min(15, len(x)))
        played = np.convolve(episodes, window)[: len(x)]
        mean = np.convolve(wins, window)[: len(x)] / np.maximum(played, 1)
        mean[played < 20] = np.nan  # the first episodes that end are the short ones, and those are successes
        ax.plot(
            x,
            100 * mean,
            color="0.6",
            lw=1.2,
            label=f"training episodes, sampled actions (mean of {len(window)} iterations)",
        )
    points = [
        (m.get("eval/at", m["charts/decisions"]), m["eval/successes"], m["eval/episodes"])
        for m in lines
        if "eval/episodes" in m
    ]
    if points:
        at, k, n = map(np.array, zip(*points, strict=True))
        low, high = np.array([wilson_interval(a, b) for a, b in zip(k.tolist(), n.tolist(), strict=True)]).T
        rate = k / n
        ax.errorbar(
            at,
            100 * rate,
            yerr=100 * np.stack([rate - low, high - rate]).clip(0),
            fmt="o-",
            ms=4,
            capsize=3,
            color="C0",
            label="evaluation on test states (95 % interval)",
        )
    ax.set(xlabel="decisions", ylabel="success rate (%)", ylim=(0, 100), title=title)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    fig.savefig(temporary)
    plt.close(fig)
    os.replace(temporary, path)


def evaluations(run):
    """[(decisions, successes, episodes), …] of a run directory, and its config (dict).

    `results.json` counts too: train.py's final comparison, or what eval.py wrote about the run's `policy`.
    """
    run = Path(run)
    try:
        config = json.loads((run / "config.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as exc:
        raise UserError(f"{run} is not a run directory of train.py ({type(exc).__name__}: {exc})") from exc
    points = [
        (m.get("eval/at", m["charts/decisions"]), m["eval/successes"], m["eval/episodes"])
        for m in lines
        if "eval/episodes" in m
    ]
    if (run / "results.json").exists():
        results = json.loads((run / "results.json").read_text())
        if "trained" not in results:
            results = {"trained": results}
        for where in results.keys() & {"start", "trained"}:
            decisions = 0 if where == "start" else lines[-1]["charts/decisions"]
            total = results[where]["total"]  # of more episodes than the evaluations on the way: it takes their place
            points = [p for p in points if p[0] != decisions]
            points.append((decisions, total["successes"], total["episodes"]))
    return sorted(points), config


def compare(runs, path):
    """Success against decisions of several runs: one colour per --prm-mode, thin lines for seeds, thick for all of them.

    Returns a Markdown table. The thick line pools the episodes of the seeds at each point where all of them were
    evaluated, with Wilson 95 % intervals of the pooled count; these do not contain the spread between seeds, the thin
    lines do.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, table = {}, ["| RPRM | seed | decisions | success | 95 % interval | episodes |", "|---|---:|---:|---:|---|---:|"]

    def row(mode, seed, d, k, n):
        low, high = wilson_interval(k, n)
        table.append(f"| {mode} | {seed} | {d:,} | {100 * k / n:.1f} % | {100 * low:.1f} to {100 * high:.1f} | {n} |")

    for run in runs:
        points, config = evaluations(run)
        if not points:
            raise UserError(f"{run} was never evaluated: train with --eval-every or --final-episodes")
        groups.setdefault(config["prm_mode"], []).append((config["seed"], points))
    fig, ax = plt.subplots(figsize=(7, 4), dpi=130)
    for colour, (mode, members) in enumerate(groups.items()):
        style = dict(color=f"C{colour}")
        for seed, points in sorted(members):
            d, k, n = map(np.array, zip(*points, strict=True))
            ax.plot(d, 100 * k / n, lw=0.8, alpha=0.6, **style)
            for point in (points[0], points[-1]):
                row(mode, seed, *point)
        shared = set.intersection(*({p[0] for p in points} for _, points in members))
        pooled = []
        for d in sorted(shared):
            found = [p for _, points in members for p in points if p[0] == d]
            pooled.append((d, sum(p[1] for p in found), sum(p[2] for p in found)))
        if not pooled:
            raise UserError(f"the runs with --prm-mode {mode} were not evaluated at any common number of decisions")
        low, high = np.array([wilson_interval(k, n) for _, k, n in pooled]).T
        d, k, n = map(np.array, zip(*pooled, strict=True))
        bars = 100 * np.stack([k / n - low, high - k / n]).clip(0)
        label = f"{'without RPRM' if mode == 'none' else f'with RPRM ({mode})'}, {len(members)} seeds"
        ax.errorbar(d, 100 * k / n, yerr=bars, fmt="o-", ms=4, lw=2, capsize=3, label=label, **style)
        if len(members) > 1:
            for point in (pooled[0], pooled[-1]):
                row(mode, "all", *point)
    ax.set(xlabel="decisions", ylabel="success rate on test states (%)", ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    fig.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    fig.savefig(temporary)
    plt.close(fig)
    os.replace(temporary, path)
    return "\n".join(table)


def write_video(path, frames, rewards, values, scores, ended, fps, first=0):
    """Rollout of one environment as mp4: decision, reward, value and RPRM score drawn on, the scores as a strip below.

    frames: T pictures (H, W, 3) uint8; rewards, values, scores (in [0, 1]): T numbers. ended: T times 1 for a success, -1 for
    a cut episode, else 0. first: the number, in its episode, of the first decision.
    """
    from PIL import Image, ImageDraw

    T, width, strip, drawn, step = len(frames), 384, 48, [], first
    for t in range(T):
        canvas = Image.new("RGB", (width, width + strip), (20, 20, 20))
        canvas.paste(Image.fromarray(frames[t]).resize((width, width)), (0, 0))
        pen = ImageDraw.Draw(canvas)
        pen.rectangle((0, 0, width, 15), fill=(0, 0, 0))
        pen.text(
            (4, 2),
            f"decision {step:2d}   reward {rewards[t]:+.2f}   value {values[t]:+.2f}   RPRM {scores[t]:.2f}"
            + ("   success" if ended[t] > 0 else "   cut" if ended[t] < 0 else ""),
            fill=(255, 255, 255),
        )
        for k in range(T):  # the whole strip in grey, what has happened in green
            x0, x1 = k * width // T, (k + 1) * width // T - 1
            top = width + strip - 4 - int((strip - 8) * float(scores[k]))
            pen.rectangle((x0, top, max(x0, x1), width + strip - 4), fill=(70, 170, 90) if k <= t else (70, 70, 70))
        drawn.append(np.asarray(canvas))
        step = 0 if ended[t] else step + 1
    write_film(path, drawn, fps)


def before_after_gif(path, start, trained, side=192):
    """The start policy (left) and the trained one on the same test state, side by side, as a GIF for a README.

    start, trained: directories of eval.py's videos (task.._state.._success|failure.mp4). Of the states where the one
    failed and the other succeeded, the first is shown; without such a state nothing is written. Returns whether it was.
    """
    import imageio
    from PIL import Image

    for failed in sorted(Path(start).glob("*_failure.mp4")):
        won = Path(trained) / failed.name.replace("_failure", "_success")
        if not won.exists():
            continue
        films = []
        for film in (failed, won):
            with imageio.get_reader(film) as reader:
                fps = reader.get_meta_data()["fps"]
                films.append([np.asarray(Image.fromarray(frame).resize((side, side))) for frame in reader])
        length = max(map(len, films)) + 5  # the shorter film waits on its last picture
        films = [film + [film[-1]] * (length - len(film)) for film in films]
        pictures = [Image.fromarray(np.hstack(pair)).quantize(128, Image.Quantize.MAXCOVERAGE) for pair in zip(*films, strict=True)]
        temporary = Path(path).with_suffix(".tmp.gif")
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
        os.replace(temporary, path)
        return True
    return False


def before_after_table(rows):
    """Markdown table of start and trained policy per task, with Wilson 95 % intervals."""

    def cell(r):
        return f"{100 * r['success_rate']:5.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"

    lines = ["", "| task | episodes | start policy | after RL | |", "|---:|---:|---:|---:|---|"]
    start, trained = rows["start"], rows["trained"]
    for a, b in zip([*start["tasks"], start["total"]], [*trained["tasks"], trained["total"]], strict=True):
        name = "all" if a["task_id"] is None else a["task_id"]
        lines.append(f"| {name} | {a['episodes']} | {cell(a)} | {cell(b)} | {a['instruction']} |")
    return "\n".join(lines)


@dataclass
class Args:
    runs: list[str] = field(metadata={"help": "run directories of train.py, comma-separated"})
    out: str = field(default="runs/comparison.png", metadata={"help": "PNG to write"})


@main_guard
def main():
    args = parse_args(Args, "Compare finished runs: one plot, and a table of their first and last evaluations.")
    print(compare(args.runs, args.out))


if __name__ == "__main__":
    main()
