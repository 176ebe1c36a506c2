"""Runs and policies beside each other: methods and seeds, on one test or two; a run's checkpoints; two evaluations of the same
episodes; the paper's Table 1.

    python -m support.compare methods --runs runs/full-seed0,runs/full-seed1,runs/none-seed0 --out comparison.png
    python -m support.compare along --runs results/libero_object/long-seed0 --results sampled.json,greedy.json
    python -m support.compare tests --runs runs/full-seed0,runs/none-seed0 --results results.json,placements.json
    python -m support.compare pair --before runs/eval-start --after runs/eval-trained --film before_after.gif
    python -m support.compare suites --results results --out suites.png

Reads what train.py and eval.py wrote, and changes none of it.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.cli import flag, parse_command
from support.errors import UserError, main_guard
from support.report import (
    WINDOW,
    before_after_gif,
    before_after_table,
    draw_curve,
    evaluation_points,
    new_figure,
    read_run,
    save_png,
    training_curve,
)
from support.statistics import contrast_interval, paired_interval, t_interval, wilson_interval

# Settings of an evaluation without which it says nothing beside another: a greedy one beside a sampled one, say.
ALIKE = ("suite", "temperature", "whole_vocabulary", "fresh", "render")

# --------------------------------------------------------------------------------------------------------------------
# Methods and seeds
# --------------------------------------------------------------------------------------------------------------------


def methods(runs, path, results_file="results.json"):
    """Success against decisions of several methods: a thin line for each run, a thick one for the mean over seeds.

    runs: directories METHOD-seedS; those with the same METHOD differ in the seed alone. Intervals are t intervals over seeds,
    none where there is one seed or all are alike. results_file: what has the last evaluation, in each directory. path: PNG to
    write; its left panel is of the training episodes, whose tasks the curriculum chose.
    Returns two Markdown tables: of the last evaluations, where differences to the first method are taken seed by seed, and of
    success in training.
    """
    _check_names(runs)
    points_of = {}  # method -> {seed: evaluation points}
    lines_of = {}  # method -> {seed: lines of metrics.jsonl}
    for run in runs:
        config, lines, results = read_run(run, results_file)
        points = evaluation_points(lines, results)
        if not points:
            raise UserError(f"{run} was never evaluated: train with --eval-every or --final-episodes")
        method = re.sub(r"-seed\d+$", "", Path(run).name)
        if config["seed"] in points_of.get(method, {}):
            raise UserError(
                f"--runs: {run} is a second {method} of seed {config['seed']}, as its config.json says"
            )
        points_of.setdefault(method, {})[config["seed"]] = points
        lines_of.setdefault(method, {})[config["seed"]] = lines

    figure = new_figure(figsize=(9, 4), dpi=130, layout="tight")
    training, ax = figure.subplots(1, 2, sharex=True, sharey=True)
    for k, (method, seeds) in enumerate(points_of.items()):
        for lines in lines_of[method].values():
            training.plot(*training_curve(lines), lw=1, color=f"C{k}")
        curves = [{at: 100 * wins / n for at, wins, n in points} for points in seeds.values()]
        for curve in curves:
            ax.plot(curve.keys(), curve.values(), lw=0.8, alpha=0.5, color=f"C{k}")
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not shared:
            raise UserError(f"the runs {method}-seed… were not evaluated at any common number of decisions")
        rates = np.array([[curve[at] for at in shared] for curve in curves])  # (seeds, points)
        mean, (low, high) = rates.mean(axis=0), np.array([t_interval(at, 0, 100) for at in rates.T]).T
        bars = np.stack([mean - low, high - mean]) if len(curves) > 1 else None
        name = f"{method} ({len(curves)} seed{'s' * (len(curves) > 1)})"
        ax.errorbar(
            shared, mean, yerr=bars, fmt="o-", ms=4, lw=2, elinewidth=1, capsize=3, label=name, color=f"C{k}"
        )
    training.set(ylabel="success rate (%)", title=f"in training (mean of {WINDOW} iterations)", ylim=(0, 100))
    ax.set_title("on test states")
    for panel in (training, ax):
        panel.set_xlabel("decisions")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    save_png(figure, path)
    return _methods_table(points_of), _training_table(lines_of)


def _check_names(runs):
    """UserError where two directories have one name, so that one would take the other's place."""
    names = [Path(run).name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--runs: {twice[0]} is there twice; a run's name is its method and seed")


def _methods_table(methods):
    """Markdown: the last evaluation of every method and seed, {method: {seed: evaluation points}}."""
    first, numbers = next(iter(methods)), sorted({seed for seeds in methods.values() for seed in seeds})
    head = [
        "",
        *(f"seed {seed}" for seed in numbers),
        "mean",
        "95 %",
        f"minus {first}",
        "95 %",
        "decisions",
        "episodes each",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    last = {
        method: {seed: 100 * points[-1][1] / points[-1][2] for seed, points in seeds.items()}
        for method, seeds in methods.items()
    }

    def with_interval(values, sign=""):
        if not values:
            return ["", ""]
        low, high = t_interval(values, -100 if sign else 0, 100)
        return [
            f"{np.mean(values):{sign}.1f}",
            "" if math.isnan(low) else f"{low:{sign}.1f} to {high:{sign}.1f}",
        ]

    for method, rates in last.items():
        cells = [f"{rates[seed]:.1f}" if seed in rates else "" for seed in numbers]
        common = [seed for seed in rates if seed in last[first] and method != first]
        cells += with_interval(list(rates.values()))
        cells += with_interval([rates[seed] - last[first][seed] for seed in common], "+")
        for column in (0, 2):  # decisions, episodes
            found = sorted({points[-1][column] for points in methods[method].values()})
            cells.append(" / ".join(f"{number:,}" for number in found))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _training_table(methods):
    """Markdown: success in % of the training episodes that ended in each quarter of the iterations, {method: {seed: lines}}."""
    table = [
        "| of training episodes, % | first quarter | second | third | last | all | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, seeds in methods.items():
        columns = []
        for lines in (seeds[seed] for seed in sorted(seeds)):
            trained = [m for m in lines if m["iteration"]]  # 0 is an evaluation only
            counts = np.array([[m["charts/successes"], m["charts/episodes"]] for m in trained]).reshape(-1, 2)
            parts = np.array([part.sum(axis=0) for part in [*np.array_split(counts, 4), counts]])
            columns.append([f"{100 * wins / n:.0f}" if n else "-" for wins, n in parts])
        cells = [", ".join(cells) for cells in zip(*columns, strict=True)]
        table.append(f"| {method} | {' | '.join(cells)} | {', '.join(map(str, sorted(seeds)))} |")
    return "\n".join(table)


# --------------------------------------------------------------------------------------------------------------------
# A run's checkpoints
# --------------------------------------------------------------------------------------------------------------------


def along(runs, files, path):
    """Success along trainings, from evaluations of their checkpoints: RUN/ITERATION/FILE, 000000 being the start policy.

    runs: run directories. files: names of eval.py's files, such as sampled.json and greedy.json. path: PNG to write.
    Returns a Markdown table: a row for each number of decisions, a column for each run and file, with Wilson intervals. Raises
    UserError where a run has none, or where those of one name are not of the same episodes or not sampled alike.
    """
    _check_names(runs)
    runs, rows, reference = list(map(Path, runs)), {}, {}
    columns = {(run, file): f"{run.name}, {Path(file).stem}" for file in files for run in runs}
    for run, file in columns:
        decisions = {line["iteration"]: line["charts/decisions"] for line in read_run(run)[1]} | {0: 0}
        made = sorted(path for path in run.glob(f"*/{file}") if path.parent.name.isdigit())
        if not made:
            raise UserError(f"no {run}/ITERATION/{file}: eval.py writes it, of one of the run's checkpoints")
        for evaluation in made:
            result, episodes = _read_evaluation(evaluation)
            test = [result["settings"].get(name) for name in ALIKE], sorted(episodes)
            if test != reference.setdefault(file, test):
                raise UserError(
                    f"{evaluation} is not of the same episodes as others of its name, or not sampled alike"
                )
            iteration = int(evaluation.parent.name)
            if iteration not in decisions:
                raise UserError(f"{evaluation}: {run}/metrics.jsonl has no iteration {iteration}")
            rows.setdefault(decisions[iteration], {})[run, file] = np.array(list(episodes.values()), int)

    figure = new_figure(figsize=(6, 4), dpi=130, layout="tight")
    ax = figure.subplots()
    lines = [
        "| decisions | " + " | ".join(columns.values()) + " |",
        "|---:|" + "---:|" * len(columns),
    ]
    for at in sorted(rows):
        cells = [_rate(rows[at][column]) if column in rows[at] else "" for column in columns]
        lines.append(f"| {at:,} | " + " | ".join(cells) + " |")
    for (run, file), label in columns.items():
        won = {at: rows[at][run, file] for at in sorted(rows) if (run, file) in rows[at]}
        rates = np.array([100 * w.mean() for w in won.values()])
        bars = np.abs(np.array([_wilson(w) for w in won.values()]).T - rates)
        look = {"color": f"C{runs.index(run)}", "ls": ("-", "--", ":")[files.index(file) % 3]}
        ax.errorbar(
            list(won), rates, yerr=bars, marker="o", ms=4, elinewidth=1, capsize=3, label=label, **look
        )
    ax.set(xlabel="decisions", ylabel="success rate on test states (%)", ylim=(0, 100))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    save_png(figure, path)
    return "\n".join(lines)


def _rate(won):
    return _cell(100 * won.mean(), _wilson(won))


# --------------------------------------------------------------------------------------------------------------------
# Methods and seeds on two tests
# --------------------------------------------------------------------------------------------------------------------


def tests(runs, files, path):
    """Success of methods on two tests, such as LIBERO's states and random placements: a line from test to test for each run.

    runs: directories METHOD-seedS, or METHOD (a policy without a seed). files: in each directory, what eval.py wrote by the one
    test and by the other. path: PNG to write.
    Returns a Markdown table. Rows: the methods, and their differences to the first, taken seed by seed. Columns: both tests, and
    the first minus the second; the corner where the two meet is the difference of differences. Intervals: t over seeds, of one
    seed, or of seeds that are all alike, over the episodes. That of the first test minus the second is also given over the
    episodes of all seeds: few seeds can lie closer together by chance than the episodes' noise lets them, and the interval over
    seeds is then too narrow. Raises UserError where runs were not tested alike.
    """
    if len(files) != 2:
        raise UserError(f"--results {','.join(files)}: give two files, one for each test")
    _check_names(runs)
    won = {}  # method -> {seed: [(successes, episodes) by test]}
    for file in files:
        reference = None
        for run in map(Path, runs):
            result, episodes = _read_evaluation(run / file)
            test = [result["settings"].get(name) for name in ALIKE], sorted(episodes)
            if test != (reference := reference or test):
                raise UserError(
                    f"{runs[0]}/{file} and {run}/{file} are not of the same episodes, or not sampled alike"
                )
            method, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", run.name).groups()
            won.setdefault(method, {}).setdefault(seed, []).append((sum(episodes.values()), len(episodes)))

    rows = {method: [[(+1, run)] for run in seeds.values()] for method, seeds in won.items()}
    first, *others = won
    for method in others:
        shared = [seed for seed in won[method] if seed in won[first]]
        if shared:
            rows[f"{method} - {first}"] = [[(+1, won[method][s]), (-1, won[first][s])] for s in shared]
    names = [Path(file).stem for file in files]
    head = [*names, f"{names[0]} - {names[1]}", "... over episodes", "seeds"]
    lines = [f"| | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|"]
    for name, row in rows.items():
        sign = "+" if len(row[0]) > 1 else ""  # a difference
        cells = [_cell(*_contrast(row, signs), sign) for signs in ((1, 0), (0, 1))]
        cells.append(_cell(*_contrast(row, (1, -1)), "+"))
        cells.append("{:.1f} to {:.1f}".format(*_interval_over_episodes(row, (1, -1))))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(row)} |")

    figure = new_figure(figsize=(5, 4), dpi=130, layout="tight")
    ax = figure.subplots()
    for k, (method, seeds) in enumerate(won.items()):
        for run in seeds.values():
            ax.plot([0, 1], [100 * wins / n for wins, n in run], "o-", ms=3, lw=0.8, alpha=0.5, color=f"C{k}")
        mean, ends = zip(*(_contrast(rows[method], signs) for signs in ((1, 0), (0, 1))), strict=True)
        bars = np.abs(np.subtract(ends, np.array(mean)[:, None])).T
        beside = np.array([0, 1]) + 0.02 * k  # bars of methods that are alike would hide each other
        ax.errorbar(
            beside,
            mean,
            yerr=bars,
            fmt="o-",
            ms=6,
            lw=2,
            elinewidth=1,
            capsize=3,
            color=f"C{k}",
            label=method,
        )
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 0), min(high, 100))
    n = "/".join(sorted({f"{n}" for seeds in won.values() for run in seeds.values() for _, n in run}))
    ax.set(xticks=[0, 1], xticklabels=names, xlim=(-0.3, 1.3), ylabel=f"success rate (%) of {n} episodes")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_png(figure, path)
    return "\n".join(lines)


