"""demos.py: experts that solve the task from states they never saw, and files that round-trip in LIBERO's layout."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import demos
from experts import disturb
from support.errors import UserError

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


def test_missing_demonstrations_name_the_command(tmp_path):
    with pytest.raises(UserError, match="demos.py"):
        demos.demo_files(tmp_path)


def test_disturbance_keeps_commands_in_range_and_is_off_at_zero():
    rng = np.random.default_rng(0)
    command = np.array([1.0, -1.0, 0.3, 0, 0, 0, 1.0])
    np.testing.assert_array_equal(disturb(command, rng, 0.0, 0.0), command)
    many = np.stack([disturb(command, rng, 0.5, 0.5) for _ in range(200)])
    assert np.abs(many).max() <= 1.0 and (many[:, 3:6] == 0).all() and 0 < (many[:, 6] == 0).sum() < 100


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--suite", "libero_goal"], "no scripted expert"),
        (["--task-ids", "77"], "task id 77"),
        (["--num-demos", "0"], "--num-demos"),
        (["--resolution", "100"], "--resolution"),
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
def test_expert_solves_test_states_and_its_recording_replays():
    """The expert succeeds on unseen protocol states, and a disturbed recording's executed actions lead to its states."""
    from simulator.task import TaskSim

    task = TaskSim("libero_object", 8, render="light")
    episode = task.episode()
    for init_state in (3, 29):
        success, steps = demos.check_expert(episode, "libero_object", init_state, 4, 280)
        assert success and steps < 150
    args = demos.Args(noise=0.2, kick=0.05)
    arrays, success = demos.record_episode(episode, "libero_object", np.random.default_rng(5), args)
    T = len(arrays["actions"])
    assert (
        success and arrays["agentview_rgb"].shape == (T, 256, 256, 3) and arrays["agentview_rgb"].std() > 10
    )
    assert set(np.unique(arrays["actions"][:, 6])) == {-1.0, 1.0}  # open on the way, closed while carrying
    assert np.abs(arrays["actions"] - arrays["executed_actions"]).max() > 0.05
    # Replay from the same placement: the rows' states must come back.
    episode.reset(None, np.random.default_rng(5))
    for t in range(T):
        np.testing.assert_allclose(
            np.concatenate([[episode.data.time], episode.data.qpos, episode.data.qvel]),
            arrays["states"][t],
            atol=1e-9,
        )
        action = arrays["executed_actions"][t].copy()
        action[6] = 1.0 if action[6] < 0 else 0.0
        done = False
        for _ in range(4):
            done = done or episode.step(action)
    assert done
    task.close()
