"""demos.py: experts that solve the task from states they never saw, and files that round-trip in LIBERO's layout."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import demos
from support.errors import UserError
from support.pool import run_jobs

ROOT = Path(__file__).resolve().parents[1]


def _demo(rng, T=5, size=8):
    return {
        "actions": np.clip(rng.normal(size=(T, 7)), -1, 1),
        "executed_actions": rng.uniform(-1, 1, (T, 7)),
        "states": rng.normal(size=(T, 11)),
        "robot_states": rng.normal(size=(T, 9)),
        "agentview_rgb": rng.integers(0, 256, (T, size, size, 3), dtype=np.uint8),
        "ee_pos": rng.normal(size=(T, 3)),
        "ee_ori": rng.normal(size=(T, 3)),
        "ee_states": rng.normal(size=(T, 6)),
        "gripper_states": rng.uniform(0, 0.04, (T, 2)),
        "joint_states": rng.normal(size=(T, 7)),
    }


def test_files_round_trip_and_turn_images_upright(tmp_path):
    rng = np.random.default_rng(0)
    originals = [_demo(rng), _demo(rng, T=3)]
    path = tmp_path / "pick_up_the_cup_demo.hdf5"
    demos.write_demos(path, originals, 4, "pick up the cup")
    back = list(demos.read_demos(path))
    assert [b["name"] for b in back] == ["demo_0", "demo_1"] and {b["action_repeat"] for b in back} == {4}
    for original, read in zip(originals, back, strict=True):
        np.testing.assert_array_equal(read["actions"], original["actions"])
        np.testing.assert_array_equal(read["agentview"], np.rot90(original["agentview_rgb"], 2, axes=(1, 2)))
        assert read["instruction"] == "pick up the cup"
    with h5py.File(path) as f:  # LIBERO's own names
        assert f["data/demo_0/obs/agentview_rgb"].shape == (5, 8, 8, 3) and f["data/demo_1/dones"][
            :
        ].tolist() == [
            0,
            0,
            1,
        ]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file left


def test_official_layout_reads_without_our_attributes(tmp_path):
    """An official file has no action_repeat, and its instruction may be a list of one string."""
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    demos.write_demos(path, [_demo(np.random.default_rng(1))], 4, "x")
    with h5py.File(path, "a") as f:
        for name in list(f["data"].attrs):
            del f["data"].attrs[name]
        del f["data/demo_0/executed_actions"], f["data/demo_0/obs/ee_pos"]
    (demo,) = demos.read_demos(path)
    assert demo["action_repeat"] == 1 and demo["instruction"] == "pick up the milk"
    np.testing.assert_allclose(demo["ee_pos"].shape, (5, 3))


def test_merged_parts_are_the_parts_in_order(tmp_path):
    rng = np.random.default_rng(2)
    sets = [[_demo(rng), _demo(rng)], [_demo(rng)]]
    parts = [tmp_path / f"x.part{i}" for i in range(2)]
    for part, originals in zip(parts, sets, strict=True):
        demos.write_demos(part, originals, 2, "do it")
    demos.merge_parts(parts, tmp_path / "x_demo.hdf5")
    merged = list(demos.read_demos(tmp_path / "x_demo.hdf5"))
    for original, read in zip([*sets[0], *sets[1]], merged, strict=True):
        np.testing.assert_array_equal(read["actions"], original["actions"])
    assert not any(p.exists() for p in parts)


@pytest.mark.parametrize("damage", ["truncated", "not hdf5", "no data group", "wrong width", "empty"])
def test_damaged_files_are_one_clear_line(tmp_path, damage):
    path = tmp_path / "a_demo.hdf5"
    demos.write_demos(path, [_demo(np.random.default_rng(3))], 4, "x")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "not hdf5":
        path.write_bytes(b"hello")
    else:
        with h5py.File(path, "a") as f:
            if damage == "no data group":
                del f["data"]
            elif damage == "wrong width":
                del f["data/demo_0/actions"]
                f["data/demo_0/actions"] = np.zeros((5, 4))
            else:
                del f["data/demo_0"]
    with pytest.raises(UserError, match="a_demo.hdf5"):
        list(demos.read_demos(path))
    if damage != "wrong width":  # the cheap look finds the rest, before anything is loaded
        with pytest.raises(UserError, match="a_demo.hdf5"):
            demos.demo_files(path)


def test_one_bad_file_among_many_costs_only_itself(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        demos.write_demos(tmp_path / f"{name}_demo.hdf5", [_demo(rng)], 4, name)
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as f:
        del f["data/demo_0"]
    last = tmp_path / "c_demo.hdf5"
    last.write_bytes(last.read_bytes()[:1000])
    assert [p.name for p in demos.demo_files(tmp_path, 4)] == ["b_demo.hdf5"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "a_demo" in said[0] and "no demonstrations" in said[0] and "c_demo" in said[1]
    with pytest.raises(UserError, match="--action-repeat 2"):
        demos.demo_files(tmp_path, 2)


@pytest.mark.parametrize(
    "change, what",
    [
        (
            lambda a: a.__setitem__((slice(None), 6), (a[:, 6] < 0) * 1.0),
            "column 6 .gripper. is never negative",
        ),
        (lambda a: a.__setitem__((slice(None), 6), a[:, 6] * 2 - 3), "column 6 reaches"),
        (lambda a: a.__setitem__((2, 3), 500.0), "column 3 reaches 500"),
        (lambda a: a.__setitem__((1, 2), np.nan), "column 2 is not finite"),
    ],
)
def test_actions_of_another_convention_are_refused_by_demonstration(tmp_path, capsys, change, what):
    """An official file (no attributes): the bad demonstration is named with its column, the good one is read."""
    rng = np.random.default_rng(0)
    bad, good = _demo(rng), _demo(rng)
    for demo in (bad, good):
        demo["actions"][:, 6] = [-1, -1, 1, 1, -1]
    change(bad["actions"])
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    demos.write_demos(path, [bad, good], 1, "pick up the milk")
    with h5py.File(path, "a") as f:
        del f["data"].attrs["action_repeat"]
    (read,) = demos.read_demos(path)
    np.testing.assert_array_equal(read["actions"], good["actions"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(what, line) and "1 demonstrations used, 1 left out" in line and "demo_0" in line


def test_rounding_and_a_hand_that_is_always_closed_pass():
    actions = np.clip(np.random.default_rng(0).normal(size=(5, 7)), -1, 1) * (1 + 1e-6)
    demos.check_convention(actions)
    actions[:, 6] = 1.0
    demos.check_convention(actions, known=True)  # ours, which says what it is
    with pytest.raises(ValueError, match="never negative"):
        demos.check_convention(actions)


def test_clean_actions_are_the_labels_and_actions_what_was_executed(tmp_path):
    rng = np.random.default_rng(0)
    demo, path = _demo(rng), tmp_path / "x_demo.hdf5"
    del demo["executed_actions"]
    demo["clean_actions"] = np.clip(rng.normal(size=(5, 7)), -1, 1)
    demos.write_demos(path, [demo], 4, "x")
    (read,) = demos.read_demos(path)
    assert read["disturbed"]
    np.testing.assert_array_equal(read["actions"], demo["clean_actions"])
    np.testing.assert_array_equal(read["executed"], demo["actions"])
    with h5py.File(path, "a") as f:  # as ours were until November 2026
        f.move("data/demo_0/actions", "data/demo_0/executed_actions")
        f.move("data/demo_0/clean_actions", "data/demo_0/actions")
    (old,) = demos.read_demos(path)
    for key in ("actions", "executed", "disturbed"):
        np.testing.assert_array_equal(old[key], read[key])
    with h5py.File(path, "a") as f:
        del f["data/demo_0/executed_actions"]
    (official,) = demos.read_demos(path)
    assert not official["disturbed"] and official["executed"] is official["actions"]


def test_image_convention_is_read_and_followed(tmp_path):
    demo, path = _demo(np.random.default_rng(0)), tmp_path / "x_demo.hdf5"
    upright = np.rot90(demo["agentview_rgb"], 2, axes=(1, 2))
    demo["agentview_rgb"] = demo["agentview_rgb"][:, ::-1]  # OpenCV's: the first row is the top
    demos.write_demos(path, [demo], 4, "x", macros_image_convention="opencv")
    (read,) = demos.read_demos(path)
    np.testing.assert_array_equal(read["agentview"], upright)
    with h5py.File(path, "a") as f:
        f["data"].attrs["macros_image_convention"] = "vulkan"
    with pytest.raises(UserError, match="vulkan"):
        list(demos.read_demos(path))


def test_nobody_demands_what_he_does_not_use(tmp_path):
    demo, path = _demo(np.random.default_rng(0)), tmp_path / "x_demo.hdf5"
    demos.write_demos(path, [{"actions": demo["actions"]}], 4, "x")
    (read,) = demos.read_demos(path, images=False)
    assert read["ee_pos"] is read["gripper_states"] is read["states"] is None and len(read["actions"]) == 5
    with pytest.raises(UserError, match="agentview_rgb"):
        list(demos.read_demos(path))


@pytest.mark.parametrize(
    "text",
    [
        '"pick up the milk"',
        "pick up\n the milk ",
        ["pick", "up", "the", "milk"],
        list("pick up the milk"),
        ["pick up the milk"],
    ],
)
def test_sentences_in_any_wrapping(tmp_path, text):
    path = tmp_path / "other_demo.hdf5"
    demos.write_demos(path, [_demo(np.random.default_rng(0))], 4, text)
    (read,) = demos.read_demos(path)
    assert read["instruction"] == "pick up the milk"


@pytest.mark.libero
def test_sentences_are_those_of_the_suite(tmp_path, capsys):
    demo = [_demo(np.random.default_rng(0))]
    name = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
    bare = tmp_path / f"{name}_demo.hdf5"  # as in a *_no_noops data set: no attributes
    demos.write_demos(bare, demo, 4, "x")
    with h5py.File(bare, "a") as f:
        for key in list(f["data"].attrs):
            del f["data"].attrs[key]
    (read,) = demos.read_demos(bare)
    assert read["instruction"] == "turn on the stove and put the moka pot on it"
    (read,) = demos.read_demos(bare, suite="libero_10")
    assert read["instruction"] == "turn on the stove and put the moka pot on it"
    # An official file holds its BDDL's words ("pick the milk ..."); LIBERO's evaluation uses the file name's.
    official = tmp_path / "pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5"
    demos.write_demos(official, demo, 1, "pick the milk and place it in the basket")
    (read,) = demos.read_demos(official, suite="libero_object")
    assert read["instruction"] == "pick up the milk and place it in the basket"
    (read,) = demos.read_demos(official, suite="libero_goal")
    assert "no task of libero_goal" in capsys.readouterr().err


def test_missing_demonstrations_name_the_command(tmp_path):
    with pytest.raises(UserError, match="demos.py"):
        demos.demo_files(tmp_path)


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
    ],
)
def test_bad_flags_are_one_line(tmp_path, flags, what):
    run = subprocess.run(
        [sys.executable, "demos.py", *flags, "--out", str(tmp_path / "d")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and what in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "d").exists()


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
    assert set(np.unique(arrays["clean_actions"][:, 6])) == {
        -1.0,
        1.0,
    }  # open on the way, closed while carrying
    assert np.abs(arrays["actions"] - arrays["clean_actions"]).max() > 0.05
    path = demos.demo_path(tmp_path, "libero_object", task.name)
    demos.write_demos(path, [arrays], 4, task.instruction, **demos.task_attributes(task))
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
    (file,) = demos.demo_files(tmp_path / "libero_object", action_repeat=4)
    assert file.name.endswith("_policy_demo.hdf5")
    (demo,) = demos.read_demos(file, suite="libero_object")
    assert demo["disturbed"] and np.abs(demo["executed"] - demo["actions"]).max() > 0.1


@pytest.mark.libero
@pytest.mark.slow
def test_a_task_on_which_the_expert_fails_is_named_and_leaves_nothing(tmp_path):
    """Disturbed so much that a knob can still be turned (7), but a bowl not be put into a drawer (3), whose other share may
    end before or after."""
    flags = ["--task-ids", "3,7", "--num-demos", "2", "--noise", "1", "--kick", "0.2", "--num-workers", "2"]
    command = [sys.executable, "demos.py", "--suite", "libero_goal", *flags, "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert re.search(
        r"fails on libero_goal task 3 \(.*\): \d of 20 attempts.*; the others are recorded", run.stderr
    )
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
