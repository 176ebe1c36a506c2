"""Several runs and policies beside each other: methods and seeds, pairs of evaluations, Table 1."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import compare, report
from support.episodes import EvalResult, write_episode_film
from support.errors import UserError
from support.statistics import contrast_interval, wilson_interval


def film(directory, task, success, length, grey):
    frames = [np.full((256, 256, 3), grey, np.uint8)] * length
    write_episode_film(
        directory, frames, {"task_id": task, "init_state": 0, "success": success, "steps": 4 * length}, 4
    )


def an_evaluation(directory, wins, **settings):
    """What eval.py leaves of one episode per task."""
    episodes = [
        {"task_id": i, "init_state": 0, "success": bool(won), "steps": 40} for i, won in enumerate(wins)
    ]
    result = EvalResult("libero_object", [f"task {i}" for i in range(len(wins))], episodes)
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps({"settings": settings, **result.to_dict()}))
    return directory


def paired(before, after):
    """Agresti and Min's interval, in %: numpy's mean and deviation of the pairs' differences and of half a pair of each kind."""
    gains = np.repeat(np.subtract(after, before), 2).tolist() + [1, -1, 0, 0]  # all doubled
    half = 1.959964 * np.std(gains) / (len(gains) / 2) ** 0.5
    return 100 * (np.mean(gains) - half), 100 * (np.mean(gains) + half)


def test_pair_counts_the_episodes_that_changed_sides(tmp_path):
    """Of 20 episodes 8 are won and 2 lost."""
    before, after = [0] * 8 + [1] * 2 + [1] * 6 + [0] * 4, [1] * 8 + [0] * 2 + [1] * 6 + [0] * 4
    a, b = an_evaluation(tmp_path / "a", before), an_evaluation(tmp_path / "b", after)
    text = compare.pair(a, b / "results.json")
    low, high = paired(before, after)
    assert f"+30.0 points on the same 20 episodes, 95 % from {low:.1f} to {high:.1f}: " in text
    assert "8 failed before and succeed now, 2 the other way" in text
    assert text.count("\n| ") == 22 and "| all | 20 |  40.0 %" in text  # head, 20 tasks, all


@pytest.mark.parametrize("setting", [{"temperature": 0.6}, {"render": "exact"}, {"fresh": True}])
def test_pair_refuses_what_was_not_played_alike(tmp_path, setting):
    a, b = an_evaluation(tmp_path / "a", [0, 1]), an_evaluation(tmp_path / "b", [1, 1], **setting)
    with pytest.raises(UserError, match="not of the same episodes"):
        compare.pair(a, b)


def test_two_runs_of_one_method_and_seed_are_refused(tmp_path):
    """Whatever the directories are called: the seed is that of config.json."""
    runs = [a_run(tmp_path / name, "rl", 0, [(1024, 6, 10)], {}) for name in ("rl-seed0", "rl-seed1")]
    with pytest.raises(UserError, match="rl-seed1 is a second rl of seed 0"):
        compare.methods(runs, tmp_path / "plot.png")


def test_pair_shows_a_film(tmp_path):
    a, b = an_evaluation(tmp_path / "a", [0]), an_evaluation(tmp_path / "b", [1])
    with pytest.raises(UserError, match="shows a state that was lost and is won now"):
        compare.pair(a, b, tmp_path / "both.gif")
    film(a / "videos", 0, False, 4, 90)
    film(b / "videos", 0, True, 4, 90)
    assert compare.pair(a, b, tmp_path / "both.gif").endswith(f"film: {tmp_path / 'both.gif'}")
    assert (tmp_path / "both.gif").exists()


def test_what_cannot_be_paired_is_one_line(tmp_path):
    a, b = an_evaluation(tmp_path / "a", [0]), an_evaluation(tmp_path / "b", [1, 1])
    fresh = an_evaluation(tmp_path / "c", [1], fresh=True)
    for other, what in (
        (b, "not of the same episodes"),
        (fresh, "not of the same episodes"),
        (tmp_path, "is no result"),
    ):
        with pytest.raises(UserError, match=what) as error:
            compare.pair(a, other)
        assert "\n" not in str(error.value)


