"""What a run shows a person: success curve, films, the table before / after, and report.html, which has all of it on one page.

    python -m support.report page --run runs/libero_object-seed0

Everything here reads the files of a run and changes none of them, so it may be called at any time, while the run goes on too.
Several runs, seeds or policies beside each other: support/compare.py.
"""

import base64
import html
import io
import json
import math
import re
import shlex
import sys
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.cli import parse_command
from support.errors import UserError, main_guard
from support.files import atomic_write, write_film
from support.statistics import contrast_interval, wilson_interval

# --------------------------------------------------------------------------------------------------------------------
# A run's files
# --------------------------------------------------------------------------------------------------------------------


def new_figure(**settings):
    from matplotlib.figure import Figure  # late: it takes half a second to import

    return Figure(**settings)


def read_run(directory, results_file="results.json"):
    """(config, lines of metrics.jsonl, results.json or {}) of a run directory of train.py."""
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
        # A line that is being written has no end yet.
        text = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [json.loads(line) for line in text if line.endswith("\n")]
        path = directory / results_file
        asked_for = results_file != "results.json"  # that one a run has only when it is done
        results = json.loads(path.read_text()) if asked_for or path.exists() else {}
    except (OSError, ValueError) as exc:
        raise UserError(
            f"{directory} is not a run directory of train.py ({type(exc).__name__}: {exc})"
        ) from exc
    if "total" in results:  # eval.py's, of the run's policy
        results = {"trained": results}
    return config, lines, results


def evaluation_points(lines, results):
    """[(decisions, successes, episodes), …] in order. results.json has more episodes and takes the place of a line's."""
    points = {}
    for m in lines:
        if "eval/episodes" in m:
            points[m.get("eval/at", m["charts/decisions"])] = (m["eval/successes"], m["eval/episodes"])
    for name in results.keys() & {"start", "trained"}:
        total = results[name]["total"]
        at = 0 if name == "start" or not lines else lines[-1]["charts/decisions"]
        points[at] = (total["successes"], total["episodes"])
    return [(at, *counts) for at, counts in sorted(points.items())]


# --------------------------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------------------------


def _percent_with_bars(successes, episodes):
    """Success rates in percent and, for errorbar, the distances (2, n) to the ends of their Wilson intervals."""
    rates = np.array(successes) / np.array(episodes)
    low, high = np.array([wilson_interval(k, n) for k, n in zip(successes, episodes, strict=True)]).T
    return 100 * rates, 100 * np.stack([rates - low, high - rates]).clip(0)


WINDOW = 15  # iterations that a running mean of training episodes is over


def training_curve(lines, window=WINDOW):
    """(decisions, success in % of the training episodes of the last `window` iterations), of lines of metrics.jsonl.

    NaN before 20 of them have ended. A rate would mean little there: the first to end are the short ones, successes.
    """
    x, wins, episodes = np.array(
        [[m["charts/decisions"], m["charts/successes"], m["charts/episodes"]] for m in lines], float
    ).reshape(-1, 3).T  # fmt: skip
    if not len(x):
        return x, wins
    played, won = (np.convolve(counts, np.ones(window))[: len(x)] for counts in (episodes, wins))
    return x, np.where(played < 20, np.nan, 100 * won / np.maximum(played, 1))


def draw_curve(ax, lines, points):
    x, rate = training_curve(lines)
    if not np.isnan(rate).all():
        label = f"training episodes (mean of {min(WINDOW, len(x))} iterations)"
        ax.plot(x, rate, color="0.6", lw=1.2, label=label)
    if points:
        at, successes, episodes = zip(*points, strict=True)
        rates, bars = _percent_with_bars(successes, episodes)
        label = "evaluation on test states (95 % interval)"
        ax.errorbar(at, rates, yerr=bars, fmt="o-", ms=4, capsize=3, color="C0", label=label)
    ax.set(xlabel="decisions", ylabel="success rate (%)", ylim=(0, 102))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(loc="lower right", fontsize=8)


def save_png(figure, path):
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())


def draw(directory):
    """success.png and report.html of a run that goes on. What cannot be read or written costs a warning, not the run."""
    try:
        write_report(directory)
    except (OSError, UserError) as exc:
        print(f"warning: no success.png or report.html: {str(exc).strip().splitlines()[0]}", file=sys.stderr)


