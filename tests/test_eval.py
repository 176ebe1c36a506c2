"""eval.py: the table's arithmetic, and an evaluation that gives one answer however it was run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_envs import _soup_in_basket

from eval import Args, EpisodeLog, EvalResult, evaluate, main, print_plan, protocol_episodes
from simulator.shared import FRESH
from simulator.suites import instructions
from support.cli import parse_args
from support.errors import UserError
from support.statistics import wilson_interval

ROOT = Path(__file__).resolve().parents[1]
SUITE = "libero_object"


def _episodes(outcomes):
    return [
        {"task_id": task, "init_state": i, "success": s, "steps": 100 + i if s else 280}
        for task, row in outcomes.items()
        for i, s in enumerate(row)
    ]


def test_table_counts_and_intervals():
    result = EvalResult(
        SUITE, ["zero", "one", "two"], _episodes({2: [True, False, True, False], 0: [False] * 4})
    )
    none, half, total = result.rows()
    assert (none["task_id"], none["instruction"], none["successes"], none["mean_steps"]) == (
        0,
        "zero",
        0,
        None,
    )
    assert (half["success_rate"], half["episodes"], half["mean_steps"]) == (0.5, 4, 101.0)
    assert (total["successes"], total["episodes"]) == (2, 8) and result.success_rate == 0.25
    assert (total["low"], total["high"]) == wilson_interval(2, 8)
    lines = result.to_markdown().splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| 2 | two | 50.0 % | 15.0 to 85.0 % | 4 | 101 |" in lines
    unstable = EvalResult(SUITE, result.instructions, [{**result.episodes[1], "unstable": True}])
    assert unstable.to_markdown().endswith("diverged (task/initial state): 2/1")
    back = json.loads(json.dumps(result.to_dict()))
    assert EvalResult(SUITE, result.instructions, back["episodes"]).rows() == result.rows()
    assert EvalResult(SUITE, [], []).success_rate == 0.0


def test_log_survives_a_kill_and_refuses_other_settings(tmp_path):
    path, episodes = tmp_path / "a" / "episodes.jsonl", _episodes({0: [True, False]})
    log = EpisodeLog(path, {"seed": 1, "suite": SUITE})
    for episode in episodes:
        log.append(episode)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task_id": 0, "init_st')  # killed while writing
    log = EpisodeLog(path, {"seed": 1, "suite": SUITE})
    assert log.episodes == episodes and path.read_bytes() == whole
    log.append(episodes[0])
    assert EpisodeLog(path, {"seed": 1, "suite": SUITE}).episodes == [*episodes, episodes[0]]
    with pytest.raises(UserError, match="seed = 1, this command has 2"):
        EpisodeLog(path, {"seed": 2, "suite": SUITE})
    with pytest.raises(UserError, match="render = None, this command has light"):
        EpisodeLog(path, {"seed": 1, "suite": SUITE, "render": "light"})
    for garbage in (b"no json\n", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe\n"):
        path.write_bytes(garbage)
        with pytest.raises(UserError, match="not a log"):
            EpisodeLog(path, {"seed": 1})
        assert path.read_bytes() == garbage
    with pytest.raises(UserError, match="cannot write"):
        EpisodeLog(path / "below_a_file" / "episodes.jsonl", {})


# ---- on the simulator ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    from policy import build_tiny

    model = build_tiny(seed=0)
    model.norm_stats[SUITE] = {
        "action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    }
    return model


@pytest.fixture(scope="module")
def envs(model):
    from envs import LiberoVecEnv

    options = dict(action_repeat=model.action_repeat, max_steps=50, num_workers=1, progress=False)
    envs = LiberoVecEnv(SUITE, 3, [0, 1], **options)
    yield envs
    envs.close()


@pytest.fixture
def short(monkeypatch):
    """Episodes of 12 control steps, so that dozens of them take seconds."""
    from simulator.suites import MAX_STEPS

    monkeypatch.setitem(MAX_STEPS, SUITE, 12)


def _played(result):
    return sorted((e["task_id"], e["init_state"]) for e in result.episodes)


def _frames(directory):
    import imageio

    return {path.name: np.stack(imageio.mimread(path)) for path in sorted(directory.glob("*.mp4"))}


@pytest.mark.libero
def test_same_episodes_whatever_runs_beside_them(model, envs, short, tmp_path):
    """At a temperature above 0, so that every action depends on the sampling; the videos show what happened."""
    options = dict(temperature=1.0, seed=7, video=3, progress=False)
    together = evaluate(model, SUITE, [0, 1], 3, envs=envs, video_dir=tmp_path / "a", **options)
    evaluate(model, SUITE, [1], 3, num_envs=1, video_dir=tmp_path / "b", **options)
    assert _played(together) == [(t, i) for t in (0, 1) for i in range(3)]
    assert {e["steps"] for e in together.episodes} == {12}
    a, b = _frames(tmp_path / "a"), _frames(tmp_path / "b")
    assert len(a) == 6 and list(b) == [name for name in a if name.startswith("task01")]
    for name in b:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    first = a["task01_state00_failure.mp4"]
    assert first.shape[1:] == (256, 256, 3)
    different = evaluate(model, SUITE, [1], 1, envs=envs, video_dir=tmp_path / "c", **{**options, "seed": 8})
    assert different.row(1)["episodes"] == 1
    assert not np.array_equal(_frames(tmp_path / "c")["task01_state00_failure.mp4"], first)
    # Not told otherwise, it samples at the temperature that stands in the checkpoint.
    del options["temperature"]
    for name, given in (("d", {}), ("e", {"temperature": model.sampling_temperature})):
        evaluate(model, SUITE, [1], 1, envs=envs, video_dir=tmp_path / name, **options, **given)
    default, same = (_frames(tmp_path / name)["task01_state00_failure.mp4"] for name in "de")
    assert model.sampling_temperature == 0.6 and np.array_equal(default, same)
    assert not np.array_equal(default, first)


@pytest.mark.libero
def test_a_policy_reads_what_its_task_is_told(model, envs, short, tmp_path, monkeypatch):
    """Task 0 is told the sentence of task 1, and task 1 nothing new: one plays otherwise, the other as ever."""
    own, read = instructions(SUITE), []
    tokenize = model.tokenize
    monkeypatch.setattr(model, "tokenize", lambda given: read.extend(given) or tokenize(given))
    options = dict(envs=envs, seed=7, video=1, progress=False)
    evaluate(model, SUITE, [0, 1], 1, video_dir=tmp_path / "own", **options)
    assert set(read) == {own[0], own[1]}
    read.clear()
    told = [own[1], *own[1:]]
    result = evaluate(model, SUITE, [0, 1], 1, video_dir=tmp_path / "told", sentences=told, **options)
    assert set(read) == {own[1]} and result.row(0)["instruction"] == own[0]
    before, after = (_frames(tmp_path / name) for name in ("own", "told"))
    (zero, one) = sorted(before)
    assert np.array_equal(before[one], after[one]) and not np.array_equal(before[zero], after[zero])


@pytest.mark.libero
def test_a_success_is_counted_with_its_steps(model, envs, short, tmp_path):
    """Of two episodes of task 0, the first is put just before its goal."""
    decisions = []

    def put():
        decisions.append(None)
        if len(decisions) == 1:
            envs.set_state(_soup_in_basket(envs.get_state(), 0))

    options = dict(envs=envs, on_step=put, video=1, video_dir=tmp_path, progress=False)
    result = evaluate(model, SUITE, [0], 2, **options)
    first, second = result.to_dict()["episodes"]
    assert (first["init_state"], first["success"], second["success"], second["steps"]) == (0, True, False, 12)
    assert 4 < first["steps"] <= 8 and result.success_rate == 0.5
    assert result.row(0)["mean_steps"] == first["steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["task00_state00_success.mp4"]


@pytest.mark.libero
def test_interrupted_evaluation_goes_on(model, envs, short, tmp_path):
    whole = evaluate(model, SUITE, [0, 1], 4, envs=envs, progress=False)
    path, settings = tmp_path / "episodes.jsonl", {"suite": SUITE}
    log = EpisodeLog(path, settings)

    def interrupt_after_three(episode):
        log.append(episode)
        if len(path.read_text().splitlines()) == 1 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SUITE, [0, 1], 4, envs=envs, on_episode=interrupt_after_three, progress=False)
    log = EpisodeLog(path, settings)
    assert len(log.episodes) == 3
    rest = []
    options = dict(envs=envs, on_episode=rest.append, progress=False)
    resumed = evaluate(model, SUITE, [0, 1], 4, finished=log.episodes, **options)
    assert len(rest) == 5 and resumed.to_dict() == whole.to_dict()
    again = evaluate(model, SUITE, [0, 1], 4, finished=resumed.episodes, **options)
    assert len(rest) == 5 and again.to_dict() == whole.to_dict()
    twice = evaluate(
        model, SUITE, [0, 1], 4, finished=[*resumed.episodes, *rest], **options
    )  # by two processes, say
    assert len(rest) == 5 and twice.to_dict() == whole.to_dict()
    fewer = evaluate(model, SUITE, [1], 2, envs=envs, finished=resumed.episodes, progress=False)
    assert len(fewer.episodes) == 2


@pytest.mark.libero
def test_films_of_episodes_that_were_played_before_are_not_promised(model, short, tmp_path, capsys):
    model.save_pretrained(tmp_path / "policy")
    args = Args(str(tmp_path / "policy"), SUITE, [0], 2, num_envs=2, out=str(tmp_path / "out"))
    main(args)
    assert "to record" not in capsys.readouterr().err
    args.video, args.episodes_per_task = 2, 3
    main(args)
    assert "2 of the episodes to record were played before" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("videos/*"))
    args.video = 3
    main(args)
    assert "3 of the episodes to record were played before" in capsys.readouterr().err
    args.out = str(tmp_path / "again")
    for _ in range(2):  # and the second time they are all there
        main(args)
        assert "to record" not in capsys.readouterr().err
        assert len(list((tmp_path / "again").glob("videos/*.mp4"))) == 3


@pytest.mark.libero
def test_borrowed_environments_go_on_as_if_nothing_had_happened(model, envs, short):
    def some_steps():
        records = []
        for k in range(3):
            obs, _, _, truncated, info = envs.step(np.random.default_rng(k).uniform(-1, 1, (3, 7)))
            records.append((obs["agentview"].copy(), obs["task_id"], truncated, info["eef_pos"]))
        return records

    envs.reset(seed=0)
    some_steps()
    state = envs.get_state()
    expected = some_steps()
    envs.set_state(state)
    evaluate(model, SUITE, [0], 4, envs=envs, progress=False)
    assert envs.max_steps == 50
    for a, b in zip(expected, some_steps()):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


@pytest.mark.libero
def test_an_episode_that_always_kills_its_worker_ends_the_evaluation(model, envs, short, capfd, monkeypatch):
    monkeypatch.setattr("eval.MAX_LOST", 1)

    def kill():
        os.kill(envs.worker_pids[0], signal.SIGKILL)

    with pytest.raises(UserError, match="task 0, state 0 lost its simulator 2 times"):
        evaluate(model, SUITE, [0], 1, envs=envs, on_step=kill, progress=False)


@pytest.mark.libero
def test_a_killed_worker_costs_no_episode(model, envs, short, capfd):
    ended = []

    def kill_once(episode):
        ended.append(episode)
        if len(ended) == 1:
            os.kill(envs.worker_pids[0], signal.SIGKILL)

    result = evaluate(model, SUITE, [0, 1], 3, envs=envs, on_episode=kill_once, progress=False)
    assert _played(result) == [(t, i) for t in (0, 1) for i in range(3)]
    assert {e["steps"] for e in result.episodes} == {12}
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


@pytest.mark.libero
def test_an_unstable_simulation_is_a_failure_with_a_name(model, envs, short):
    """In the second step; its state is damaged between two steps, as a divergence would."""
    steps = []

    def damage():
        steps.append(None)
        if len(steps) == 1:
            state = envs.get_state()
            state["sim_0"][10] = 1e11
            envs.set_state(state)

    result = evaluate(model, SUITE, [0], 2, envs=envs, on_step=damage, progress=False)
    assert [
        (e["init_state"], e["success"], e.get("unstable", False)) for e in result.to_dict()["episodes"]
    ] == [
        (0, False, True),
        (1, False, False),
    ]
    assert "0/0" in result.to_markdown().splitlines()[-1]


@pytest.mark.libero
def test_bad_requests(model, envs):
    for arguments in [
        dict(task_ids=[99]),
        dict(episodes_per_task=0),
        dict(episodes_per_task=51),
        dict(suite="libero_goal", envs=envs),
        dict(task_ids=[5], envs=envs),
    ]:
        with pytest.raises(UserError):
            evaluate(model, **{"suite": SUITE, "task_ids": [0], "progress": False, **arguments})


@pytest.mark.libero
def test_fresh_placements_are_the_same_for_everybody(model, envs, short, tmp_path):
    """And no initial states of the suite: neither LIBERO's nor those that training draws."""
    options = dict(temperature=1.0, seed=7, video=2, progress=False, fresh=True)
    together = evaluate(model, SUITE, [0, 1], 2, envs=envs, video_dir=tmp_path / "a", **options)
    alone = evaluate(model, SUITE, [1], 2, num_envs=1, video_dir=tmp_path / "b", **options)
    assert _played(together) == [(t, FRESH + i) for t in (0, 1) for i in (0, 1)]
    assert _played(alone) == [(1, FRESH), (1, FRESH + 1)]
    films, again = _frames(tmp_path / "a"), _frames(tmp_path / "b")
    assert len(films) == 4 and len(again) == 2
    assert all(np.array_equal(films[name], frames) for name, frames in again.items())
    first = [film[0] for film in films.values()]  # no two alike
    first += list(envs.reset(seed=0)[0]["agentview"].copy())
    stored = evaluate(
        model, SUITE, [1], 2, envs=envs, video_dir=tmp_path / "c", **{**options, "fresh": False}
    )
    first += [film[0] for film in _frames(tmp_path / "c").values()]
    differ = [np.abs(a[20:].astype(int) - b[20:]).max() for k, a in enumerate(first) for b in first[:k]]
    assert _played(stored) == [(1, 0), (1, 1)] and min(differ) > 60
    assert protocol_episodes("libero_10_with_milk", [3], 2, fresh=True) == [(3, FRESH), (3, FRESH + 1)]