def test_two_tests_give_the_difference_of_differences(tmp_path):
    """Rates of 20 episodes, by hand; the corner is what a paired t test of scipy says about the seeds' differences."""
    from scipy.stats import ttest_1samp

    wins = {  # on LIBERO's states, on placements
        "rl-seed0": (16, 15), "rl-seed1": (17, 17), "rl-seed2": (15, 16),
        "protocol-seed2": (18, 12), "protocol-seed0": (19, 14), "protocol-seed1": (17, 15),
        "start": (10, 12),
    }  # fmt: skip
    for name, (states, placements) in wins.items():
        for file, k, fresh in (("states", states, False), ("placements", placements, True)):
            folder = an_evaluation(tmp_path / file / name, [1] * k + [0] * (20 - k), fresh=fresh)
            (tmp_path / name).mkdir(exist_ok=True)
            (folder / "results.json").rename(tmp_path / name / f"{file}.json")
    runs = [tmp_path / name for name in wins]
    table = compare.tests(runs, ["states.json", "placements.json"], tmp_path / "tests.png").splitlines()
    head, _, *lines = [line.strip("| ").split(" | ") for line in table]
    assert head == ["states", "placements", "states - placements", "... over episodes", "seeds"]
    rows = {name: cells for name, *cells in lines}
    assert list(rows) == ["rl", "protocol", "start", "protocol - rl"]

    def shown(values, sign="+"):  # in twentieths
        rates = [5 * value for value in values]
        low, high = ttest_1samp(rates, 0).confidence_interval(0.95)
        high = high if sign else min(high, 100)  # a rate
        return f"{sum(rates) / 3:{sign}.1f} ({low:.1f} to {high:.1f})"

    def over_episodes(*terms):
        low, high = (100 * end for end in contrast_interval(*terms))
        return f"{low:.1f} to {high:.1f}"

    states, placements = (+1, 18 + 19 + 17, 60), (-1, 12 + 14 + 15, 60)
    seeds = [shown([18, 19, 17], ""), shown([12, 14, 15], ""), shown([6, 5, 2])]
    assert rows["protocol"] == [*seeds, over_episodes(states, placements), "3"]
    all_four = states, placements, (-1, 16 + 17 + 15, 60), (+1, 15 + 17 + 16, 60)
    seeds = [shown([3, 3, 0]), shown([-4, -1, -2]), shown([7, 4, 2])]
    assert rows["protocol - rl"] == [*seeds, over_episodes(*all_four), "3"]
    # One seed: over episodes, Wilson's and Newcombe's.
    low, high = (100 * end for end in contrast_interval((+1, 10, 20), (-1, 12, 20)))
    assert rows["start"][2:] == [f"-10.0 ({low:.1f} to {high:.1f})", f"{low:.1f} to {high:.1f}", "1"]
    low, high = (100 * end for end in wilson_interval(10, 20))
    assert rows["start"][0] == f"50.0 ({low:.1f} to {high:.1f})"
    one = [tmp_path / "rl-seed0", tmp_path / "protocol-seed0"]
    corner = compare.tests(one, ["states.json", "placements.json"], tmp_path / "tests.png").splitlines()[-1]
    terms = (+1, 19, 20), (-1, 14, 20), (-1, 16, 20), (+1, 15, 20)
    low, high = (100 * end for end in contrast_interval(*terms))
    assert corner.endswith(f" | +20.0 ({low:.1f} to {high:.1f}) | {low:.1f} to {high:.1f} | 1 |")
    with Image.open(tmp_path / "tests.png") as picture:
        assert picture.width > 500
    # Another test than the first run's
    with pytest.raises(UserError, match="start/b.json are not of the same episodes, or not sampled alike"):
        (tmp_path / "rl-seed0" / "b.json").write_text((tmp_path / "rl-seed0" / "states.json").read_text())
        (tmp_path / "start" / "b.json").write_text((tmp_path / "start" / "placements.json").read_text())
        compare.tests([tmp_path / "rl-seed0", tmp_path / "start"], ["states.json", "b.json"], "no.png")
    with pytest.raises(UserError, match="give two files"):
        compare.tests(one, ["states.json"], "no.png")
    for refuses in (
        lambda: compare.tests(one * 2, ["a", "b"], "no.png"),
        lambda: compare.methods(one * 2, "no.png"),
    ):
        with pytest.raises(UserError, match="--runs: rl-seed0 is there twice"):
            refuses()


