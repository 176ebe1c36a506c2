"""train.py: a run that was killed and resumed is the run that was not; signals save; bad input is one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from policy import build_tiny
from support import checkpoints
from support.cli import parse_args

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    vision_width=32,
    vision_blocks=2,
    vision_heads=2,
    width=32,
    layers=2,
    heads=2,
    mlp=64,
    image_size=32,
    patch_size=16,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random policy and a reward model on the same vision weights."""
    root = tmp_path_factory.mktemp("models")
    model = build_tiny(0, **SMALL)
    model.norm_stats["libero_object"] = {
        "action": {
            "q01": [-1.0] * 3 + [0.0] * 4,
            "q99": [1.0] * 3 + [0.0] * 3 + [1.0],
            "mask": [True] * 6 + [False],
        }
    }
    model.save_pretrained(root / "policy")
    model.side_files["rprm.json"] = b"{}"
    model.save_pretrained(root / "rprm")
    (root / "rprm" / "rprm.json").write_text("{}")
    return root


def _command(models, out, *extra):
    return [
        sys.executable,
        "train.py",
        "--task-ids",
        "0",
        "--model",
        str(models / "policy"),
        "--reward-model",
        str(models / "rprm"),
        "--num-envs",
        "2",
        "--num-workers",
        "1",
        "--num-steps",
        "3",
        "--total-steps",
        "24",
        "--max-episode-steps",
        "20",
        "--critic-warmup",
        "1",
        "--eval-every",
        "0",
        "--final-episodes",
        "0",
        "--video-every",
        "2",
        "--minibatch-size",
        "4",
        "--start-episodes",
        "0",
        "--temperature",  # another one than tiny's default: rollout and update must both take it
        "1.3",
        "--eval-temperature",
        "0.8",
        "--advantage-floor",  # random models earn next to nothing, and are to move all the same
        "0",
        "--out",
        str(out),
        *extra,
    ]


def _start(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(command, code=0):
    run = _start(command)
    stdout, stderr = run.communicate(timeout=800)
    assert run.returncode == code, stderr
    return stdout, stderr


def _wait_for_iteration(out, n, run):
    deadline = time.time() + 800
    while time.time() < deadline and run.poll() is None:
        if (out / "checkpoints" / f"{n:06d}").is_dir():
            return
        time.sleep(0.05)
    raise AssertionError(run.communicate())


def _metrics(out):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith("time/") and k != "charts/SPS"} for x in lines]


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    stdout, stderr = _finish(_command(models, out))
    return out, stdout, stderr


@pytest.mark.libero
def test_the_start_policy_is_iteration_0_and_evaluations_follow_every_so_often(models, tmp_path):
    out = tmp_path / "run"
    flags = "--eval-every", "2", "--eval-episodes", "1", "--start-episodes", "1", "--critic-warmup", "0"
    stdout, _ = _finish([sys.executable, "tests/short.py", *_command(models, out, *flags)[1:]])
    metrics = _metrics(out)
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["charts/decisions"] for m in metrics] == [0, 6, 12, 18, 24]
    assert [m.get("eval/episodes") for m in metrics] == [1, None, 1, None, None]
    lines = [line for line in stdout.splitlines() if line.startswith(("start policy", "it "))]
    assert lines[0] == "start policy 0 % of 1 test episodes"
    assert "eval" not in lines[1] and "eval 0 %" in lines[2] and "eval" not in lines[3]
    assert (out / "checkpoints" / "000000").is_dir()  # nothing was better

    # Killed between that evaluation and the next checkpoint: the start policy still counts as the best so far.
    killed = tmp_path / "killed"
    shutil.copytree(out / "checkpoints/000000", killed / "checkpoints/000000")
    shutil.copy(out / "config.json", killed)
    first, *_ = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text(first)
    _finish([sys.executable, "tests/short.py", "train.py", "--resume", str(killed)])
    assert [m["iteration"] for m in _metrics(killed)] == [0, 1, 2, 3, 4]
    assert (killed / "checkpoints" / "000000").is_dir()