@pytest.mark.libero
def test_tasks_with_fewer_initial_states(model, envs, short, tmp_path, capsys, monkeypatch):
    """LIBERO-PRO's suites have 10 states, and some tasks none: what there is is played, and said."""
    assert protocol_episodes("libero_10_with_milk", [2, 3, 4, 5]) == [
        (t, i) for t in (2, 5) for i in range(10)
    ]
    assert len(protocol_episodes("libero_10_with_milk", None, 4)) == 4 * 8
    assert len(protocol_episodes(SUITE)) == 500
    with pytest.raises(UserError, match="no initial states of task 3, 4"):
        protocol_episodes("libero_10_with_milk", [3, 4])
    for module in ("eval", "envs"):
        monkeypatch.setattr(f"{module}.num_init_states", lambda suite, task: [2, 0, 50][task])
    assert _played(evaluate(model, SUITE, [0, 1], 3, envs=envs, progress=False)) == [(0, 0), (0, 1)]
    print_plan(Args("the/policy", task_ids=[0, 1, 2], episodes_per_task=3), "cpu", tmp_path)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "the/policy" in first and str(tmp_path) in first
    assert lines == [
        "  task 0: pick up the alphabet soup and place it in the basket (it has 2 initial states, not 3)",
        "  task 1: pick up the cream cheese and place it in the basket (it has 0 initial states, not 3)",
        "  task 2: pick up the salad dressing and place it in the basket",
    ]


