"""Metrics where people watch them: TensorBoard always, Weights & Biases on request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.errors import UserError
from support.tracking import RUN_ID, Tracker

ROOT = Path(__file__).resolve().parents[2]


def scalars(out):
    """{name: [(step, value), …]} as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        name: [(e.step, round(e.value, 4)) for e in board.Scalars(name)] for name in board.Tags()["scalars"]
    }


def test_start_policy_stands_at_step_0_and_the_final_evaluation_at_the_last(tmp_path):
    tracker = Tracker(tmp_path, {"lr": 1e-3, "task_ids": [0, 1]})
    tracker.log({"iteration": 0, "eval/success_rate": 0.5}, 0)
    tracker.log({"iteration": 1, "losses/value_loss": 0.25, "note/text": "left out"}, 512)
    tracker.log({"eval/success_rate": 0.75}, 512)
    tracker.close()
    assert scalars(tmp_path) == {
        "eval/success_rate": [(0, 0.5), (512, 0.75)],
        "losses/value_loss": [(512, 0.25)],
    }
    assert not (tmp_path / RUN_ID).exists()


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path):
    first = Tracker(tmp_path, {})
    for step in (512, 1024, 1536):
        first.log({"losses/value_loss": 1.0}, step)
    first.close()
    second = Tracker(tmp_path, {}, resume_step=512)
    second.log({"losses/value_loss": 2.0}, 1024)
    second.close()
    assert scalars(tmp_path) == {"losses/value_loss": [(512, 1.0), (1024, 2.0)]}


def test_without_the_package_track_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Tracker(tmp_path, {}, track=True)
    assert not list(tmp_path.iterdir())


def test_wandb_is_imported_on_request_only():
    code = "import sys, support.tracking; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.slow
def test_track_without_network(tmp_path, monkeypatch):
    """Two processes of one run are two parts of one wandb run, each with the points that it was given."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_step, steps in ((None, (0, 512)), (512, (1024,))):
        tracker = Tracker(tmp_path, {"lr": 1e-3}, track=True, resume_step=resume_step)
        for step in steps:
            tracker.log({"eval/success_rate": step / 2048}, step)
        tracker.close()
    name = (tmp_path / RUN_ID).read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))) == 2
    assert scalars(tmp_path)["eval/success_rate"] == [(0, 0.0), (512, 0.25), (1024, 0.5)]


@pytest.mark.slow
def test_track_without_an_account_is_one_line(tmp_path):
    pytest.importorskip("wandb")
    code = f"from pathlib import Path; from support.tracking import Tracker; Tracker(Path({str(tmp_path)!r}), {{}}, track=True)"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment = {**kept, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: --track: " in done.stderr and "WANDB_MODE=offline" in done.stderr