def the_suites(folder, wins):
    """results/ with the start policy's episodes {suite: wins} and those of trained ones {(suite, seed): wins}."""
    for key, won in wins.items():
        suite, name = (key, "start") if isinstance(key, str) else (key[0], f"rl-seed{key[1]}")
        (folder / suite).mkdir(parents=True, exist_ok=True)
        an_evaluation(folder / suite / name, won)
        if name != "start":
            (folder / suite / name / "config.json").write_text(json.dumps({"seed": key[1]}))
            lines = [
                {"charts/decisions": 512 * k, "charts/episodes": 20, "charts/successes": k} for k in (1, 2, 3)
            ]
            (folder / suite / name / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
    return folder


def an_evaluated_training(tmp_path):
    """Iterations of 1,024 decisions; the start policy and iteration 2 evaluated sampled, the latter also greedily."""
    run = Path(a_run(tmp_path / "long-seed1", "long", 1, [(1024, 1, 2), (2048, 1, 2)], {}))
    for name, wins, settings in (
        ("000000/sampled.json", [1] * 12 + [0] * 8, {"temperature": 0.6}),
        ("000002/sampled.json", [1] * 18 + [0] * 2, {"temperature": 0.6}),
        ("000002/greedy.json", [1] * 5 + [0] * 15, {"temperature": 0}),
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (an_evaluation(tmp_path / name, wins, **settings) / "results.json").rename(run / name)
    return run


def test_along_a_training_has_a_row_per_budget_and_a_column_per_way_to_act(tmp_path):
    run = an_evaluated_training(tmp_path)
    (run / "2nd").mkdir()  # no iteration
    (run / "2nd" / "sampled.json").write_text("{")
    table = compare.along([str(run)], ["sampled.json", "greedy.json"], tmp_path / "along.png")

    def cell(won):
        low, high = wilson_interval(won, 20)
        return f"{5 * won:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    assert table.splitlines() == [
        "| decisions | long-seed1, sampled | long-seed1, greedy |",
        "|---:|---:|---:|",
        f"| 0 | {cell(12)} |  |",
        f"| 2,048 | {cell(18)} | {cell(5)} |",
    ]
    assert Image.open(tmp_path / "along.png").width > 500


@pytest.mark.parametrize(
    ("file", "wins", "settings", "what"),
    [
        ("000001/sampled.json", [1] * 20, {"temperature": 1.0}, "000001/sampled.json is not of the same"),
        ("000001/sampled.json", [1] * 10, {"temperature": 0.6}, "000001/sampled.json is not of the same"),
        ("000003/sampled.json", [1] * 20, {"temperature": 0.6}, "metrics.jsonl has no iteration 3"),
        ("000001/sampled.json", None, {}, "000001/sampled.json is no result of eval.py"),
        (
            "elsewhere/greedier.json",
            [1] * 20,
            {"temperature": 0},
            "ITERATION/greedier.json: eval.py writes it",
        ),
    ],
)
def test_along_refuses_what_cannot_be_beside_each_other(tmp_path, file, wins, settings, what):
    run = an_evaluated_training(tmp_path)
    (run / file).parent.mkdir(exist_ok=True)
    if wins:
        (an_evaluation(tmp_path / "other", wins, **settings) / "results.json").rename(run / file)
    else:
        (run / file).write_text("{")
    with pytest.raises(UserError, match=what) as error:
        compare.along([run], [Path(file).name], tmp_path / "along.png")
    assert "\n" not in str(error.value) and not (tmp_path / "along.png").exists()


def test_table_1_has_intervals_over_seeds_or_over_the_episodes_of_one(tmp_path):
    from scipy.stats import ttest_1samp

    start, better, best = [0] * 12 + [1] * 8, [0] * 6 + [1] * 14, [0] * 4 + [1] * 16
    wins = {(suite, 0): better for suite in compare.SUITES} | {suite: start for suite in compare.SUITES}
    wins |= {("libero_goal", 1): best, ("libero_goal", 7): start}
    folder = the_suites(tmp_path / "results", wins)
    (folder / "libero_object" / "rl-seed1").mkdir()  # not evaluated yet: no row counts it
    table = compare.suites(folder, tmp_path / "suites.png", "results.json").splitlines()
    rows = {cells[0]: dict(zip(names, cells[1:], strict=True)) for names, cells in (
        (table[0].strip("| ").split(" | "), line.strip("| ").split(" | ")) for line in table[2:]
    )}  # fmt: skip
    assert list(rows["seeds"]) == [*compare.SUITES, "all"]
    assert list(rows["seeds"].values()) == ["1", "1", "3", "1", "1"]
    assert list(rows["episodes each"].values()) == ["20", "20", "20", "20", "80"]

    def shown(mean, interval, sign=""):
        return f"{mean:{sign}.1f} ({interval[0]:.1f} to {interval[1]:.1f})"

    def wilson(k, n):  # from its formula
        z, p = 1.959964, k / n
        middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + (z / 2 / n) ** 2) ** 0.5
        return [100 * (middle + side * half) / (1 + z * z / n) for side in (-1, 1)]

    assert rows["SFT"]["libero_object"] == shown(40, wilson(8, 20))
    assert rows["VLA-RL"]["libero_object"] == shown(70, wilson(14, 20))
    assert rows["gain"]["libero_object"] == shown(30, paired(start, better), "+")
    seeds = ttest_1samp([70, 80, 40], 0).confidence_interval(0.95)
    assert seeds.high > 100 and rows["VLA-RL"]["libero_goal"] == shown(190 / 3, (seeds.low, 100))
    # Of independent errors, squares add up: chance over the seeds, and in the one evaluation of the start policy.
    (least, most), mean = wilson(8, 20), 190 / 3
    low, high = (
        ((mean - seeds.low) ** 2 + (most - 40) ** 2) ** 0.5,
        ((100 - mean) ** 2 + (40 - least) ** 2) ** 0.5,
    )
    assert rows["gain"]["libero_goal"] == shown(70 / 3, (70 / 3 - low, 70 / 3 + high), "+")
    # All suites: seed 0 alone, which each of them has.
    assert rows["SFT"]["all"] == shown(40, wilson(32, 80))
    assert rows["VLA-RL"]["all"] == shown(70, wilson(56, 80))
    assert rows["gain"]["all"] == shown(30, paired(start * 4, better * 4), "+")
    with Image.open(tmp_path / "suites.png") as picture:
        assert picture.width > 3 * picture.height  # four panels


