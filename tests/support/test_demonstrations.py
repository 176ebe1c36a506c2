"""Files of demonstrations: round trips in LIBERO's layout, what other files hold, and what is refused in one line."""

import re

import h5py
import numpy as np
import pytest

from support import demonstrations
from support.errors import UserError


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
    demonstrations.write_demos(path, originals, 4, "pick up the cup")
    back = list(demonstrations.read_demos(path))
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
    """An official file has no action_repeat; some have no attributes at all."""
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    demonstrations.write_demos(path, [_demo(np.random.default_rng(1))], 4, "x")
    with h5py.File(path, "a") as f:
        for name in list(f["data"].attrs):
            del f["data"].attrs[name]
        del f["data/demo_0/executed_actions"], f["data/demo_0/obs/ee_pos"]
    (demo,) = demonstrations.read_demos(path)
    assert demo["action_repeat"] == 1 and demo["instruction"] is None
    np.testing.assert_allclose(demo["ee_pos"].shape, (5, 3))


def test_merged_parts_are_the_parts_in_order(tmp_path):
    rng = np.random.default_rng(2)
    sets = [[_demo(rng), _demo(rng)], [_demo(rng)]]
    parts = [tmp_path / f"x.part{i}" for i in range(2)]
    for part, originals in zip(parts, sets, strict=True):
        demonstrations.write_demos(part, originals, 2, "do it")
    demonstrations.merge_parts(parts, tmp_path / "x_demo.hdf5")
    merged = list(demonstrations.read_demos(tmp_path / "x_demo.hdf5"))
    for original, read in zip([*sets[0], *sets[1]], merged, strict=True):
        np.testing.assert_array_equal(read["actions"], original["actions"])
    assert not any(p.exists() for p in parts)


@pytest.mark.parametrize("damage", ["truncated", "not hdf5", "no data group", "wrong width", "empty"])
def test_damaged_files_are_one_clear_line(tmp_path, damage):
    path = tmp_path / "a_demo.hdf5"
    demonstrations.write_demos(path, [_demo(np.random.default_rng(3))], 4, "x")
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
        list(demonstrations.read_demos(path))
    if damage != "wrong width":  # the cheap look finds the rest, before anything is loaded
        with pytest.raises(UserError, match="a_demo.hdf5"):
            demonstrations.demo_files(path)


