"""Faults, signals, numbers that are none: each ends in recovery or in one clear line; what was written stays."""

import json
import os
import re
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
from test_train import SMALL, _command, _start, _wait_for_iteration, models  # noqa: F401 (a fixture)

from policy import ActorCritic, build_tiny
from ppo import PPOConfig, RolloutBuffer, ppo_update
from simulator.pool import WorkerProcess, _signal_name
from support import checkpoints, demonstrations, errors, training
from support.numerics import NumericsError

ROOT = Path(__file__).resolve().parents[1]


def only_error(stderr):
    """The one line that says what happened, and no traceback."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def newest(out):
    """The newest checkpoint of a run, after its checksums were compared."""
    path = max(p for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert json.loads((path / "sha256.json").read_text()) == checkpoints.checksums(path)
    return int(path.name)


def all_gone(processes, seconds=10):
    return not [p for p in psutil.wait_procs(processes, seconds)[1] if p.status() != psutil.STATUS_ZOMBIE]


# --------------------------------------------------------------------------------------------------------------------
# Numerics
# --------------------------------------------------------------------------------------------------------------------


def rollout(actor_critic, T=3, N=2):
    """A finished rollout of noise images, with everything that the update needs."""
    model, generator = actor_critic.model, torch.Generator().manual_seed(0)
    buffer = RolloutBuffer(T, N, (model.num_patches, model.text["hidden_size"]), "patch_embeddings")
    ids, mask = model.tokenize(["pick up the soup"] * N)
    for t in range(T):
        images = torch.randn(N, *buffer.images.shape[2:], generator=generator)
        buffer.store_observation(t, 0, ["pick up the soup"] * N, ids, mask, patch_embeddings=images)
        buffer.store_decision(t, *actor_critic.act(ids, mask, patch_embeddings=images, generator=generator))
        buffer.store_outcome(t, torch.rand(N, generator=generator), [False] * N, [False] * N, torch.zeros(N))
    buffer.compute_advantages(torch.zeros(N), 0.99, 0.95)
    return buffer


def test_debug_bundle_holds_what_is_needed_to_repeat_the_update(tmp_path):
    """The bundle alone, loaded with weights_only, gives the same infinite loss again."""
    actor_critic = ActorCritic(
        build_tiny(0, words=["pick", "up", "the", "soup"], **SMALL), targets="language"
    )
    parameters = {"policy": actor_critic.policy_parameters(), "critic": actor_critic.critic_parameters()}
    optimizers = {name: torch.optim.AdamW(p) for name, p in parameters.items()}
    buffer, generator = rollout(actor_critic), torch.Generator().manual_seed(3)
    args = (
        actor_critic,
        buffer,
        *optimizers.values(),
        PPOConfig(temperature=1.0, minibatch_size=2),
        True,
        generator,
    )
    ppo_update(*args)
    before = [p.clone() for p in actor_critic.policy_parameters()]
    buffer.log_probs[1, 0] = float("nan")  # as a fault in the rollout would leave it
    with pytest.raises(NumericsError) as error:
        ppo_update(*args)
    assert 2 in error.value.indices  # t * N + n
    generators = {"minibatches": generator.get_state()}
    said = checkpoints.save_debug_bundle(
        tmp_path / "debug/000007.pt", error.value, 7, buffer, actor_critic, optimizers, generators
    )
    path = tmp_path / "debug" / "000007.pt"
    assert str(path) in said
    bundle = torch.load(path, weights_only=True)
    assert bundle["quantity"] == "policy loss" and bundle["iteration"] == 7
    rows = bundle["indices"]
    assert bundle["minibatch"]["log_probs"][rows == 2].isnan().all()
    for name in (
        "images",
        "action_tokens",
        "input_ids",
        "advantages",
        "returns",
        "rewards",
        "prm_scores",
        "values",
    ):
        assert torch.equal(bundle["minibatch"][name], getattr(buffer, name)[:3].flatten(0, 1)[rows])
    trainable = {k: p for k, p in actor_critic.named_parameters() if p.requires_grad}
    assert bundle["trainable"].keys() == trainable.keys()
    assert all(torch.equal(bundle["trainable"][k], p) for k, p in trainable.items())
    assert bundle["optimizers"]["critic"]["state"]
    assert torch.equal(bundle["generators"]["minibatches"], generator.get_state())
    assert bundle["not_finite"] == []  # the fault is in the rollout, not in the weights
    assert all(torch.equal(a, b) for a, b in zip(before, actor_critic.policy_parameters()))


def test_a_debug_bundle_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    (tmp_path / "debug").write_text("in the way")
    actor_critic = ActorCritic(
        build_tiny(0, words=["pick", "up", "the", "soup"], **SMALL), targets="language"
    )
    said = checkpoints.save_debug_bundle(
        tmp_path / "debug/000001.pt", NumericsError("reward"), 1, rollout(actor_critic), actor_critic, {}, {}
    )
    assert "could not be saved" in said


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize(
    "poison, quantity",
    [("policy", "log-prob"), ("rprm", "RPRM score"), ("lr", "log-prob|value|loss|gradient")],
)
def test_nan_in_a_real_run_is_named_saved_and_kept_out_of_checkpoints(models, tmp_path, poison, quantity):  # noqa: F811
    shutil.copytree(models, tmp_path / "models")
    if poison != "lr":
        path = tmp_path / "models" / poison / "model.safetensors"
        tensors = load_file(path)
        tensors["language_model.model.norm.weight"][0] = float("nan")
        save_file(tensors, path)
    flags = ["--lr", "1e30", "--critic-warmup", "0"] if poison == "lr" else []
    out = tmp_path / "run"
    run = _start(_command(tmp_path / "models", out, *flags))
    _, stderr = run.communicate(timeout=800)
    line = only_error(stderr)
    assert (
        run.returncode == 1 and re.search(f"({quantity}) is not finite", line) and f"--resume {out}" in line
    )
    bundle = torch.load(out / "debug" / "000001.pt", weights_only=True)
    assert str(out / "debug" / "000001.pt") in line and re.search(quantity, bundle["quantity"])
    assert newest(out) == 0 and not (out / "metrics.jsonl").read_text()


# --------------------------------------------------------------------------------------------------------------------
# Disk and directory
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (65536, 4096, 256, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def test_full_disk_at_any_point_of_a_checkpoint_leaves_the_previous_one(small_disk):
    """The disk has room for some of the new checkpoint: none, a little, nearly all."""
    actor_critic = ActorCritic(build_tiny(0, words=["soup"], **SMALL), targets="language")
    state = {"iteration": 1, "x": torch.zeros(50_000)}
    checkpoints.save_checkpoint(small_disk, 1, actor_critic, state, keep=2, best=-1)
    need = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
    refused = 0
    for spare in range(0, 3 * need, need // 8):
        fill(small_disk)
        os.truncate(small_disk / "filler", max(0, (small_disk / "filler").stat().st_size - spare))
        try:
            checkpoints.save_checkpoint(
                small_disk, 2, actor_critic, {**state, "iteration": 2}, keep=2, best=-1
            )
        except errors.UserError as error:
            assert "No space left" in str(error) or "write" in str(error)
            assert "previous one is intact" in str(error) and "\n" not in str(error)
            assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["000001"]
            assert checkpoints.load_checkpoint(small_disk, actor_critic)["iteration"] == 1
            refused += 1
        else:
            break
    assert refused >= 6 and checkpoints.load_checkpoint(small_disk, actor_critic)["iteration"] == 2


def test_full_disk_without_an_earlier_checkpoint_promises_none(small_disk):
    actor_critic = ActorCritic(build_tiny(0, words=["soup"], **SMALL), targets="language")
    state = {"iteration": 0, "x": torch.zeros(50_000)}
    fill(small_disk)
    with pytest.raises(errors.UserError, match="there is no other. Free some space") as error:
        checkpoints.save_checkpoint(small_disk, 0, actor_critic, state, keep=2, best=-1)
    assert "intact" not in str(error.value) and "\n" not in str(error.value)
    assert not list(small_disk.rglob("*.tmp"))
    with pytest.raises(errors.UserError, match="there is none before it"):
        training.save_state(state, small_disk / "training.pt")
    (small_disk / "training.pt").write_bytes(b"")  # as if there were one
    with pytest.raises(errors.UserError, match="the one before is intact"):
        training.save_state(state, small_disk / "training.pt")
    assert not list(small_disk.rglob("*.tmp"))


def test_full_disk_refuses_demonstrations_in_one_line(small_disk, tmp_path):
    """HDF5 itself ends in a segmentation fault on a full disk, with a part of a file left behind."""
    frames = np.random.default_rng(0).integers(
        0, 256, (50, 64, 64, 3), dtype=np.uint8
    )  # not to be compressed
    demo = {"actions": np.ones((50, 7)), "agentview_rgb": frames}
    parts = [tmp_path / f"x.part{i}" for i in range(8)]
    for part in parts:
        demonstrations.write_demos(part, [demo] * 2, 4, "do it")
    whole = small_disk / "x_demo.hdf5"
    demonstrations.write_demos(whole, [demo], 4, "do it")
    before = whole.read_bytes()
    for write in (
        lambda: demonstrations.write_demos(whole, [demo] * 16, 4, "do it"),
        lambda: demonstrations.merge_parts(parts, whole),
    ):
        with pytest.raises(errors.UserError, match="cannot write .*x_demo.hdf5: No space left") as error:
            write()
        assert "\n" not in str(error.value)
        assert os.listdir(small_disk) == [whole.name] and whole.read_bytes() == before
    assert all(part.exists() for part in parts)  # nothing recorded is lost


@pytest.mark.libero
@pytest.mark.slow
def test_full_disk_ends_a_real_run_in_one_line(models, small_disk):  # noqa: F811
    out = small_disk / "run"
    run = _start(_command(models, out, "--total-steps", "6000"))
    _wait_for_iteration(out, 1, run)
    fill(small_disk)
    _, stderr = run.communicate(timeout=800)
    assert run.returncode == 1 and f"--resume {out}" in only_error(stderr)
    (small_disk / "filler").unlink()
    assert newest(out) >= 1
    lines = (out / "metrics.jsonl").read_text().split("\n")
    assert all(json.loads(line)["iteration"] == i for i, line in enumerate(lines[: newest(out)], 1))


@pytest.mark.parametrize("late", [False, True])
def test_a_directory_deleted_while_a_checkpoint_is_written_is_written_again(tmp_path, late):
    """Deleted once, before or after the adapters are in it; deleted every time: one line."""
    actor_critic, out = (
        ActorCritic(build_tiny(0, words=["soup"], **SMALL), targets="language"),
        tmp_path / "run",
    )
    save, deletions = actor_critic.save_adapters, [1]

    def save_and_delete(path):
        if late:
            save(path)
        if deletions:
            deletions.pop()
            shutil.rmtree(out)
        if not late:
            save(path)

    actor_critic.save_adapters = save_and_delete
    checkpoints.save_checkpoint(out, 7, actor_critic, {"iteration": 7}, keep=2, best=-1)
    assert newest(out) == 7 and not list((out / "checkpoints").glob("*.tmp"))
    assert checkpoints.load_checkpoint(out, actor_critic)["iteration"] == 7
    if late:  # before: save_adapters makes its directory again
        deletions += [1, 1]
        with pytest.raises(errors.UserError, match="cannot write the checkpoint") as error:
            checkpoints.save_checkpoint(out, 8, actor_critic, {"iteration": 8}, keep=2, best=-1)
        assert "\n" not in str(error.value)


@pytest.mark.libero
@pytest.mark.slow
def test_a_deleted_run_directory_is_written_again(models, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    run = _start(_command(models, out, "--total-steps", "6000"))
    _wait_for_iteration(out, 1, run)
    run.send_signal(signal.SIGSTOP)  # wherever it is, in the middle of a write too
    done = newest(out)
    shutil.rmtree(out)
    run.send_signal(signal.SIGCONT)
    _wait_for_iteration(out, done + 2, run)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and f"{out} has vanished" in stderr and "Traceback" not in stderr
    last = newest(out)
    iterations = [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert iterations[:last] == list(range(1, last + 1))  # the deleted lines too
    assert json.loads((out / "config.json").read_text())["total_steps"] == 6000


# --------------------------------------------------------------------------------------------------------------------
# Workers and signals
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, hung", [("import time; time.sleep(600)", True), ("while True: pass", False)])
def test_a_process_is_hung_when_it_uses_no_processor_time(code, hung):
    """However slow a busy process is on a loaded machine, it is not hung."""
    handle = WorkerProcess(0, [0])
    handle.building, handle.process = False, subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(2.0)  # Python starts
        answers = []
        for _ in range(40):
            time.sleep(0.25)
            answers.append(handle.is_hung())
        assert any(answers) == hung and not any(answers[:8])
    finally:
        handle.process.kill()
        handle.process.wait()


def test_a_signal_without_a_name_is_named_by_its_number():
    assert _signal_name(9) == "SIGKILL" and _signal_name(40) == "signal 40"


STOP = """
import ctypes, time
from support.signals import Stop
Stop.GRACE = 3.0
Stop('the/run').begin()
print('ready', flush=True)
while True:
    time.sleep(0.1)
