"""What a run leaves behind: curves, films, the comparison of several runs, and report.html."""

import json
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import report
from support.episodes import write_episode_film
from support.errors import UserError
from support.files import write_film
from support.statistics import contrast_interval, paired_interval, wilson_interval


def film(directory, task, success, length, grey):
    frames = [np.full((256, 256, 3), grey, np.uint8)] * length
    write_episode_film(
        directory, frames, {"task_id": task, "init_state": 0, "success": success, "steps": 4 * length}, 4
    )


def test_before_after_shows_the_state_that_was_lost_and_is_won(tmp_path):
    # Only task 2 changed sides.
    for task, lost, won in ((0, False, False), (1, True, True), (2, False, True)):
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


def test_not_a_run_directory_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.read_run(tmp_path)


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


def test_a_film_without_ffmpeg_is_a_warning_too(tmp_path, monkeypatch, capsys):
    def no_ffmpeg(*_, **__):
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio.mimwrite", no_ffmpeg)
    write_film(tmp_path / "film.mp4", [np.zeros((64, 64, 3), np.uint8)] * 2, 5)
    assert "warning: no video" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_picture_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*plot.png"):
        report.save_png(report.new_figure(), tmp_path / "file" / "plot.png")


# ---- report.html -----------------------------------------------------------------------------------------------------

EVIL = "<script>alert('$x^')</script> & \"quotes\""