def test_seeds_that_are_alike_have_an_interval_over_their_episodes(tmp_path):
    """By chance two seeds win equally many; on LIBERO-PRO's hardest variants all of them win nothing. No interval has width 0."""
    wins = {"libero_goal": [0] * 10, "libero_10": [0] * 5 + [1] * 5}
    wins |= {("libero_goal", 0): [0] * 10, ("libero_goal", 1): [0] * 10}
    wins |= {("libero_10", 0): [1, 1] + [0] * 4 + [1] * 4, ("libero_10", 1): [0] * 4 + [1] * 6}
    folder = the_suites(tmp_path / "a", wins)
    rows = [line.split(" | ")[1:] for line in compare.suites(folder, None, "results.json").splitlines()[2:]]
    low, high = (100 * end for end in wilson_interval(0, 20))
    assert rows[1][0] == f"0.0 ({low:.1f} to {high:.1f})" and high > 15
    low, high = (100 * end for end in wilson_interval(12, 20))
    assert rows[1][1] == f"60.0 ({low:.1f} to {high:.1f}) |"
    low, high = paired([0] * 20, [0] * 20)
    assert rows[2][0] == f"+0.0 ({low:.1f} to {high:.1f})" and high > 4
    low, high = paired([1] + [0] * 19, [0] + [1] * 3 + [0] * 16)
    assert rows[2][1] == f"+10.0 ({low:.1f} to {high:.1f}) |"
    for seed in (0, 1):
        an_evaluation(tmp_path / "b" / f"rl-seed{seed}", [1] * 7 + [0] * 3)
    runs = [tmp_path / "b" / f"rl-seed{seed}" for seed in (0, 1)]
    table = compare.tests(runs, ["results.json", "results.json"], tmp_path / "tests.png")
    low, high = (100 * end for end in wilson_interval(14, 20))
    assert f"| rl | 70.0 ({low:.1f} to {high:.1f}) |" in table
    for seed in (0, 1):  # where no interval over episodes is given either, there is none
        run = Path(a_run(tmp_path / f"rl-seed{seed}", "rl", seed, [(1024, 6, 10)], {}))
        (run / "end.json").write_text(json.dumps({"total": {"successes": 7, "episodes": 10}}))
    runs = [tmp_path / f"rl-seed{seed}" for seed in (0, 1)]
    assert (
        "| rl | 70.0 | 70.0 | 70.0 |  |  |  |" in compare.methods(runs, tmp_path / "plot.png", "end.json")[0]
    )