def plot_curve(lines, path, title, results=()):
    """Success against decisions as PNG: training episodes (running mean), and evaluations with Wilson 95 % intervals.

    lines: of metrics.jsonl, as dicts. results: results.json, if the run has one.
    """
    figure = new_figure(figsize=(7, 4), dpi=130, layout="tight")
    ax = figure.subplots()
    draw_curve(ax, lines, evaluation_points(lines, dict(results)))
    ax.set_title(title, parse_math=False)
    save_png(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Films and tables
# --------------------------------------------------------------------------------------------------------------------


def write_video(path, frames, rewards, values, scores, ended, fps, first=0):
    """Rollout of one environment as mp4: decision, reward, value and RPRM score drawn on, the scores as a strip below.

    frames: T pictures (H, W, 3) uint8; rewards, values, scores (in [0, 1]): T numbers. ended: T times 1 for a success, -1 for
    a truncated episode, else 0. first: the number, in its episode, of the first decision.
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
            + ("   success" if ended[t] > 0 else "   truncated" if ended[t] < 0 else ""),
            fill=(255, 255, 255),
        )
        for k in range(T):  # the whole strip in grey, what has happened in green
            x0, x1 = k * width // T, (k + 1) * width // T - 1
            top = width + strip - 4 - int((strip - 8) * float(scores[k]))
            pen.rectangle(
                (x0, top, max(x0, x1), width + strip - 4), fill=(70, 170, 90) if k <= t else (70, 70, 70)
            )
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
        pictures = [
            Image.fromarray(np.hstack(pair)).quantize(128, Image.Quantize.MAXCOVERAGE)
            for pair in zip(*films, strict=True)
        ]
        data, film = io.BytesIO(), dict(append_images=pictures[1:], duration=1000 / fps, loop=0)
        pictures[0].save(data, "GIF", save_all=True, **film)
        atomic_write(path, data.getvalue())
        return True
    return False


def before_after_table(rows, heads=("start policy", "after RL")):
    """Markdown table of two evaluations {"start": …, "trained": …} per task, with Wilson 95 % intervals."""

    def cell(r):
        return f"{100 * r['success_rate']:5.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"

    lines = ["", f"| task | episodes | {' | '.join(heads)} | |", "|---:|---:|---:|---:|---|"]
    start, trained = rows["start"], rows["trained"]
    for a, b in zip([*start["tasks"], start["total"]], [*trained["tasks"], trained["total"]], strict=True):
        name = "all" if a["task_id"] is None else a["task_id"]
        lines.append(f"| {name} | {a['episodes']} | {cell(a)} | {cell(b)} | {a['instruction']} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# One page
# --------------------------------------------------------------------------------------------------------------------

EMBEDDED_FILMS, EMBEDDED_BYTES = 4, 2_000_000  # rollouts inside the page; the others are links beside it

# key in metrics.jsonl -> what the panel is called
PANELS = {
    "losses/approx_kl": "KL divergence of an update",
    "losses/entropy": "entropy of an action (nats)",
    "losses/clipfrac": "share of clipped ratios",
    "losses/policy_loss": "policy loss",
    "losses/value_loss": "value loss",
    "losses/explained_variance": "explained variance of the returns",
    "charts/prm_score": "mean RPRM score",
    "charts/episodic_length": "length of an episode (control steps)",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 1080px; margin: 0 auto; padding: 0 16px 48px }
h1 { font-size: 1.5em; margin: 1em 0 0 } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-top: 1px solid #ddd; padding-top: 1em }
p.result { font-size: 1.15em } .note, figcaption { color: #5c6370; font-size: .87em } figure { margin: 0 } img, video { width: 100%; max-width: 860px }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(max(var(--least), 22%), 1fr)) }
.grid { --least: 170px } .grid.films { --least: 240px }
.tasks { display: grid; grid-template-columns: minmax(0, 5fr) 4fr 11em; gap: 3px 14px; align-items: center; font-size: .93em }
.tasks > .name { grid-row: span 2 } .tasks > .line { grid-column: 1 / -1; border-top: 1px solid #eee }
.bar { position: relative; height: 12px; background: #f0f1f3 } .bar i { position: absolute; height: 12px; width: var(--rate); background: #a9b4c2 }
.bar.trained i { background: #1f77b4 } .bar b { position: absolute; left: var(--low); width: calc(var(--high) - var(--low)); top: 5px; height: 2px; background: #111 }
code, td { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere } code { background: #f4f5f7; padding: 2px 5px }
td { padding: 1px 16px 1px 0; vertical-align: top }
@media (max-width: 640px) { .tasks { grid-template-columns: 1fr 9.5em } .tasks > .name { grid-row: auto; grid-column: 1 / -1 } }
"""


def write_report(directory):
    """Write report.html and success.png into a run directory, atomically, from its files alone: config.json, metrics.jsonl,
    results.json, videos/.

    One self-contained page: the result in a sentence, success curve, losses, curriculum, success per task before and after,
    films, settings, how to resume. Text from the files is escaped. Returns the page's path.
    """
    directory = Path(directory)
    config, lines, results = read_run(directory)
    plot_curve(lines, directory / "success.png", f"{config.get('suite')}, seed {config.get('seed')}", results)
    points = evaluation_points(lines, results)
    suite, seed = html.escape(str(config.get("suite"))), html.escape(str(config.get("seed")))
    done = lines[-1]["charts/decisions"] if lines else 0
    total = config.get("total_steps") or done
    resume = html.escape(f"python train.py --resume {shlex.quote(str(directory))}")
    body = [
        f"<h1>{suite}, seed {seed}</h1>",
        f"<p class=result>{_sentence(points, done)}</p>",
        f"<p class=note>{done:,} of {total:,} decisions, written {time.strftime('%Y-%m-%d %H:%M')}. A decision is one action of "
        f"the policy. To go on after a stop: <code>{resume}</code></p>",
        "<h2>Success</h2>",
        _chart(lambda ax: draw_curve(ax, lines, points), "success against decisions", size=(6.4, 3.3)),
        _task_bars(results),
        "<h2>Films</h2>",
        _films(directory),
        "<h2>Losses</h2><div class=grid>",
        *(
            _chart(lambda ax, key=key: _draw_metric(ax, lines, key), name)
            for key, name in PANELS.items()
            if _has(lines, key)
        ),
        "</div>",
        "<h2>Curriculum</h2>",
        _chart(
            lambda ax: _draw_curriculum(ax, lines),
            "probability with which the next episode is of each task",
            size=(8, 3),
        ),
        "<h2>Settings</h2><details><summary>config.json</summary><table>",
        *(
            f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(json.dumps(v))}</td></tr>"
            for k, v in config.items()
        ),
        "</table></details>",
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{suite}, seed {seed}</title>"
    path = directory / "report.html"
    atomic_write(
        path, f"<!doctype html><html lang=en>{head}<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )
    return path


def _rate(successes, episodes):
    low, high = wilson_interval(successes, episodes)
    return f"{100 * successes / episodes:.1f} % ({100 * low:.1f} to {100 * high:.1f}, {episodes} episodes)"


def _sentence(points, done):
    """The result, as far as it is known."""
    if not points:
        return f"No evaluation yet; {done:,} decisions so far."
    at, *last = points[-1]
    if points[0][0] == 0 and at == 0:
        return f"The start policy succeeds in {_rate(*last)} of the test states; trained for {done:,} decisions since."
    text = f"After {at:,} decisions the policy succeeds in <b>{_rate(*last)}</b> of the test states"
    if points[0][0] > 0:
        return f"{text}."
    low, high = contrast_interval((+1, *last), (-1, *points[0][1:]))
    gain = last[0] / last[1] - points[0][1] / points[0][2]
    return (
        f"{text}, the start policy in <b>{_rate(*points[0][1:])}</b>: {100 * gain:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}; 95 % intervals, of one seed)."
    )


def _has(lines, key):
    return any(_number(m.get(key)) is not None for m in lines)


def _number(value):
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _chart(draw, caption, size=(3.6, 2.3)):
    """Figure as an image inside the page; draw(ax) draws it."""
    figure = new_figure(figsize=size, layout="tight")
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"<figure><img alt='{caption}' src='{_embed(file.getvalue(), 'image/svg+xml')}'><figcaption>{caption}</figcaption></figure>"


def _embed(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _draw_metric(ax, lines, key):
    if key == "charts/episodic_length":
        lines = [m for m in lines if m["charts/episodes"]]  # where no episode ended it is 0
    found = [(m["charts/decisions"], m[key]) for m in lines if _number(m.get(key)) is not None]
    ax.plot([at for at, _ in found], [value for _, value in found], lw=1.2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)


def _draw_curriculum(ax, lines):
    """One row per task, one column per iteration: a picture that stays readable with 90 tasks."""
    tasks = sorted({int(k[16:]) for m in lines for k in m if re.fullmatch(r"curriculum/task_\d{1,4}", k)})
    lines = [m for m in lines if tasks and f"curriculum/task_{tasks[0]}" in m]
    if not lines:
        return ax.set_axis_off()
    table = [[_number(m.get(f"curriculum/task_{task}")) or 0.0 for m in lines] for task in tasks]
    edges = [0, *(m["charts/decisions"] for m in lines)]
    picture = ax.pcolormesh(
        edges, range(len(tasks) + 1), np.array(table), vmin=0, cmap="Blues", rasterized=True
    )
    ax.set(xlabel="decisions", ylabel="task", yticks=np.arange(len(tasks)) + 0.5, yticklabels=tasks)
    ax.tick_params(axis="y", labelsize=min(9, 220 / len(tasks)))
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.figure.colorbar(picture, ax=ax, format="{x:.2f}")


def _task_bars(results):
    """A bar per task and policy, with the 95 % interval as a black line in it."""
    policies = [name for name in ("start", "trained") if name in results]
    if not policies:
        return "<p class=note>Success per task, before and after, comes with the final comparison (--final-episodes).</p>"
    cells = []
    for rows in zip(*([*results[name]["tasks"], results[name]["total"]] for name in policies), strict=True):
        label = (
            rows[0]["instruction"]
            if rows[0]["task_id"] is None
            else f"{rows[0]['task_id']}: {rows[0]['instruction']}"
        )
        cells.append(f"<div class=line></div><div class=name>{html.escape(label)}</div>")
        for name, row in zip(policies, rows, strict=True):
            k, n = int(row["successes"]), int(row["episodes"])
            low, high = wilson_interval(k, n)
            place = f"--rate:{100 * k / max(n, 1):.1f}%; --low:{100 * low:.1f}%; --high:{100 * high:.1f}%"
            text = f"{100 * k / max(n, 1):.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            cells.append(f"<div class='bar {name}' style='{place}'><i></i><b></b></div><div>{text}</div>")
    note = f"Per task: grey before, blue after, each of {html.escape(str(rows[0]['episodes']))} episodes in all; line: 95 % interval."
    return f"<p class=note>{note}</p><div class=tasks>{''.join(cells)}</div>"


def _films(directory):
    """Before / after as a picture in the page; the first rollout and the newest ones too, all others as links."""
    gif, films = directory / "before_after.gif", sorted((directory / "videos").rglob("*.mp4"))
    films = [path for path in films if not path.name.endswith(".tmp.mp4")]  # being written
    rollouts = [p for p in films if p.name.startswith("rollout_")]
    shown = [*rollouts[:1], *rollouts[1:][1 - EMBEDDED_FILMS :]]
    parts = []
    if gif.exists():
        caption = "The same test state: the start policy (left) and the trained one."
        source = _embed(gif.read_bytes(), "image/gif")
        parts.append(
            f"<figure><img alt='before and after' src='{source}'><figcaption>{caption}</figcaption></figure>"
        )
    if shown:
        note = "Rollouts of the first environment; the strip below the picture is the RPRM score of each decision."
        parts.append(f"<p class=note>{note}</p><div class='grid films'>")
        for path in shown:
            data = path.read_bytes()
            source = _embed(data, "video/mp4") if len(data) <= EMBEDDED_BYTES else _link(directory, path)
            film = f"<video controls autoplay muted loop playsinline src='{source}'></video>"
            parts.append(
                f"<figure>{film}<figcaption>{html.escape(path.stem.replace('_', ' '))}</figcaption></figure>"
            )
        parts.append("</div>")
    if others := [p for p in films if p not in shown]:
        names = {p: html.escape(p.relative_to(directory / "videos").as_posix()) for p in others}
        links = "<br>".join(f"<a href='{_link(directory, p)}'>{name}</a>" for p, name in names.items())
        parts.append(f"<details><summary>{len(others)} more in videos/</summary><p>{links}</p></details>")
    return "\n".join(parts) or "<p class=note>None yet.</p>"


def _link(directory, path):
    return html.escape(urllib.parse.quote(path.relative_to(directory).as_posix()))


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class PageArgs:
    run: str = field(
        metadata={"help": "run directory of train.py; its report.html and success.png are written anew"}
    )


@main_guard
def main():
    _, args = parse_command(
        {"page": (PageArgs, "one page with everything about a run")}, "What a training shows."
    )
    print(write_report(args.run))


if __name__ == "__main__":
    main()