def _contrast(row, signs):
    """(mean, (low, high)) in % of a sum with signs. row: per seed [(sign, [(successes, episodes) by test])]. signs: of the tests,
    0 leaves one out. The interval is over seeds; of one seed, or of seeds that are all alike, over their episodes."""
    values = [100 * sum(sign * wins / n for sign, wins, n in terms) for terms in _terms(row, signs)]
    counted = [sign for sign, *_ in _terms(row, signs)[0]]
    seeds = t_interval(values, -100 * counted.count(-1), 100 * counted.count(1))
    return np.mean(values), _or(seeds, _interval_over_episodes(row, signs))


def _or(interval, other):
    """interval, or where there is none (NaN) the other one."""
    return other if math.isnan(interval[0]) else interval


def _interval_over_episodes(row, signs):
    """(low, high) in %: the episodes of all seeds, which have equally many, in one pot, as if one policy had played them, each
    from a state of its own."""
    pooled = [
        (parts[0][0], sum(wins for _, wins, _ in parts), sum(n for *_, n in parts))
        for parts in zip(*_terms(row, signs), strict=True)
    ]
    return [100 * end for end in contrast_interval(*pooled)]


def _terms(row, signs):
    """Per seed [(sign, successes, episodes)] of the rates that add up."""
    return [
        [(sign * s, *result) for sign, run in signed for s, result in zip(signs, run, strict=True) if s]
        for signed in row
    ]