@pytest.mark.libero
def test_a_run_leaves_what_it_promises(models, uninterrupted):
    out, stdout, stderr = uninterrupted
    metrics = _metrics(out)
    assert [m["iteration"] for m in metrics] == [1, 2, 3, 4]
    assert "losses/policy_loss" not in metrics[0] and "losses/policy_loss" in metrics[1]  # critic warm-up
    assert all(m["losses/first_ratio_error"] < 1e-5 for m in metrics[1:])
    assert all(0 < m["charts/prm_score"] < 1 for m in metrics)
    assert (out / "success.png").read_bytes()[:4] == b"\x89PNG" and list((out / "videos").glob("*.mp4"))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000003", "000004"]  # --keep 2
    assert list((out / "tensorboard").glob("events*"))
    assert "Traceback" not in stderr and "robosuite" not in stderr + stdout and "EGL" not in stderr
    assert sum(line.startswith("it ") for line in stdout.splitlines()) == 4
    start, end = (load_file(p / "model.safetensors") for p in (models / "policy", out / "policy"))
    moved = [k for k in end if not torch.equal(start[k], end[k])]
    # LoRA on the language side only.
    assert moved and all(k.startswith("language_model.model.layers") for k in moved)
    # Whoever evaluates the policy later does it at the temperature of this run's evaluations.
    assert json.loads((out / "policy" / "config.json").read_text())["sampling_temperature"] == 0.8


# The last thing that happens to a checkpoint is that it gets its name.
KILLED_WHILE_WRITING = """
import os, runpy, signal
rename = os.rename
def rename_or_die(source, target):
    if str(source).endswith('000003.tmp'):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = rename_or_die
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.libero
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(models, uninterrupted, tmp_path):
    """Killed in the middle of a rollout, resumed, killed while a checkpoint is written, resumed."""
    out = tmp_path / "b"
    run = _start(_command(models, out))
    _wait_for_iteration(out, 1, run)
    run.kill()  # in the middle of iteration 2
    run.communicate()
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 2, "half a li')  # as a crash may leave it
    run = _start([sys.executable, "-c", KILLED_WHILE_WRITING, "--resume", str(out)])
    stdout, stderr = run.communicate(timeout=800)
    assert run.returncode == -signal.SIGKILL and "resumed at iteration" in stdout, stderr
    assert (out / "checkpoints" / "000003.tmp").exists()
    stdout, _ = _finish([sys.executable, "train.py", "--resume", str(out)])
    assert "resumed at iteration" in stdout
    assert _metrics(out) == _metrics(uninterrupted[0])
    # And the critic, and the environments in the middle of their episodes.
    files = ["policy/model.safetensors"]
    files += [
        f"checkpoints/000004/adapters/{x}"
        for x in ("critic/adapter_model.safetensors", "value_head.safetensors")
    ]
    for name in files:
        ours, theirs = load_file(out / name), load_file(uninterrupted[0] / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    ours, theirs = (
        torch.load(x / "checkpoints/000004/state.pt", weights_only=True) for x in (out, uninterrupted[0])
    )
    assert all(torch.equal(ours["envs"][k], theirs["envs"][k]) for k in theirs["envs"])
    assert torch.equal(ours["samplers"], theirs["samplers"])


@pytest.mark.libero
def test_a_run_of_an_earlier_version_is_resumed(models, uninterrupted, tmp_path):
    """Flags that were renamed or are gone, and the names that its environments' state had."""
    out = shutil.copytree(uninterrupted[0], tmp_path / "old")
    config = json.loads((out / "config.json").read_text())
    old = {**config, "lam": config.pop("gae_lambda"), "groups": 2, "from_scratch": False, "out": str(out)}
    (out / "config.json").write_text(
        json.dumps({k: v for k, v in old.items() if k not in ("gae_lambda", "track")})
    )
    shutil.rmtree(out / "checkpoints" / "000004")
    path = out / "checkpoints" / "000003"
    state = torch.load(path / "state.pt", weights_only=True)
    for before, now in {"parked": "idle", "asked_next": "assigned_next"}.items():
        state["envs"][before] = state["envs"].pop(now)
    state["envs"]["asked_now"] = state["envs"]["asked_next"]  # it had one array more
    torch.save(state, path / "state.pt")
    (path / "sha256.json").unlink()
    (path / "sha256.json").write_text(json.dumps(checkpoints.checksums(path)))
    (out / "results.json").write_text("{}")  # of where it stood before
    stdout, stderr = _finish([sys.executable, "train.py", "--resume", str(out)])
    assert not (out / "results.json").exists()
    assert "resumed at iteration 4 of 4" in stdout and "no setting 'groups' any more" in stderr
    assert _metrics(out) == _metrics(uninterrupted[0])


