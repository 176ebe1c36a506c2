"""sft.py: labels that decode to what was demonstrated, a loss checked by hand, and training that learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import demos
import sft
from policy import OpenVLA, build_tiny

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    vision_width=32, vision_blocks=2, vision_heads=2, width=32, layers=2, heads=2, mlp=64, image_size=32, patch_size=8
)


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 2**31))
def test_grouped_actions_are_means_and_last_gripper(repeat, extra, seed):
    actions = np.random.default_rng(seed).uniform(-1, 1, (repeat + extra, 7))
    grouped = sft.group_actions(actions, repeat)
    assert grouped.shape == (extra + 1, 7)
    for start in range(extra + 1):
        rows = actions[start : start + repeat]
        np.testing.assert_allclose(grouped[start, :6], rows[:, :6].mean(0), atol=1e-12)
        assert grouped[start, 6] == rows[-1, 6]


def test_gripper_changes_convention():
    file = np.array([[0, 0, 0, 0, 0, 0, -1.0], [0, 0, 0, 0, 0, 0, 1.0]])
    assert sft.to_policy_convention(file)[:, 6].tolist() == [1.0, 0.0]  # -1 = open -> 1; +1 = close -> 0
    assert file[0, 6] == -1.0  # the input stays as it was


def test_statistics_match_numpy_and_labels_decode_within_a_bin():
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.normal(0, 0.4, (500, 3)), np.zeros((500, 3)), rng.integers(0, 2, (500, 1))], 1)
    stats = sft.dataset_statistics(actions, 7)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    assert stats["action"]["mask"] == [True] * 6 + [False] and stats["num_trajectories"] == 7
    model = build_tiny(0, ["a"], **SMALL)
    model.norm_stats["suite"] = stats
    decoded = model.decode_actions(model.encode_actions(actions, "suite"), "suite")
    low, high = np.array(stats["action"]["q01"]), np.array(stats["action"]["q99"])
    inside = np.clip(actions, low, high)
    assert np.abs(decoded - inside)[:, :6].max() <= (high - low).max() / 255 + 1e-12
    assert ((decoded[:, 6] > 0.5) == (actions[:, 6] > 0.5)).all()
    assert (decoded[:, 3:6] == 0).all()  # a dimension that never moves decodes to exactly that


def test_loss_against_a_loop():
    torch.manual_seed(0)
    logits, bins = torch.randn(3, 7, 256), torch.randint(0, 256, (3, 7))
    soft = torch.tensor([True] * 3 + [False] * 4)
    loss = sft.action_loss(logits, bins, 2.5, soft)
    for b in range(3):
        for k in range(7):
            log_p = logits[b, k].double().log_softmax(-1)
            if soft[k]:
                weight = torch.tensor([np.exp(-0.5 * ((j - bins[b, k].item()) / 2.5) ** 2) for j in range(256)])
                expected = -(weight / weight.sum() * log_p).sum()
            else:
                expected = -log_p[bins[b, k]]
            assert abs(loss[b, k].item() - expected.item()) < 1e-4
    torch.testing.assert_close(
        sft.action_loss(logits, bins, 0.0, soft),
        torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), bins, reduction="none"),
    )


def _write_demos(directory, repeat=4, tasks=2):
    """Two tasks whose action follows from the image: a bright half says which way to go."""
    rng = np.random.default_rng(0)
    for task in range(tasks):
        out = []
        for _ in range(6):
            T = 8
            side = rng.integers(0, 2, T)
            images = rng.integers(0, 40, (T, 32, 32, 3), dtype=np.uint8)
            for t in range(T):
                images[t, :, 16 * side[t] : 16 * side[t] + 16] += 180
            actions = np.zeros((T, 7))
            actions[:, 0], actions[:, 6] = np.where(side == 1, 0.8, -0.8), np.where(side == 1, 1, -1)
            states = {
                k: np.zeros((T, n))
                for k, n in (
                    ("states", 5),
                    ("robot_states", 9),
                    ("ee_pos", 3),
                    ("ee_ori", 3),
                    ("ee_states", 6),
                    ("gripper_states", 2),
                    ("joint_states", 7),
                )
            }
            out.append({"actions": actions, "agentview_rgb": images, **states})
        demos.write_demos(directory / f"task_{task}_demo.hdf5", out, repeat, f"task {task}")


@pytest.mark.slow
def test_training_learns_from_images_and_repeats_with_the_seed(tmp_path):
    _write_demos(tmp_path / "data" / "libero_object")
    init = build_tiny(0, ["task", "0", "1"], **SMALL)
    init.save_pretrained(tmp_path / "init")
    results = []
    for name in ("a", "b"):
        args = [
            "--data",
            str(tmp_path / "data"),
            "--init",
            str(tmp_path / "init"),
            "--out",
            str(tmp_path / name),
            "--steps",
            "150",
            "--batch-size",
            "16",
            "--eval-every",
            "75",
            "--held-out",
            "0.2",
            "--lr",
            "3e-3",
            "--warmup",
            "10",
            "--ema",
            "0.9",
            "--threads",
            "1",
        ]
        run = subprocess.run([sys.executable, "sft.py", *args], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(json.loads((tmp_path / name / "sft_log.json").read_text())["log"][-1])
    assert results[0]["held_out_gripper_accuracy"] > 0.9  # held-out images; guessing gives about 0.5
    same = [k for k in results[0] if k != "seconds"]
    assert [results[0][k] for k in same] == [results[1][k] for k in same]
    model = OpenVLA.from_pretrained(tmp_path / "a")
    assert model.norm_stats["libero_object"]["num_trajectories"] == 12


@pytest.mark.parametrize("kind", ["no data", "other repeat"])
def test_bad_data_is_one_line(tmp_path, kind):
    if kind == "other repeat":
        _write_demos(tmp_path / "data" / "libero_object", repeat=3, tasks=1)
    run = subprocess.run(
        [sys.executable, "sft.py", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr and not (tmp_path / "o").exists()
    assert ("demos.py" if kind == "no data" else "--action-repeat 4") in run.stderr