@pytest.mark.libero
@pytest.mark.parametrize(
    "flags, message, code",
    [
        (["--checkpoint", "/nonexistent"], "no checkpoint at", 1),
        (["--checkpoint", "x", "--suite", "libero"], "unknown suite", 1),
        (["--checkpoint", "x", "--task-ids", "3,10"], "task id 10", 1),
        (["--checkpoint", "x", "--num-envs", "0"], "--num-envs", 2),
        (["--checkpoint", "x", "--episodes-per-task", "51"], "--episodes-per-task", 2),
        (["--checkpoint", "x", "--temperature", "nan"], "--temperature", 2),
        ([], "--checkpoint", 2),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, code, capfd):
    with pytest.raises(SystemExit) as end:
        main(parse_args(Args, "", flags))
    out, err = capfd.readouterr()
    assert end.value.code == code and message in err and len(err.strip().splitlines()) == 1 and out == "", err


def test_a_mistyped_flag_answers_at_once():
    began = time.monotonic()
    process = _command("--chekpoint", "x")
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and "--checkpoint" in err and len(err.strip().splitlines()) == 1 and out == ""
    )
    # a second on a quiet machine; importing torch alone takes longer on a loaded one
    assert time.monotonic() - began < 5


def _command(*flags):
    return subprocess.Popen(
        [sys.executable, "eval.py", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.libero
@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(model, tmp_path):
    model.save_pretrained(tmp_path / "policy")
    flags = [
        "--checkpoint",
        tmp_path / "policy",
        "--task-ids",
        "0",
        "--episodes-per-task",
        3,
        "--num-envs",
        1,
    ]
    flags += ["--out", tmp_path / "out", "--json"]
    log = tmp_path / "out" / "episodes.jsonl"
    process = _command(*flags)
    end = time.monotonic() + 200
    while time.monotonic() < end and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (
        process.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err
    )
    before = log.read_text().splitlines()
    assert 2 <= len(before) < 4
    process = _command(*flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "  task 0: pick up the alphabet soup and place" in err, err
    assert log.read_text().splitlines()[: len(before)] == before and len(log.read_text().splitlines()) == 4
    result = json.loads(out)
    assert result["settings"]["temperature"] == 0.6  # the checkpoint's
    assert (
        result["total"]["episodes"] == 3
        and json.loads((tmp_path / "out" / "results.json").read_text()) == result
    )
    assert "| 0 | pick up the alphabet soup" in (tmp_path / "out" / "results.md").read_text()
    process = _command(*flags, "--temperature", 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "temperature = 0.6, this command has 1.0" in err