@pytest.mark.libero
@pytest.mark.slow
def test_interrupt_saves_and_says_how_to_go_on(models, tmp_path):
    out = tmp_path / "c"
    run = _start(_command(models, out, "--total-steps", "6000"))
    _wait_for_iteration(out, 2, run)
    children = psutil.Process(run.pid).children(recursive=True)
    began = time.time()
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and time.time() - began < 20
    assert f"--resume {out}" in stderr and "Traceback" not in stderr
    assert not psutil.wait_procs(children, timeout=10)[1]  # no orphan
    # The newest checkpoint is damaged: the run goes on from the one before, and says so. And with the learning rate
    # that config.json has now, as the advice after a NaN promises.
    saved = sorted((out / "checkpoints").iterdir())
    assert len(saved) > 1
    broken = saved[-1] / "state.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "lr": 3e-6, "lr_schedule": "constant"}))
    run = _start([sys.executable, "train.py", "--resume", str(out)])
    _wait_for_iteration(out, int(saved[-1].name) + 1, run)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=60)
    assert f"{saved[-1]} is damaged" in stderr and f"resumed at iteration {int(saved[-1].name)}" in stdout
    newest = max((out / "checkpoints").iterdir())
    assert (
        torch.load(newest / "state.pt", weights_only=True)["policy_optimizer"]["param_groups"][0]["lr"]
        == 3e-6
    )
    # Other weights under the name that the run began with.
    (out / "config.json").write_text(
        json.dumps({**config, "model": str(shutil.copytree(models / "policy", tmp_path / "m"))})
    )
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {**tensors, "language_model.lm_head.weight": tensors["language_model.lm_head.weight"] + 1},
        weights,
        {"format": "pt"},
    )
    _, stderr = _finish([sys.executable, "train.py", "--resume", str(out)], code=1)
    assert (
        stderr.splitlines()[-1].startswith("error: ")
        and "put that back" in stderr
        and "Traceback" not in stderr
    )


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--suite", "libero_nothing"], "unknown suite"),
        (["--task-ids", "99"], "task id 99"),
        (["--num-envs", "0"], "--num-envs"),
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--resume", "/nonexistent/run"], "/nonexistent/run"),
        (["--curriculum", "hard"], "curriculum"),
        (["--max-grad-norm", "0"], "--max-grad-norm"),  # would freeze everything, not turn the limit off
        (["--target-kl", "0"], "--target-kl"),
        (["--prm-mode", "sum", "--reward-model", "/nonexistent/rprm"], "/nonexistent/rprm"),
        (["--out", "/proc/run"], "/proc/run"),
        (["--task-ids", "0,0"], "each task once"),
        (["--suite", "libero_90", "--model", "openvla-tiny"], "no policy for libero_90"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, flags, what, capsys, monkeypatch):
    base = [
        "--model",
        str(models / "policy"),
        "--reward-model",
        str(models / "rprm"),
        "--out",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *base, *flags])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        train.main(parse_args(train.Args, ""))
    for number, handler in handlers.items():  # train.py's own would stay
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2) and what in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) <= 2
    assert not (tmp_path / "r").exists()


