"""Several ranks make the update of one; what is global is global; a rank that dies ends the job in words; ranks may change.

Ranks are real processes with gloo on the CPU, started by torchrun, on small OpenVLA models (tests/distributed_worker.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import _command, _metrics, models  # noqa: F401 (models is a fixture)

import envs
import eval as evaluation
import ppo
from simulator import devices
from support import distributed

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command, **environment):
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(run, code=0):
    stdout, stderr = run.communicate(timeout=2400)
    assert run.returncode == code, stderr
    return stdout, stderr


# The update ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """[{(name, shard): results of worker.update} of rank 0, of rank 1]"""
    directory = tmp_path_factory.mktemp("updates")
    finish(start([*LAUNCH, "tests/distributed_worker.py", "updates", str(directory)]))
    return [torch.load(directory / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("name", worker.UPDATES)
def test_two_ranks_make_the_update_of_one(two_ranks, name, shard):
    one = worker.update(distributed.Ranks(), name)
    parts = [rank[name, shard] for rank in two_ranks]
    # The same rollout.
    assert torch.equal(torch.cat([part["tokens"] for part in parts], dim=1), one["tokens"])
    for part in parts:
        assert len(part["gradients"]) == len(one["gradients"]) > 0
        for ours, theirs in zip(part["gradients"], one["gradients"], strict=True):
            assert theirs.abs().max() > 1e-3 and (ours - theirs).abs().max() < 1e-6
        # Adam's first steps divide a gradient by its own size: rounding of the smallest ones is what is left.
        torch.testing.assert_close(part["weights"], one["weights"], rtol=0, atol=1e-5)
        assert part["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
    assert torch.equal(parts[0]["weights"], parts[1]["weights"])  # ranks never drift apart
    assert parts[0]["metrics"] == parts[1]["metrics"]
    if name.startswith("kl guard"):
        steps = one["metrics"]["losses/policy_steps"]
        assert one["metrics"]["losses/kl_stop"] == 1 and 0 < steps < 2 * len(
            ppo.minibatches(worker.T, worker.N, 8, torch.Generator())
        )


@pytest.mark.slow
def test_a_sharded_model_gives_back_its_weights_and_its_start(two_ranks):
    one, parts = worker.update(distributed.Ranks(), "all"), [rank["all", True] for rank in two_ranks]
    for part in parts:
        assert part["merged"].keys() == one["merged"].keys()
        for name, tensor in one["merged"].items():
            torch.testing.assert_close(part["merged"][name], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(part["start"], one["start"], rtol=0, atol=1e-5)
    base = worker.build_tiny(0, words=["pick", "up", "milk"], **worker.SMALL)
    ids, mask = base.tokenize(["pick milk"])
    with torch.no_grad():
        before = base.prompt_state(ids, mask, pixel_values=torch.ones(1, 6, 32, 32))
    torch.testing.assert_close(one["start"], before, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(0, 5))
def test_ranks_share_every_mini_batch_evenly_and_without_loss(T, per_rank, ranks, size, seed):
    N = per_rank * ranks
    for whole in ppo.minibatches(T, N, size, torch.Generator().manual_seed(seed)):
        parts = [distributed.Ranks(rank, ranks).own_part(whole, per_rank) for rank in range(ranks)]
        assert {len(part) for part in parts} == {len(whole) // ranks}
        back = [
            int(i // per_rank * N + rank * per_rank + i % per_rank)
            for rank in range(ranks)
            for i in parts[rank]
        ]
        assert sorted(back) == sorted(whole.tolist())
        assert torch.equal(distributed.ALONE.own_part(whole, N), whole)


class Sum:
    """What `normalize_advantages` asks of ranks, for the parts of a rollout one after the other."""

    def __init__(self, parts):
        x = [part.double() for part in parts]
        self.total = sum(torch.stack([torch.tensor(float(p.numel())), p.sum(), p.square().sum()]) for p in x)

    def sum_(self, moments):
        return moments.copy_(self.total)


def test_advantages_are_normalised_over_all_ranks():
    both = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6)
    parts = both[:, :3], both[:, 3:]
    ours = [ppo.normalize_advantages(part, ranks=Sum(parts))[0] for part in parts]
    torch.testing.assert_close(
        torch.cat(ours, dim=1), ppo.normalize_advantages(both)[0], rtol=1e-6, atol=1e-7
    )


# What is global besides ----------------------------------------------------------------------------------------------


def test_the_curriculum_counts_episodes_in_the_order_of_one_process():
    """Windows of 3: which outcomes are still in them depends on the order."""
    rng = np.random.default_rng(0)
    T, N = 12, 6
    ended, won = rng.random((T, N)) < 0.4, rng.random((T, N)) < 0.5
    lost, task_ids = rng.random((T, N)) < 0.1, rng.integers(2, size=(T, N))

    def finished(environments):
        """What a rank with these environments reports."""
        part = slice(environments.start, environments.stop)
        buffer = ppo.RolloutBuffer(T, len(environments), (1, 1), frame_shape=(1, 1, 3))
        for t in range(T):
            flags = (ended & won)[t, part], (ended & ~won)[t, part]
            buffer.store_outcome(
                t, [0.0] * len(environments), *flags, torch.zeros(1), task_ids[t, part], 4, lost[t, part]
            )
        return buffer.finished_episodes(environments.start)

    one = envs.Curriculum([0, 1], window=3)
    order = zip(*np.nonzero(ended & ~lost), strict=True)
    one.update([(int(task_ids[t, n]), bool(won[t, n])) for t, n in order])
    for ranks in (1, 2, 3):
        parts = [finished(range(r * N // ranks, (r + 1) * N // ranks)) for r in range(ranks)]
        several = envs.Curriculum([0, 1], window=3)
        several.update([(task, success) for _, _, task, success in sorted(e for part in parts for e in part)])
        assert several.state_dict()["outcomes"].tolist() == one.state_dict()["outcomes"].tolist()
        assert several.num_updates == one.num_updates > 10


@settings(max_examples=50, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 49))), st.integers(1, 8))
def test_an_evaluation_is_split_so_that_each_episode_is_played_once(missing, ranks):
    shares = [evaluation.share_of_episodes(missing, rank, ranks) for rank in range(ranks)]
    assert sorted(episode for share in shares for episode in share) == sorted(missing)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_eval_takes_over_what_other_ranks_logged(tmp_path):
    episodes = [{"task_id": 0, "init_state": i, "success": bool(i % 2), "steps": i} for i in range(5)]
    first, other = (
        evaluation.EpisodeLog(tmp_path / f"episodes{x}.jsonl", {"seed": 0}) for x in ("", "-rank1")
    )
    first.append(episodes[0])
    for episode in episodes[1:]:
        other.append(episode)
    log = evaluation.EpisodeLog(tmp_path / "episodes.jsonl", {"seed": 0})
    # A crash came after this one was taken over, and before the other file was deleted.
    log.append(episodes[1])
    log = evaluation.EpisodeLog(tmp_path / "episodes.jsonl", {"seed": 0})
    log.absorb()
    assert [path.name for path in tmp_path.iterdir()] == ["episodes.jsonl"]
    again = evaluation.EpisodeLog(tmp_path / "episodes.jsonl", {"seed": 0})
    assert again.episodes == log.episodes == episodes


def test_environment_states_are_merged_and_split():
    settings = np.frombuffer(json.dumps({"suite": "x", "num_envs": 6, "render": "light"}).encode(), np.uint8)
    state = {
        "idle": np.arange(6) % 2 == 0,
        "agentview": np.arange(24).reshape(6, 4),
        "seed": np.int64(3),
        "settings": settings,
        # 2 was lost.
        "curriculum_outcomes": np.ones((2, 6)),
        **{f"sim_{i}": np.full(i + 1, i) for i in (0, 1, 3, 4, 5)},
    }
    for ranks in (1, 2, 3, 6):
        parts = [envs.split_state(state, range(r * 6 // ranks, (r + 1) * 6 // ranks)) for r in range(ranks)]
        assert all(json.loads(bytes(part["settings"]))["num_envs"] == 6 // ranks for part in parts)
        assert all(len(part["agentview"]) == 6 // ranks for part in parts)
        back = envs.merge_states(parts)
        assert back.keys() == state.keys()
        for key in state:
            np.testing.assert_array_equal(back[key], state[key])


def test_environments_must_divide_evenly():
    ranks = distributed.Ranks(2, 4)
    assert ranks.share(8) == range(4, 6)
    with pytest.raises(distributed.UserError, match="multiple of 4"):
        ranks.share(6)


def test_egl_devices_are_shared_out(monkeypatch):
    share, ranks = devices.share_of_machine, distributed.Ranks()
    assert share(ranks) == dict(num_workers=None, egl_devices=None)  # one process: as before
    ranks.device = "cuda"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert share(ranks)["egl_devices"] is None  # and EGL chooses
    ranks.local_size, ranks.local_rank, ranks.device = 4, 1, "cuda:1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7")
    monkeypatch.setattr(devices, "num_egl_devices", lambda: 8)  # the test machine has no GPU
    assert share(ranks, 3)["egl_devices"] == [5]
    # GPUs, but only Mesa's EGL: leave it the choice.
    monkeypatch.setattr(devices, "num_egl_devices", lambda: 1)
    assert share(ranks, 3)["egl_devices"] is None
    assert share(ranks, 3, [0, 1])["egl_devices"] == [1]
    assert share(ranks, 3, [0, 1, 2, 3, 4, 5, 6, 7]) == dict(num_workers=3, egl_devices=[1, 5])
    assert share(ranks)["num_workers"] >= 1
    # In a container EGL may count otherwise; who has named a device is not contradicted, but by the flag.
    monkeypatch.setattr(devices, "num_egl_devices", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,6,7")
    assert share(ranks)["egl_devices"] == [5]
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    assert share(ranks)["egl_devices"] is None
    assert share(ranks, 3, [0, 1])["egl_devices"] == [1]


# Ranks that end ------------------------------------------------------------------------------------------------------


def _wait_for(path, run):
    deadline = time.time() + 300
    while not path.exists() or not path.read_text():
        assert time.time() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.1)
    return int(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kill", "stop"])
def test_a_killed_rank_ends_the_other_within_a_minute_and_says_so(tmp_path, case):
    """kill: the other one waits in a collective. stop: it works by itself, and torchrun's SIGTERM reaches it."""
    run = start([*LAUNCH, "tests/distributed_worker.py", case, str(tmp_path)])
    victim, other = _wait_for(tmp_path / "pid1", run), _wait_for(tmp_path / "pid0", run)
    time.sleep(2)
    began = time.time()
    os.kill(victim, signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert time.time() - began < 60 and run.returncode != 0
    assert "error: rank 0 of 2: rank 1 is gone without a word" in stderr, stderr
    assert not psutil.pid_exists(other)


@pytest.mark.slow
def test_without_torchrun_the_heartbeat_finds_a_dead_rank(tmp_path):
    """Nobody sends signals, and the survivor asks nobody for anything: as inside a long rollout, or inside NCCL."""
    with distributed_port() as port:
        shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command = [sys.executable, "tests/distributed_worker.py", "stop", str(tmp_path)]
        runs = [start(command, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in (0, 1)]
    for r in (0, 1):
        _wait_for(tmp_path / f"pid{r}", runs[r])
    began = time.time()
    runs[1].kill()
    _, stderr = finish(runs[0], code=1)
    assert "error: rank 0 of 2: rank 1 is gone without a word" in stderr and 10 < time.time() - began < 60
    runs[1].communicate()


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_by_all(tmp_path):
    run = start([*LAUNCH, "tests/distributed_worker.py", "error", str(tmp_path)])
    _, stderr = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "error: rank 1 of 2: the milk is spilt" in stderr
    assert "error: rank 0 of 2: rank 1 ended (the milk is spilt)" in stderr


@pytest.mark.slow
def test_a_restart_meets_the_living_and_not_the_addresses_of_the_dead(tmp_path):
    """torchrun's store outlives a restart, and rank 1 may be there first."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    shared = dict(
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(server.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    for _ in range(2):
        command = [sys.executable, "tests/distributed_worker.py", "late", str(tmp_path)]
        for run in [start(command, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in (0, 1)]:
            finish(run)


class distributed_port:
    """A port that is free now."""

    def __enter__(self):
        import socket

        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    def __exit__(self, *_):
        self.socket.close()


def test_only_a_run_younger_than_torchrun_is_continued_unasked(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not distributed.restarted_after(path)
    path.write_text("{}")
    assert distributed.restarted_after(path)  # this process' parent is older than the file
    old = psutil.Process(os.getppid()).create_time() - 60
    os.utime(path, (old, old))
    assert not distributed.restarted_after(path)  # somebody's earlier run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    path.write_text("{}")
    assert not distributed.restarted_after(path)


# train.py under torchrun ---------------------------------------------------------------------------------------------


def _again(out, command):
    """Throw the second iteration away and play it once more. Returns stdout and the metrics."""
    shutil.rmtree(out / "checkpoints" / "000002")
    (out / "results.json").unlink()
    stdout, _ = finish(start(command))
    assert "resumed at iteration 2 of 2" in stdout
    return stdout, _metrics(out)


def _same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.libero
@pytest.mark.slow
def test_train_with_two_ranks_and_then_with_one_and_then_sharded(models, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    flags = (
        "--total-steps",
        "12",
        "--keep",
        "3",
        "--max-episode-steps",
        "8",
        "--critic-warmup",
        "0",
        "--final-episodes",
        "2",
        "--worker-timeout",
        "600",
    )
    stdout, stderr = finish(start([*LAUNCH, "tests/short.py", *_command(models, out, *flags)[1:]]))
    two = _metrics(out)
    results = json.loads((out / "results.json").read_text())
    # Only rank 0 speaks.
    assert "on 2 ranks" in stdout and sum(line.startswith("it ") for line in stdout.splitlines()) == 2
    assert [m["charts/decisions"] for m in two] == [6, 12]
    assert [m["charts/episodes"] for m in two] == [2, 4]  # three decisions each, two to an episode
    for row in results.values():  # each test state once, though neither rank played all
        assert [(e["task_id"], e["init_state"]) for e in row["episodes"]] == [(0, 0), (0, 1)]
    assert "Traceback" not in stderr

    _, one = _again(out, [sys.executable, "tests/short.py", "train.py", "--resume", str(out)])  # 2 ranks -> 1
    assert one[0] == two[0]
    _same(one[1], two[1])
    again = json.loads((out / "results.json").read_text())
    assert {name: row["episodes"] for name, row in again.items()} == {
        name: row["episodes"] for name, row in results.items()
    }

    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "shard": True}))
    stdout, sharded = _again(
        out, [*LAUNCH, "tests/short.py", "train.py", "--resume", str(out)]
    )  # 1 rank -> 2, and sharded
    assert "the backbone sharded" in stdout
    _same(sharded[1], two[1])
    assert json.loads((out / "results.json").read_text()).keys() == results.keys()


@pytest.mark.libero
@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_and_ctrl_c_stops_all(models, tmp_path):  # noqa: F811
    out, log = tmp_path / "run", tmp_path / "log"
    command = [
        *LAUNCH,
        "--max-restarts",
        "1",
        *_command(models, out, "--total-steps", "6000", "--worker-timeout", "600")[1:],
    ]
    with open(log, "w") as file:
        run = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    def wait_for(what, seconds=800):
        deadline = time.time() + seconds
        while not what():
            assert time.time() < deadline and run.poll() is None, log.read_text()
            time.sleep(0.2)

    wait_for((out / "checkpoints" / "000002").exists)
    ranks = {p.environ()["RANK"]: p for p in psutil.Process(run.pid).children() if "train.py" in p.cmdline()}
    ranks["1"].kill()
    wait_for(lambda: "rank 0 of 2: rank 1 is gone without a word" in log.read_text(), 60)
    wait_for(lambda: "resumed at iteration" in log.read_text())
    resumed = int(log.read_text().split("resumed at iteration ")[1].split()[0])
    assert resumed >= 3
    wait_for((out / "checkpoints" / f"{resumed:06d}").exists)
    everybody = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    run.wait(60)
    assert f"Go on with: python train.py --resume {out}" in log.read_text()
    assert not psutil.wait_procs(everybody, timeout=20)[1]  # no orphan
    assert [m["iteration"] for m in _metrics(out)] == list(range(1, len(_metrics(out)) + 1))