"""
# A call that never returns to Python's interpreter: glibc's mutex, locked twice.
HANG = STOP.replace(
    "    time.sleep(0.1)",
    "    lock = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None); "
    "[libc.pthread_mutex_lock(lock) for _ in range(2)]",
)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nothing_answers_ends_the_process(number, again):
    """Once: after a grace for the update or whatever is going on, with a word on how to resume. Twice: at once."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen([sys.executable, "-c", STOP], cwd=ROOT, **pipes)
    run.stdout.readline()
    run.send_signal(number)
    began = time.monotonic()
    assert "once more" in run.stderr.readline() + run.stderr.readline()
    if again:
        run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    if again:
        assert run.returncode == 128 + number and time.monotonic() - began < 3 and "the/run" not in stderr
    else:
        assert run.returncode == 130 and time.monotonic() - began < 13 and "--resume the/run" in stderr


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_ends_a_process_that_hangs_in_a_driver(again):
    """There no Python handler runs, so the two lines that it would print are missing."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen([sys.executable, "-c", HANG], cwd=ROOT, **pipes)
    run.stdout.readline()
    time.sleep(1.0)
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    if again:
        time.sleep(0.5)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    if again:
        assert run.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 3 and stderr == ""
    else:
        assert run.returncode == 130 and time.monotonic() - began < 13 and "--resume the/run" in stderr


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["building", "evaluation", "update"])
def test_a_signal_at_any_phase_ends_the_run_within_20_seconds(models, tmp_path, phase):  # noqa: F811
    out = tmp_path / "run"
    flags = {"building": [], "evaluation": ["--eval-every", "1"], "update": ["--epochs", "1000000"]}[phase]
    run = _start(_command(models, out, *flags))
    main = psutil.Process(run.pid)
    if phase == "building":
        while not main.children():
            time.sleep(0.1)
        time.sleep(1.0)
    else:
        _wait_for_iteration(out, 0, run)
        time.sleep(2.0)
        if phase == "update":  # workers idle: the rollout is over
            workers, before = main.children(), None
            while before != (before := [p.cpu_times().user for p in workers]):
                time.sleep(3.0)
    workers = main.children(recursive=True)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and time.monotonic() - began < 20, stderr
    assert workers and all_gone(workers) and "Traceback" not in stderr
    if phase == "building":
        assert "interrupted" in stderr and not (out / "config.json").exists()
    else:
        assert f"--resume {out}" in stderr and newest(out) == 0


@pytest.mark.libero
@pytest.mark.slow
def test_even_a_stopped_worker_does_not_outlive_a_killed_run(models, tmp_path):  # noqa: F811
    run = _start(_command(models, tmp_path / "run", "--total-steps", "6000"))
    _wait_for_iteration(tmp_path / "run", 0, run)
    workers = psutil.Process(run.pid).children()
    os.kill(workers[0].pid, signal.SIGSTOP)
    run.kill()
    run.communicate()
    assert all_gone(workers)
