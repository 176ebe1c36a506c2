"""demos.py: experts that solve the task from states they never saw, and recordings that replay."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import demos
from support import demonstrations
from support.cli import parse_args
from support.errors import UserError
from support.pool import run_jobs

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "flags, what",
    [
        (
            ["--suite", "libero_90", "--task-ids", "35"],
            "no scripted expert for libero_90 task 35 (open a microwave)",
        ),
        (["--task-ids", "77"], "task id 77"),
        (["--num-demos", "0"], "--num-demos"),
        (["--resolution", "100"], "--resolution"),
        (["--policy", "/nowhere"], "no checkpoint at /nowhere"),
        (["--policy", "checkpoints/libero_object/policy", "--check"], "leave --policy out"),
        (["--policy", "checkpoints/libero_object/policy", "--action-repeat", "1"], "give --action-repeat 4"),
        (["--video", "1"], "give --check as well"),
        (["--check", "--episodes-per-task", "51"], "--episodes-per-task"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, flags, what, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demos.py", *flags, "--out", str(tmp_path / "d")])
    with pytest.raises(SystemExit) as stop:
        demos.main(parse_args(demos.Args, ""))
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2) and what in err and "Traceback" not in err
    assert not (tmp_path / "d").exists()


@pytest.mark.libero
@pytest.mark.slow
def test_a_check_plays_the_states_asked_for_and_films_the_first_of_them(tmp_path):
    command = [sys.executable, "demos.py", "--suite", "libero_object", "--task-ids", "8", "--check"]
    flags = ["--episodes-per-task", "3", "--video", "1", "--num-workers", "2", "--out", str(tmp_path)]
    run = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "libero_object: 3/3 = 100 %" in run.stdout, run.stderr
    assert [p.name for p in tmp_path.rglob("*.mp4")] == ["task08_state00_success.mp4"]


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, np.array([0.2, -0.1, 0.2, 0, 0, 0, 0])], ids=["expert", "policy"])
def test_a_recording_replays_and_says_what_other_tools_ask_for(tmp_path, policy):
    """`actions` (what stock tools replay) lead from init_state through the file's states to success, whoever acted."""
    from simulator.task import TaskSim

    task = TaskSim("libero_object", 8, render="light")
    episode = task.episode()
    arrays, success = demos.record_episode(
        episode,
        np.random.default_rng(5),
        demos.Args(noise=0.2, kick=0.05),
        600,
        None if policy is None else lambda frame: policy,
    )
    T = len(arrays["actions"])
    if policy is not None:  # it acted for stretches; the labels are the expert's all the same
        acted = (arrays["actions"][:, :6] == policy[:6]).all(1)
        assert 0.2 < acted.mean() < 0.8 and np.abs(np.diff(acted)).sum() < 0.5 * T
        assert not (arrays["clean_actions"][:, :6] == policy[:6]).all(1).any()
    assert (
        success and arrays["agentview_rgb"].shape == (T, 256, 256, 3) and arrays["agentview_rgb"].std() > 10
    )
    # open on the way, closed while carrying
    assert set(np.unique(arrays["clean_actions"][:, 6])) == {-1.0, 1.0}
    assert np.abs(arrays["actions"] - arrays["clean_actions"]).max() > 0.05
    path = demonstrations.demo_path(tmp_path, "libero_object", task.name)
    demonstrations.write_demos(path, [arrays], 4, task.instruction, **demos.task_attributes(task))
    with h5py.File(path) as f:
        attributes, demo = dict(f["data"].attrs), f["data/demo_0"]
        assert (
            json.loads(attributes["env_args"])["env_name"]
            == attributes["env_name"]
            == "Libero_Floor_Manipulation"
        )
        info = json.loads(attributes["problem_info"])
        assert (
            info["language_instruction"] == task.instruction and info["problem_name"] and info["domain_name"]
        )
        assert "(:goal" in attributes["bddl_file_content"] and Path(attributes["bddl_file_name"]).is_file()
        assert demo.attrs["model_file"].startswith("<mujoco")
        np.testing.assert_array_equal(demo.attrs["init_state"], arrays["states"][0])
    episode.reset(None, np.random.default_rng(5))
    for t in range(T):
        state = np.concatenate([[episode.data.time], episode.data.qpos, episode.data.qvel])
        np.testing.assert_allclose(state, arrays["states"][t], atol=1e-9)
        action = arrays["actions"][t].copy()
        action[6] = 1.0 if action[6] < 0 else 0.0
        done = False
        for _ in range(4):
            done = done or episode.step(action)
    assert done
    task.close()