def test_figure_names_every_line_once_where_the_last_suite_has_several_seeds(tmp_path, monkeypatch):
    wins = {(suite, seed): [0, 1] for suite in compare.SUITES for seed in (0, 1, 2)}
    folder = the_suites(tmp_path / "results", wins | {suite: [0, 0] for suite in compare.SUITES})
    figures = []
    monkeypatch.setattr(compare, "save_png", lambda figure, path: figures.append(figure))
    compare.suites(folder, tmp_path / "suites.png", "results.json")
    (legend,) = figures[0].legends
    training, evaluation = (text.get_text() for text in legend.get_texts())
    assert training.startswith("training episodes") and evaluation.startswith("evaluation on test states")


def test_table_1_leaves_out_what_is_missing_and_refuses_other_episodes(tmp_path):
    with pytest.raises(UserError, match="no results.json in"):
        compare.suites(tmp_path, evaluation="results.json")
    wins = {"libero_goal": [0, 1], ("libero_goal", 0): [1, 1], "libero_10": [0, 1]}
    folder = the_suites(tmp_path / "a", wins)
    assert compare.suites(folder, evaluation="results.json").splitlines()[0] == "| | libero_goal |"
    # A suite whose start policy was not evaluated, and a run that was set aside: in the figure neither.
    wins |= {("libero_object", 0): [1, 1]}
    folder = the_suites(tmp_path / "b", wins)
    (folder / "libero_goal" / "rl-seed0-old").mkdir()
    (folder / "libero_goal" / "rl-seed0-old" / "results.json").write_text("")
    table = compare.suites(folder, tmp_path / "suites.png", "results.json")
    assert table.splitlines()[0] == "| | libero_goal |" and (tmp_path / "suites.png").exists()
    folder = the_suites(tmp_path / "c", wins | {("libero_goal", 0): [1, 1, 1]})
    with pytest.raises(UserError, match="not of the same episodes"):
        compare.suites(folder, evaluation="results.json")


