"""What a run leaves behind: the film before / after, and the comparison of several runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import _write_video
from support import report
from support.errors import UserError
from support.files import write_film
from support.statistics import wilson_interval


def film(directory, task, success, length, grey):
    frames = [np.full((256, 256, 3), grey, np.uint8)] * length
    _write_video(
        directory, frames, {"task_id": task, "init_state": 0, "success": success, "steps": 4 * length}, 4
    )


def test_before_after_shows_the_state_that_was_lost_and_is_won(tmp_path):
    for task, lost, won in (
        (0, False, False),
        (1, True, True),
        (2, False, True),
    ):  # only task 2 changed sides
        film(tmp_path / "start", task, lost, 9, 40 + 20 * task)
        film(tmp_path / "trained", task, won, 5, 140 + 20 * task)
    path = tmp_path / "both.gif"
    assert report.before_after_gif(path, tmp_path / "start", tmp_path / "trained", side=64)
    with Image.open(path) as gif:
        assert gif.size == (128, 64) and gif.n_frames > 1
        gif.seek(0)
        picture = np.asarray(gif.convert("L"), int)
        assert abs(picture[40:, :64].mean() - 80) < 8 and abs(picture[40:, 64:].mean() - 180) < 8
    assert not list(tmp_path.glob("*.tmp*"))


def test_without_such_a_state_there_is_no_film(tmp_path):
    film(tmp_path / "start", 0, True, 4, 90)
    film(tmp_path / "trained", 0, True, 4, 90)
    assert not report.before_after_gif(tmp_path / "both.gif", tmp_path / "start", tmp_path / "trained")
    assert not (tmp_path / "both.gif").exists()


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
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    totals = {name: {"total": {"successes": k, "episodes": n}} for name, (k, n) in final.items()}
    (directory / "results.json").write_text(json.dumps(totals))
    return str(directory)


def test_comparison_pools_seeds_and_prefers_the_longer_final_evaluation(tmp_path):
    a = a_run(tmp_path / "a", "sum", 0, [(0, 4, 10), (1024, 6, 10)], {"start": (20, 50), "trained": (40, 50)})
    b = a_run(tmp_path / "b", "sum", 1, [(0, 5, 10), (1024, 7, 10)], {"start": (30, 50), "trained": (45, 50)})
    c = a_run(tmp_path / "c", "none", 0, [(0, 5, 10)], {"start": (25, 50), "trained": (26, 50)})
    assert report.evaluations(a)[0] == [(0, 20, 50), (1024, 6, 10), (2048, 40, 50)]
    table = report.compare([a, b, c], tmp_path / "plot.png")
    low, high = wilson_interval(85, 100)
    assert f"| sum | all | 2,048 | 85.0 % | {100 * low:.1f} to {100 * high:.1f} | 100 |" in table
    assert "| none | 0 | 0 | 50.0 % |" in table and "| none | all |" not in table
    by_eval = json.dumps(
        {"total": {"successes": 30, "episodes": 60}}
    )  # eval.py's, of the run's policy: no start policy there
    (Path(c) / "results.json").write_text(by_eval)
    assert report.evaluations(c)[0] == [(0, 5, 10), (2048, 30, 60)]
    assert Image.open(tmp_path / "plot.png").width > 500


def test_not_a_run_directory_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.evaluations(tmp_path)


def test_film_shows_the_scores_as_a_strip(tmp_path):
    """Under the picture one bar per decision, as high as its score; green once it has happened."""
    import imageio

    T, scores = 6, [0.1, 0.9, 0.5, 0.3, 1.0, 0.0]
    frames = [np.full((64, 64, 3), 120, np.uint8)] * T
    report.write_video(
        tmp_path / "film.mp4", frames, [0.0] * T, [0.0] * T, scores, [0, 0, 0, -1, 0, 0], fps=5, first=3
    )
    with imageio.get_reader(tmp_path / "film.mp4") as reader:
        film = [np.asarray(frame, int) for frame in reader]
    assert len(film) == T and film[0].shape[0] > film[0].shape[1]  # the strip makes it higher than wide
    width = film[0].shape[1]
    for t, picture in enumerate(film):
        for k, score in enumerate(scores):
            column = picture[width:, round((k + 0.5) * width / T)]  # (height of the strip, 3)
            green = column[:, 1] - column[:, 0] > 40
            bright = column.sum(axis=1) > 120
            height = 40 * score
            assert abs(bright.sum() - height) <= 5
            assert green.sum() == 0 if k > t else abs(green.sum() - height) <= 5


def test_a_film_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    write_film(tmp_path / "file" / "film.mp4", [np.zeros((64, 64, 3), np.uint8)] * 2, 5)
    assert capsys.readouterr().err.startswith("warning: no video") and [
        p.name for p in tmp_path.iterdir()
    ] == ["file"]


@pytest.mark.parametrize(
    "points, final, what", [([], {}, "never evaluated"), ([(512, 1, 2)], {}, "common number")]
)
def test_runs_that_cannot_be_compared_are_one_line(tmp_path, points, final, what):
    a = a_run(tmp_path / "a", "none", 0, points, final)
    b = a_run(tmp_path / "b", "none", 1, [(1024, 1, 2)], final)
    for directory in (a, b):
        (Path(directory) / "results.json").unlink()
    with pytest.raises(UserError, match=what):
        report.compare([a, b], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