# --------------------------------------------------------------------------------------------------------------------
# Two evaluations of the same episodes
# --------------------------------------------------------------------------------------------------------------------


def _read_evaluation(file):
    """eval.py's results.json and {(task, test state): success}."""
    try:
        result = json.loads(Path(file).read_text())
        if not isinstance(result["settings"], dict):
            raise TypeError("settings")
        return result, {(e["task_id"], e["init_state"]): e["success"] for e in result["episodes"]}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UserError(f"{file} is no result of eval.py ({type(exc).__name__}: {exc})") from exc


def pair(before, after, film=None):
    """Two evaluations of eval.py (directories, or their results.json) on the same episodes, as text: a table per task and the
    difference, with its 95 % interval over pairs of episodes. film: GIF of a state that was lost and is won now."""
    folders = [path if path.is_dir() else path.parent for path in (Path(before), Path(after))]
    files = [path / "results.json" if path.is_dir() else path for path in (Path(before), Path(after))]
    (start, trained), episodes = zip(*map(_read_evaluation, files), strict=True)
    results = {"start": start, "trained": trained}
    settings = [[r["settings"].get(name) for name in ALIKE] for r in results.values()]
    if settings[0] != settings[1] or episodes[0].keys() != episodes[1].keys():
        raise UserError(f"{before} and {after} are not of the same episodes: give eval.py the same flags")
    gains = [int(episodes[1][key]) - int(episodes[0][key]) for key in episodes[0]]
    low, high = paired_interval(gains)
    lines = [
        before_after_table(results, ("before", "after")),
        "",
        f"{100 * np.mean(gains):+.1f} points on the same {len(gains)} episodes, 95 % from {100 * low:.1f} to {100 * high:.1f}: "
        f"{gains.count(1)} failed before and succeed now, {gains.count(-1)} the other way",
    ]
    if film:
        if not before_after_gif(film, *(folder / "videos" for folder in folders)):
            raise UserError(
                f"no film: neither {before} nor {after} shows a state that was lost and is won now (--video)"
            )
        lines.append(f"film: {film}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Table 1
# --------------------------------------------------------------------------------------------------------------------

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def suites(directory, picture=None, evaluation="results-500.json", names=None):
    """The paper's Table 1 as Markdown: success in % before and after training on the four suites and on all of them.

    Several seeds: their mean, with a t interval over seeds; for the gain, with chance in the start policy's one evaluation
    added to it (`_difference`). One, or several that are all alike: a Wilson interval over the episodes, for the gain
    `paired_interval`. The last column counts every suite's episodes alike and takes the seeds that all suites have.
    directory, evaluation: as in `_read_suite`; what it does not find is left out. picture: PNG of the curves of training, a
    panel per suite. names: other columns, such as LIBERO-PRO's variants of a suite, which must all be there. Raises UserError
    where they are not, or where there is nothing at all.
    """
    found = {name: _read_suite(Path(directory) / name, evaluation) for name in names or SUITES}
    for name in names or ():
        if not found[name]:
            raise UserError(
                f"no {evaluation} in {directory}/{name}/start and {directory}/{name}/rl-seed*: eval.py writes them"
            )
    found = {name: results for name, results in found.items() if results}
    if not found:
        raise UserError(
            f"no {evaluation} in {directory}/SUITE/start and {directory}/SUITE/rl-seed*, for no suite: eval.py writes them"
        )
    columns = dict(found)
    shared = set.intersection(*(set(won) for _, won in columns.values()))
    if tuple(columns) == SUITES and shared:
        start, won = zip(*columns.values(), strict=True)
        columns["all"] = np.concatenate(start), {k: np.concatenate([w[k] for w in won]) for k in shared}

    rows = {"SFT": [], "VLA-RL": [], "gain": [], "seeds": [], "episodes each": []}
    for start, won in columns.values():
        won = np.array(list(won.values()))  # (seeds, episodes)
        rates = 100 * won.mean(axis=1)
        seeds, gain = t_interval(rates, 0, 100), rates.mean() - 100 * start.mean()
        rows["SFT"].append(_rate(start))
        rows["VLA-RL"].append(_cell(rates.mean(), _or(seeds, _wilson(won))))
        pairs = [100 * end for end in paired_interval((won - start).ravel().tolist())]
        rows["gain"].append(_cell(gain, _or(_difference(rates.mean(), seeds, start), pairs), "+"))
        rows["seeds"].append(str(len(won)))
        rows["episodes each"].append(str(start.size))
    if picture:
        _draw_suites({suite: won for suite, (_, won) in found.items()}, Path(directory), evaluation, picture)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()])