def test_table_1_of_other_columns_has_no_sum_and_wants_all_of_them(tmp_path):
    """LIBERO-PRO's variants are not the paper's four suites: a mean over them is nobody's number."""
    variants = [f"libero_object{change}" for change in ("", "_lan", "_task", "_swap")]
    wins = {name: [0, 0] for name in variants} | {(name, 0): [0, 1] for name in variants}
    folder = the_suites(tmp_path / "a", wins)
    table = compare.suites(folder, evaluation="results.json", names=variants).splitlines()
    assert table[0] == f"| | {' | '.join(variants)} |" and table[3].count("50.0 (") == 4
    with pytest.raises(UserError, match="no results.json in .*/libero_object_object/start and "):
        compare.suites(folder, evaluation="results.json", names=[*variants, "libero_object_object"])


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"whole_vocabulary": True}, {"fresh": True}])
def test_table_1_refuses_policies_that_acted_in_other_ways(tmp_path, setting):
    (tmp_path / "libero_goal").mkdir()
    common = {"temperature": 0.6, "whole_vocabulary": False, "fresh": False}
    an_evaluation(tmp_path / "libero_goal" / "start", [0, 1], **common)
    an_evaluation(tmp_path / "libero_goal" / "rl-seed0", [1, 1], **common | setting)
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"not alike: {name} is {common[name]} and {value}"):
        compare.suites(tmp_path, evaluation="results.json")


def a_run(directory, mode, seed, points, final):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"prm_mode": mode, "seed": seed}))
    lines = []
    for i, (at, k, n) in enumerate(points):
        lines.append(
            {"iteration": i + 1, "charts/decisions": at or 512, "eval/successes": k, "eval/episodes": n}
        )
        if at == 0:
            lines[-1]["eval/at"] = 0
    lines.append({"iteration": 9, "charts/decisions": 2048})
    for line in lines:
        line |= {"charts/episodes": 10, "charts/successes": 3 + seed}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    totals = {name: {"total": {"successes": k, "episodes": n}} for name, (k, n) in final.items()}
    (directory / "results.json").write_text(json.dumps(totals))
    return str(directory)


def points(run):
    _, lines, results = report.read_run(run)
    return report.evaluation_points(lines, results)


def test_comparison_takes_seeds_as_samples_and_prefers_the_longer_final_evaluation(tmp_path):
    both, alone = [(0, 4, 10), (1024, 6, 10)], [(0, 5, 10)]
    runs = {
        ("full", 0): (20, 40),
        ("full", 1): (30, 45),
        ("full", 2): (25, 41),
        ("none", 0): (25, 30),
        ("none", 1): (26, 41),
    }
    names = []
    for (method, seed), (start, trained) in runs.items():
        final = {"start": (start, 50), "trained": (trained, 50)}
        directory = tmp_path / f"{method}-seed{seed}"
        names.append(a_run(directory, method, seed, both if method == "full" else alone, final))
    assert points(names[0]) == [(0, 20, 50), (1024, 6, 10), (2048, 40, 50)]
    ends, training = compare.methods(names, tmp_path / "plot.png")
    table = ends.splitlines()
    assert table[0].startswith("|  | seed 0 | seed 1 | seed 2 | mean | 95 % | minus full |")
    # 80, 90, 82: mean 84, standard deviation 5.2915, t(2 degrees of freedom) 4.30265
    half = 4.30265 * 5.2915 / 3**0.5
    assert table[2].startswith(
        f"| full | 80.0 | 90.0 | 82.0 | 84.0 | {84 - half:.1f} to {84 + half:.1f} |  |  | 2,048 | 50 |"
    )
    # -20 and -8, seed by seed: mean -14, standard deviation 8.4853, t(1) 12.7062
    half = 12.7062 * 8.4853 / 2**0.5
    assert "| none | 60.0 | 82.0 |  | 71.0 | " in table[3]
    assert f"| -14.0 | {-14 - half:.1f} to +{half - 14:.1f} | 2,048 | 50 |" in table[3]
    # eval.py's, of the run's policy: no start policy there
    by_eval = json.dumps({"total": {"successes": 30, "episodes": 60}})
    with pytest.raises(UserError, match="elsewhere.json"):  # not its other evaluations instead
        compare.methods(names[3:4], tmp_path / "plot.png", "elsewhere.json")
    (Path(names[3]) / "elsewhere.json").write_text(by_eval)
    assert "| none | 50.0 | " in compare.methods(names[3:4], tmp_path / "plot.png", "elsewhere.json")[0]
    (Path(names[3]) / "results.json").write_text(by_eval)
    assert points(names[3]) == [(0, 5, 10), (2048, 30, 60)]
    assert Image.open(tmp_path / "plot.png").width > 500
    # three iterations or two, so that one of the quarters is empty; as many episodes in each
    assert training.splitlines()[2:] == [
        "| full | 30, 40, 50 | 30, 40, 50 | 30, 40, 50 | -, -, - | 30, 40, 50 | 0, 1, 2 |",
        "| none | 30, 40 | 30, 40 | -, - | -, - | 30, 40 | 0, 1 |",
    ]