class Page(HTMLParser):
    """What a browser would see: elements, attributes that load something, and the text."""

    VOID = {"meta", "img", "br", "input", "hr", "link"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.sources, self.links, self.words, self.open = [], [], [], [], []
        self.feed(Path(path).read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), "a handler"
            (self.links if name == "href" else self.sources if name == "src" else []).append(value)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def full_run(out, tasks=("pick up the soup", EVIL), suite="libero_object"):
    """As train.py leaves it: three iterations, an evaluation before and one after, films."""
    out.mkdir()
    (out / "config.json").write_text(
        json.dumps({"suite": suite, "seed": 3, "total_steps": 1536, "lr": 1e-3, "model": EVIL})
    )
    lines = [{"iteration": 0, "charts/decisions": 0, "charts/episodes": 0, "charts/successes": 0}]
    lines[0] |= {"eval/success_rate": 0.5, "eval/successes": 5, "eval/episodes": 10}
    for i in (1, 2, 3):
        line = {"iteration": i, "charts/decisions": 512 * i, "charts/episodes": 9, "charts/successes": 3 + i}
        line |= {
            "losses/value_loss": 1 / i,
            "curriculum/task_0": 0.3,
            "curriculum/task_1": 0.7,
            "charts/prm_score": float("nan"),
        }
        lines.append(line | ({"losses/approx_kl": 0.01 * i} if i > 1 else {}))
    (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    def rows(k):
        each = [{"task_id": t, "instruction": s, "successes": k, "episodes": 10} for t, s in enumerate(tasks)]
        return {
            "tasks": each,
            "total": {"task_id": None, "instruction": "all tasks", "successes": 2 * k, "episodes": 20},
        }

    (out / "results.json").write_text(json.dumps({"start": rows(5), "trained": rows(9)}))
    for name in (
        "rollout_00001",
        "rollout_00002",
        "start/task0_state0_success",
        f"start/{EVIL.replace('/', '_')}",
    ):
        write_film(out / "videos" / f"{name}.mp4", [np.zeros((64, 64, 3), np.uint8)] * 2, 5)
    Image.new("RGB", (8, 4)).save(out / "before_after.gif")
    return out


def test_page_says_the_result_and_needs_nothing_else(tmp_path):
    out = full_run(tmp_path / "run")
    page = Page(report.write_report(out))
    assert "After 1,536 decisions the policy succeeds in 90.0 % (69.9 to 97.2, 20 episodes)" in page.text
    assert "the start policy in 50.0 % (29.9 to 70.1, 20 episodes) : +40.0 points" in page.text
    assert f"python train.py --resume {out}" in page.text and "1,536 of 1,536 decisions" in page.text
    assert "50 % (24 to 76)" in page.text and "90 % (60 to 98)" in page.text  # per task, before and after
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    kinds = [source.split(";")[0] for source in page.sources]
    assert kinds.count("data:video/mp4") == 2 and kinds.count("data:image/gif") == 1
    # success, KL, value loss, curriculum; RPRM score was never a number
    assert kinds.count("data:image/svg+xml") == 4
    assert len(page.links) == 2 and all((out / urllib.parse.unquote(link)).is_file() for link in page.links)
    assert not page.open and not list(out.glob("*.tmp")) and not list(out.glob(".*"))


def test_page_shows_hostile_text_as_text(tmp_path):
    page = Page(report.write_report(full_run(tmp_path / "run", suite=EVIL)))
    assert "script" not in page.tags
    assert page.text.count("<script>alert('$x^')</script> & \"quotes\"") >= 3  # title, heading, task
    report.draw(tmp_path / "run")  # the title of the PNG as well
    assert (tmp_path / "run" / "success.png").exists()


def test_page_of_a_run_that_goes_on(tmp_path):
    """At every moment of its life, half a line of metrics included."""
    out = full_run(tmp_path / "run")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "results.json").unlink()
    for found, words in (
        ([], "No evaluation yet; 0 decisions so far."),
        (lines[:1], "The start policy succeeds in 50.0 %"),
        ([*lines[:3], lines[3][:20]], "trained for 1,024 decisions since"),
        (lines[1:], "No evaluation yet; 1,536 decisions so far."),
    ):
        (out / "metrics.jsonl").write_text("".join(found))
        assert words in Page(report.write_report(out)).text
    line = json.loads(lines[3]) | {"eval/successes": 8, "eval/episodes": 10}
    (out / "metrics.jsonl").write_text(lines[0] + json.dumps(line) + "\n")
    assert "+30.0 points" in Page(report.write_report(out)).text
    (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert (
        "succeeds in 80.0 % (49.0 to 94.3, 10 episodes) of the test states."
        in Page(report.write_report(out)).text
    )


def test_large_films_are_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED_BYTES", 100)
    out = full_run(tmp_path / "run")
    page = Page(report.write_report(out))
    assert "videos/rollout_00001.mp4" in page.sources and not any(
        "video/mp4" in source for source in page.sources
    )


def test_a_page_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    out = full_run(tmp_path / "run")
    report.draw(out)
    before = (out / "report.html").read_text()
    (out / "metrics.jsonl").unlink()
    report.draw(out)
    assert capsys.readouterr().err.startswith("warning: no success.png or report.html: ")
    assert (out / "report.html").read_text() == before


@pytest.mark.parametrize("before, after, low, high", [  # Newcombe 1998, table II, method 10, signs turned
    ((48, 80), (56, 70), 0.0524, 0.3339),
    ((3, 10), (9, 10), 0.1705, 0.8090),
    ((0, 10), (10, 10), 0.6075, 1.0),
])  # fmt: skip
def test_interval_of_a_difference(before, after, low, high):
    assert contrast_interval((-1, *before), (+1, *after)) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_paired_episodes_covers_the_gain():
    """In 95 of 100 repetitions, also where hardly an episode changes sides, and where none does it is no point."""
    rng, n = np.random.default_rng(0), 100
    for won, lost, most in (
        (0.25, 0.1, 0.98),
        (0.03, 0.01, 1.0),
    ):  # wider than it need be where hardly any changes
        covered = 0
        for row in rng.choice((1, -1, 0), (400, n), p=(won, lost, 1 - won - lost)):
            low, high = paired_interval(row.tolist())
            covered += low <= won - lost <= high
        assert 0.92 < covered / 400 <= most
    low, high = paired_interval([0] * n)
    assert low == -high and 0.01 < high < 0.03  # three changes of 100 in vain would be likely to show


def test_interval_of_a_difference_of_differences_covers_it():
    """In 95 of 100 repetitions, here with rates as on LIBERO-Object; of a single rate it is Wilson's."""
    assert contrast_interval((+1, 3, 10)) == pytest.approx(wilson_interval(3, 10))
    rng, rates, signs, n = np.random.default_rng(0), np.array([0.93, 0.9, 0.85, 0.7]), (1, -1, -1, 1), 100
    truth, covered = rates @ signs, 0
    for wins in rng.binomial(n, rates, (400, 4)):
        low, high = contrast_interval(*((sign, k, n) for sign, k in zip(signs, wins, strict=True)))
        covered += low <= truth <= high
    assert 0.92 < covered / 400 < 0.98