def test_a_reward_model_of_another_model_is_refused_at_once(models, tmp_path):
    other = build_tiny(0, **{**SMALL, "image_size": 48})
    other.side_files["rprm.json"] = b"{}"
    other.save_pretrained(tmp_path / "other")
    flags = [
        "--model",
        str(models / "policy"),
        "--reward-model",
        str(tmp_path / "other"),
        "--lora-targets",
        "all",
        "--task-ids",
        "0",
    ]
    command = [sys.executable, "train.py", *flags, "--out", str(tmp_path / "r")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        run.returncode == 1 and "trained from another model" in run.stderr and "Traceback" not in run.stderr
    )
    assert len(run.stderr.strip().splitlines()) == 1 and not (tmp_path / "r").exists()


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """An error while writing removes the half-written directory and keeps the old one."""

    class Nothing:
        def save_adapters(self, directory):
            directory.mkdir()

    checkpoints.save_checkpoint(tmp_path, 1, Nothing(), {"iteration": 1}, keep=2, best=0)

    class Full(Nothing):
        def save_adapters(self, directory):
            raise OSError(28, "No space left on device")

    with pytest.raises(checkpoints.UserError, match="previous one is intact"):
        checkpoints.save_checkpoint(tmp_path, 2, Full(), {"iteration": 2}, keep=2, best=0)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000001"]


def test_state_survives_weights_only(tmp_path):
    tree = {
        "a": {"b": np.arange(3, dtype=np.int64), "c": np.float64(2.5)},
        "d": np.zeros((2, 2), bool),
        "e": "text",
        "f": 1,
    }
    torch.save(checkpoints.to_tensors(tree), tmp_path / "x.pt")
    back = checkpoints.to_numpy(torch.load(tmp_path / "x.pt", weights_only=True))
    np.testing.assert_array_equal(back["a"]["b"], tree["a"]["b"])
    assert back["a"]["c"] == 2.5 and back["d"].dtype == bool and (back["e"], back["f"]) == ("text", 1)


@pytest.mark.libero
@pytest.mark.parametrize("suite", sorted(folder.parent.name for folder in ROOT.glob("checkpoints/*/policy")))
def test_each_suite_with_a_shipped_policy_starts_at_once(suite, tmp_path):
    """With the defaults, but one task and few decisions; the policy's statistics are those of its suite."""
    few = "--task-ids 1 --num-envs 2 --num-steps 4 --total-steps 8 --critic-warmup 0 --advantage-floor 0 --start-episodes 0"
    flags = [*few.split(), "--final-episodes", "0", "--eval-every", "0", "--video-every", "0"]
    stdout, _ = _finish(
        [sys.executable, "train.py", "--suite", suite, *flags, "--out", str(tmp_path / "run")]
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Path(config["model"]).resolve() == ROOT / "checkpoints" / suite / "policy", stdout
    has_rprm = (ROOT / "checkpoints" / suite / "rprm").is_dir()
    assert config["prm_mode"] == ("potential" if has_rprm else "none")
    (metrics,) = _metrics(tmp_path / "run")
    assert metrics["charts/decisions"] == 8 and metrics["losses/first_ratio_error"] < 1e-3
    assert suite in json.loads((tmp_path / "run" / "policy" / "config.json").read_text())["norm_stats"]


def test_long_suites_have_defaults_of_their_own_and_a_given_value_stays():
    for suite, given, want in (
        ("libero_10", {}, (320, 81_920, 128, 256, 5e-4, "frontier")),
        ("libero_90", {}, (320, 81_920, 128, 256, 5e-4, "frontier")),
        ("libero_goal", {}, (160, 81_920, 128, 256, 5e-4, "frontier")),
        ("libero_10", dict(max_episode_steps=100, curriculum="eq4"), (100, 81_920, 128, 256, 5e-4, "eq4")),
    ):
        model = str(ROOT / "checkpoints/libero_goal/policy")
        args = train.fill_defaults(train.Args(suite=suite, model=model, **given))[0]
        names = ("max_episode_steps", "total_steps", "num_steps", "minibatch_size", "lr", "curriculum")
        assert tuple(getattr(args, name) for name in names) == want