@pytest.mark.parametrize("temperature, different", [(0.0, False), (3.0, True)])
def test_a_policy_that_acts_in_recordings_is_sampled_at_its_own_temperature(
    tmp_path, monkeypatch, temperature, different
):
    shutil.copytree(ROOT / "checkpoints" / "libero_object" / "policy", tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(
        json.dumps({**config, "sampling_temperature": temperature})
    )
    monkeypatch.setattr(demos, "_POLICY", {})
    args = demos.Args(policy=tmp_path / "policy")
    frame = np.full((224, 224, 3), 127, np.uint8)
    sentence = "pick up the milk and place it in the basket"
    actions = [demos._policy_of(args, sentence, np.random.default_rng(i))(frame) for i in range(3)]
    assert (actions[0].shape == (7,)) and (np.ptp(actions, axis=0).max() > 0) == different


@pytest.mark.libero
@pytest.mark.slow
def test_the_shipped_policy_acts_in_recordings(tmp_path):
    command = [
        sys.executable,
        "demos.py",
        "--policy",
        "checkpoints/libero_object/policy",
        "--task-ids",
        "9",
        "--num-demos",
        "1",
    ]
    subprocess.run([*command, "--seed", "3", "--out", str(tmp_path)], cwd=ROOT, check=True)
    (file,) = demonstrations.demo_files(tmp_path / "libero_object", action_repeat=4)
    assert file.name.endswith("_policy_demo.hdf5")
    (demo,) = demonstrations.read_demos(file)
    assert demo["disturbed"] and np.abs(demo["executed"] - demo["actions"]).max() > 0.1


@pytest.mark.libero
@pytest.mark.slow
def test_a_recording_does_not_depend_on_the_number_of_workers(tmp_path):
    files = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        command = [
            sys.executable,
            "demos.py",
            "--task-ids",
            "9",
            "--num-demos",
            "3",
            "--num-workers",
            str(workers),
        ]
        subprocess.run([*command, "--seed", "3", "--out", str(out)], cwd=ROOT, check=True)
        (file,) = demonstrations.demo_files(out / "libero_object", action_repeat=4)
        files.append(list(demonstrations.read_demos(file)))
    alone, shared = files
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        for name in ("actions", "executed", "agentview"):
            np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(alone[0]["actions"], alone[1]["actions"])  # three different ones


@pytest.mark.libero
@pytest.mark.parametrize("order", [1, -1], ids=["fails_first", "fails_last"])
def test_a_task_on_which_the_expert_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys, order):
    """One share of task 3 gives up; the other, which ends after or before it, has written its part."""
    now = []

    def in_turn(function, jobs, workers):
        for job in jobs[::order]:
            now[:] = [job[1:3]]  # task, share
            yield function(job)

    def record(episode, *_):
        return {"actions": np.zeros((5, 7)), "agentview_rgb": np.zeros((5, 8, 8, 3), np.uint8)}, now != [
            (3, 0)
        ]

    monkeypatch.setattr(demos, "_SIM", {})
    monkeypatch.setattr(demos, "run_jobs", in_turn)
    monkeypatch.setattr(demos, "record_episode", record)
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # main sets them; put back afterwards
    args = demos.Args(suite="libero_goal", task_ids=[3, 7], num_demos=2, num_workers=2, out=str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        demos.main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in err
    assert re.search(r"fails on libero_goal task 3 \(.*\): 0 of 20 attempts.*; the others are recorded", err)
    assert [file.name for file in (tmp_path / "libero_goal").iterdir()] == ["turn_on_the_stove_demo.hdf5"]


def _double(job):
    if job == "bad":
        raise UserError("cannot double bad")
    return 2 * job


def test_jobs_run_without_shared_memory():
    """The pool takes no semaphore from /dev/shm, which containers often lack, and passes errors on."""
    assert sorted(run_jobs(_double, range(7), 2)) == [0, 2, 4, 6, 8, 10, 12]
    with pytest.raises(UserError, match="cannot double bad"):
        list(run_jobs(_double, [1, "bad"], 2))


def test_workers_that_drew_a_bar_end_without_a_word():
    """tqdm's lock is a semaphore; of a worker that is killed Python says at exit that it leaked."""
    code = "import tqdm; from support.pool import run_jobs; print(list(run_jobs(tqdm.tqdm.write, ['a'], 2)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "a\n[None]\n", "")