def test_success_in_training_is_of_the_episodes_of_each_quarter(tmp_path):
    """Seeds in order however they were named, iterations weighted by their episodes, a quarter without episodes none."""
    names, played = [], [0, 4, 10, 10, 0, 0, 1, 3]
    won = {1: [0, 1, 3, 7, 0, 0, 1, 3], 0: [0, 4, 0, 0, 0, 0, 0, 0]}
    for seed, wins in won.items():
        names.append(a_run(tmp_path / f"rl-seed{seed}", "rl", seed, [], {"trained": (1, 2)}))
        lines = [
            {"iteration": i + 1, "charts/decisions": 8 * i + 8, "charts/episodes": n, "charts/successes": k}
            for i, (n, k) in enumerate(zip(played, wins, strict=True))
        ]
        (Path(names[-1]) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, training = compare.methods(names, tmp_path / "plot.png")
    assert training.splitlines()[2:] == ["| rl | 100, 25 | 0, 50 | -, - | 0, 100 | 14, 54 | 0, 1 |"]
    # five iterations after an evaluation: 2, 1, 1 and 1 of them
    before = {"iteration": 0, "charts/decisions": 0, "charts/episodes": 0, "charts/successes": 0}
    (Path(names[0]) / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [before, *lines[:5]])
    )
    _, training = compare.methods(names[:1], tmp_path / "plot.png")
    assert training.splitlines()[2:] == ["| rl | 100 | 0 | 0 | - | 17 | 1 |"]
    decisions, rate = report.training_curve(
        lines, window=3
    )  # of seed 0: 4 of 14, 4 of 24, 0 of 20, 0 of 10, ...
    assert list(decisions) == [8, 16, 24, 32, 40, 48, 56, 64]
    np.testing.assert_allclose(rate, [np.nan, np.nan, np.nan, 100 / 6, 0, np.nan, np.nan, np.nan])
    assert [len(part) for part in report.training_curve([])] == [0, 0]


@pytest.mark.parametrize(
    "points, final, what", [([], {}, "never evaluated"), ([(512, 1, 2)], {}, "common number")]
)
def test_runs_that_cannot_be_compared_are_one_line(tmp_path, points, final, what):
    a = a_run(tmp_path / "none-seed0", "none", 0, points, final)
    b = a_run(tmp_path / "none-seed1", "none", 1, [(1024, 1, 2)], final)
    for directory in (a, b):
        (Path(directory) / "results.json").unlink()
    with pytest.raises(UserError, match=what):
        compare.methods([a, b], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