def _difference(mean, interval, start):
    """(low, high) in %: of `mean`, with its interval over seeds, minus the rate of `start`, (episodes,) 0 or 1, with its Wilson
    interval, their widths added up as in `contrast_interval`. NaN where the interval is. That the policies met the same test
    states is not used, which makes it a little too wide."""
    (low, high), (least, most), before = interval, _wilson(start), 100 * start.mean()
    below, above = math.hypot(mean - low, most - before), math.hypot(high - mean, before - least)
    return mean - before - below, mean - before + above


def _read_suite(directory, evaluation):
    """(start, {seed: trained}): who won which episode, each (episodes,) int 0 or 1 in the same order. None where either lacks.

    Of DIRECTORY/start/EVALUATION and DIRECTORY/rl-seedS/EVALUATION, which eval.py wrote. Raises UserError where these are not
    of the same episodes or not sampled alike.
    """
    file = directory / "start" / evaluation
    runs = {
        int(m[1]): m.string for m in (re.fullmatch(r"rl-seed(\d+)", p.name) for p in directory.glob("*")) if m
    }
    trained = {seed: directory / runs[seed] / evaluation for seed in sorted(runs)}
    trained = {seed: path for seed, path in trained.items() if path.exists()}
    if not (file.exists() and trained):
        return None
    start, before = _read_evaluation(file)
    won = {}
    for seed, path in trained.items():
        result, after = _read_evaluation(path)
        for name in ALIKE:
            one, other = (r["settings"].get(name) for r in (start, result))
            if one != other:
                raise UserError(f"{file} and {path} are not alike: {name} is {one} and {other}")
        if after.keys() != before.keys():
            raise UserError(f"{file} and {path} are not of the same episodes")
        won[seed] = np.array([after[key] for key in before], int)
    return np.array(list(before.values()), int), won