def test_one_bad_file_among_many_costs_only_itself(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        demonstrations.write_demos(tmp_path / f"{name}_demo.hdf5", [_demo(rng)], 4, name)
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as f:
        del f["data/demo_0"]
    last = tmp_path / "c_demo.hdf5"
    last.write_bytes(last.read_bytes()[:1000])
    assert [p.name for p in demonstrations.demo_files(tmp_path, 4)] == ["b_demo.hdf5"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "a_demo" in said[0] and "no demonstrations" in said[0] and "c_demo" in said[1]
    with pytest.raises(UserError, match="--action-repeat 2"):
        demonstrations.demo_files(tmp_path, 2)


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
    demonstrations.write_demos(path, [bad, good], 1, "pick up the milk")
    with h5py.File(path, "a") as f:
        del f["data"].attrs["action_repeat"]
    (read,) = demonstrations.read_demos(path)
    np.testing.assert_array_equal(read["actions"], good["actions"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(what, line) and "1 demonstrations used, 1 left out" in line and "demo_0" in line


def test_rounding_and_a_hand_that_is_always_closed_pass():
    actions = np.clip(np.random.default_rng(0).normal(size=(5, 7)), -1, 1) * (1 + 1e-6)
    demonstrations.check_convention(actions)
    actions[:, 6] = 1.0
    demonstrations.check_convention(actions, known=True)  # ours, which says what it is
    with pytest.raises(ValueError, match="never negative"):
        demonstrations.check_convention(actions)


def test_clean_actions_are_the_labels_and_actions_what_was_executed(tmp_path):
    rng = np.random.default_rng(0)
    demo, path = _demo(rng), tmp_path / "x_demo.hdf5"
    del demo["executed_actions"]
    demo["clean_actions"] = np.clip(rng.normal(size=(5, 7)), -1, 1)
    demonstrations.write_demos(path, [demo], 4, "x")
    (read,) = demonstrations.read_demos(path)
    assert read["disturbed"]
    np.testing.assert_array_equal(read["actions"], demo["clean_actions"])
    np.testing.assert_array_equal(read["executed"], demo["actions"])
    with h5py.File(path, "a") as f:  # as ours were until November 2026
        f.move("data/demo_0/actions", "data/demo_0/executed_actions")
        f.move("data/demo_0/clean_actions", "data/demo_0/actions")
    (old,) = demonstrations.read_demos(path)
    for key in ("actions", "executed", "disturbed"):
        np.testing.assert_array_equal(old[key], read[key])
    with h5py.File(path, "a") as f:
        del f["data/demo_0/executed_actions"]
    (official,) = demonstrations.read_demos(path)
    assert not official["disturbed"] and official["executed"] is official["actions"]


def test_image_convention_is_read_and_followed(tmp_path):
    demo, path = _demo(np.random.default_rng(0)), tmp_path / "x_demo.hdf5"
    upright = np.rot90(demo["agentview_rgb"], 2, axes=(1, 2))
    demo["agentview_rgb"] = demo["agentview_rgb"][:, ::-1]  # OpenCV's: the first row is the top
    demonstrations.write_demos(path, [demo], 4, "x", macros_image_convention="opencv")
    (read,) = demonstrations.read_demos(path)
    np.testing.assert_array_equal(read["agentview"], upright)
    with h5py.File(path, "a") as f:
        f["data"].attrs["macros_image_convention"] = "vulkan"
    with pytest.raises(UserError, match="vulkan"):
        list(demonstrations.read_demos(path))


def test_nobody_demands_what_he_does_not_use(tmp_path):
    demo, path = _demo(np.random.default_rng(0)), tmp_path / "x_demo.hdf5"
    demonstrations.write_demos(path, [{"actions": demo["actions"]}], 4, "x")
    (read,) = demonstrations.read_demos(path, images=False)
    assert read["ee_pos"] is read["gripper_states"] is read["states"] is None and len(read["actions"]) == 5
    with pytest.raises(UserError, match="agentview_rgb"):
        list(demonstrations.read_demos(path))


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
    demonstrations.write_demos(path, [_demo(np.random.default_rng(0))], 4, text)
    (read,) = demonstrations.read_demos(path)
    assert read["instruction"] == "pick up the milk"


@pytest.mark.libero
def test_sentences_are_those_of_the_suite(tmp_path, capsys):
    from simulator.sentences import sentence_of

    def sentence(path, suite):
        (read,) = demonstrations.read_demos(path)
        return sentence_of(suite, read["file"], read["instruction"])

    demo = [_demo(np.random.default_rng(0))]
    name = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
    bare = tmp_path / f"{name}_demo.hdf5"  # as in a *_no_noops data set: no attributes
    demonstrations.write_demos(bare, demo, 4, "x")
    with h5py.File(bare, "a") as f:
        for key in list(f["data"].attrs):
            del f["data"].attrs[key]
    for suite in ("libero_10", "my_data"):
        assert sentence(bare, suite) == "turn on the stove and put the moka pot on it"
    # An official file holds its BDDL's words ("pick the milk ..."); LIBERO's evaluation uses the file name's.
    official = tmp_path / "pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5"
    demonstrations.write_demos(official, demo, 1, "pick the milk and place it in the basket")
    assert sentence(official, "libero_object") == "pick up the milk and place it in the basket"
    sentence(official, "libero_goal")
    assert "no task of libero_goal" in capsys.readouterr().err


def test_missing_demonstrations_name_the_command(tmp_path):
    with pytest.raises(UserError, match="demos.py"):
        demonstrations.demo_files(tmp_path)
