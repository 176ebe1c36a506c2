"""The diffs of docs/forking.md are applied to a copy of the repository, and what they change is run there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
FORKS = {
    re.findall(r"^## (.+)$", TEXT[: block.start()], re.MULTILINE)[-1]: block[1]
    for block in re.finditer(r"^```diff\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
}


def fork(directory, title):
    """Copy of the repository as it lies here, with one of the diffs applied."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file() and not name.startswith(("results/", "docs/", "tests/")):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    (directory / "fork.diff").write_text(FORKS[title], encoding="utf-8")
    applied = subprocess.run(["git", "apply", "fork.diff"], cwd=directory, capture_output=True, text=True)
    assert applied.returncode == 0, f"{title}: the diff in docs/forking.md does not apply: {applied.stderr}"
    return directory


def python(directory, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_fork_of_the_page_is_tested_here():
    assert list(FORKS) == [
        "Another reward model: a rule that reads the simulator",
        "Another suite",
        "GRPO instead of PPO with a critic",
        "Another environment",
    ]


@pytest.mark.parametrize("title", FORKS)
def test_the_diff_applies_and_compiles(tmp_path, title):
    directory = fork(tmp_path, title)
    changed = re.findall(r"^\+\+\+ b/(\S+)$", FORKS[title], re.MULTILINE)
    assert changed
    python(directory, "-m", "py_compile", *changed)


@pytest.mark.slow
def test_the_loop_runs_on_another_environment_and_resumes_there(tmp_path):
    directory = fork(tmp_path, "Another environment")
    flags = "--task-ids 0,1,2 --prm-mode none --start-episodes 0 --eval-every 0 --final-episodes 0 --critic-warmup 1 --advantage-floor 0"
    train = f"train.py {flags} --num-envs 4 --num-steps 8"
    python(directory, *f"{train} --total-steps 64 --out runs/whole".split())
    python(directory, *f"{train} --total-steps 32 --out runs/parts".split())
    config = json.loads((directory / "runs/parts/config.json").read_text()) | {"total_steps": 64}
    assert (directory / "runs/whole/policy/model.safetensors").exists()
    (directory / "runs/parts/config.json").write_text(json.dumps(config))
    python(directory, "train.py", "--resume", "runs/parts")
    whole, parts = (
        [json.loads(line) for line in (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [m["charts/decisions"] for m in whole] == [32, 64] and "losses/policy_loss" in whole[1]
    for m in (*whole, *parts):
        for name in [k for k in m if k.startswith("time/") or k == "charts/SPS"]:
            del m[name]
    assert whole == parts  # a run in two parts is the run in one


def test_rule_as_reward_model(tmp_path):
    """Something between the fingers scores 1, in the state that followed; a new episode begins with empty fingers."""
    code = """
import torch
from ppo import RolloutBuffer
from reward_model import HoldsSomething
rollout = RolloutBuffer(3, 2, (1, 1))
rollout.gripper = torch.tensor([[0.08, 0.03], [0.04, 0.0], [0.03, 0.03]])
rollout.truncated[1, 0] = True
rule = HoldsSomething()
before, after = rule.score_rollout(rollout, "potential")
assert after.tolist() == [[0, 1], [1, 0], [1, 1]], after
assert before.tolist() == [[0, 0], [0, 1], [0, 0]], before
assert rule.score_rollout(rollout, "potential")[0][0].tolist() == [1, 1]
"""
    python(fork(tmp_path, "Another reward model: a rule that reads the simulator"), "-c", code)


def test_grpo_advantages(tmp_path):
    """Of four episodes from one placement, one succeeds; of the other four all do, which teaches nothing."""
    code = """
import torch
from ppo import RolloutBuffer
rollout = RolloutBuffer(3, 8, (1, 1))
rollout.terminated[1, 0] = rollout.terminated[2, 0] = True  # the second one is another episode's
rollout.truncated[2, 1:4] = True
rollout.terminated[2, 4:] = True
rollout.compute_group_advantages()
won = rollout.advantages[0, 0].item()
assert abs(won - 0.75 / 0.5) < 1e-4, won
assert rollout.advantages[:, 0].tolist() == [won, won, 0.0]
assert torch.allclose(rollout.advantages[:, 1:4], torch.tensor(-0.5), atol=1e-4)
assert (rollout.advantages[:, 4:] == 0).all()
"""
    python(fork(tmp_path, "GRPO instead of PPO with a critic"), "-c", code)


@pytest.mark.libero
@pytest.mark.slow
def test_grpo_groups_share_task_and_placement(tmp_path):
    code = """
import numpy as np
from envs import Curriculum, LiberoVecEnv
if __name__ == "__main__":
    envs = LiberoVecEnv("libero_object", 5, [0, 1], num_workers=1, curriculum=Curriculum([0, 1], "uniform"))
    for seed in (0, 1):
        obs, _ = envs.reset(seed=seed)
        frames = obs["agentview"]
        assert len(set(obs["task_id"][:4])) == 1
        assert all((frame == frames[0]).all() for frame in frames[1:4]) and (frames[4] != frames[0]).any()
    envs.close()
"""
    directory = fork(tmp_path, "GRPO instead of PPO with a critic")
    (directory / "check.py").write_text(code)
    python(directory, "check.py")


@pytest.mark.libero
def test_another_suite(tmp_path):
    code = """
from simulator.suites import check_task_ids, instructions, max_steps
assert check_task_ids("libero_90_baskets", None) == list(range(9)) and max_steps("libero_90_baskets") == 400
assert all("in the basket" in sentence for sentence in instructions("libero_90_baskets"))
"""
    python(fork(tmp_path, "Another suite"), "-c", code)