def _wilson(won):
    return tuple(100 * end for end in wilson_interval(won.sum(), won.size))


def _cell(mean, interval, sign=""):
    low, high = interval
    return f"{mean:{sign}.1f} ({low:.1f} to {high:.1f})"


def _draw_suites(seeds, directory, evaluation, path):
    """A panel per suite, {suite: its seeds}: success in training, and on the test states before and after, a line each."""
    figure = new_figure(figsize=(3 * len(seeds), 3.2), dpi=130, layout="constrained")
    for ax, suite in zip(figure.subplots(1, len(seeds), sharey=True, squeeze=False)[0], seeds, strict=True):
        start, _ = _read_evaluation(directory / suite / "start" / evaluation)
        for seed in seeds[suite]:
            _, lines, results = read_run(directory / suite / f"rl-seed{seed}", evaluation)
            draw_curve(ax, lines, evaluation_points(lines, results | {"start": start}))
        ax.set_title(f"{suite}, {len(seeds[suite])} seed{'s' * (len(seeds[suite]) > 1)}")
        ax.locator_params(axis="x", nbins=4)
        ax.get_legend().remove()  # one for all
        ax.label_outer()
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # every seed has the same two
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2, fontsize=7)
    save_png(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class MethodsArgs:
    runs: list[str] = field(metadata={"help": "run directories METHOD-seedS of train.py, comma-separated"})
    out: str = flag("runs/comparison.png", "PNG to write")
    results: str = flag("results.json", "in each directory, the file with the last evaluation")


@dataclass
class AlongArgs:
    runs: list[str] = field(metadata={"help": "run directories of train.py, comma-separated"})
    results: list[str] = flag(
        ["results.json"], "eval.py's files in RUN/ITERATION of the evaluated checkpoints, comma-separated"
    )
    out: str = flag("runs/along.png", "PNG to write")


@dataclass
class TestsArgs:
    runs: list[str] = field(metadata={"help": "directories METHOD-seedS or METHOD, comma-separated"})
    results: list[str] = flag(
        ["results.json", "placements.json"],
        "in each directory, eval.py's files by the two tests, comma-separated",
    )
    out: str = flag("runs/tests.png", "PNG to write")


@dataclass
class PairArgs:
    before: str = field(
        metadata={"help": "evaluation of the start policy: eval.py's directory or results.json"}
    )
    after: str = field(metadata={"help": "evaluation of the trained policy on the same episodes"})
    film: str | None = flag(
        None, "GIF to write of a state that was lost and is won now", default="none; both need --video"
    )


@dataclass
class SuitesArgs:
    results: str = flag("results", "directory with SUITE/start and SUITE/rl-seedS of the four suites")
    out: str | None = flag(None, "PNG to write of the curves, a panel per suite", default="none")
    evaluation: str = flag("results-500.json", "in each of those directories, eval.py's file")
    suites: list[str] | None = flag(
        None, "columns, comma-separated, such as libero_object,libero_object_lan", default="the four suites"
    )


@main_guard
def main():
    commands = {
        "methods": (
            MethodsArgs,
            "several methods and seeds: one plot, and tables with differences and intervals over seeds",
        ),
        "along": (AlongArgs, "a run's checkpoints: success against decisions, as a plot and a table"),
        "tests": (
            TestsArgs,
            "methods and seeds on two tests: one plot, and a table with the difference of differences",
        ),
        "pair": (PairArgs, "two evaluations of the same episodes: a table per task and the difference"),
        "suites": (SuitesArgs, "Table 1: the four suites before and after training, with intervals"),
    }
    command, args = parse_command(commands, "Runs, seeds and policies beside each other.")
    if command == "methods":
        print(*methods(args.runs, args.out, args.results), sep="\n\n")
    elif command == "along":
        print(along(args.runs, args.results, args.out))
    elif command == "tests":
        print(tests(args.runs, args.results, args.out))
    elif command == "pair":
        print(pair(args.before, args.after, args.film))
    else:
        print(suites(args.results, args.out, args.evaluation, args.suites))


if __name__ == "__main__":
    main()
