"""envs.py on the real simulator: the same trajectories whatever the workers do, and a run that survives them."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from envs import Curriculum, LiberoVecEnv
from simulator.shared import DONE, NEW
from support.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SUITE, TASKS, N = "libero_object", [0, 1], 3


# ---- curriculum ------------------------------------------------------------------------------------------------------


def _taught(mode, tau=0.3, window=100):
    """Task 5: 8 successes of 10, task 7: 1 of 10, task 9: never played."""
    curriculum = Curriculum([5, 7, 9], mode, tau=tau, window=window)
    for task, successes in [(5, 8), (7, 1)]:
        curriculum.update([(task, k < successes) for k in range(10)])
    return curriculum


def test_curriculum_formulas():
    s = np.array([9 / 12, 2 / 12, 1 / 2])  # with one success and one failure added
    np.testing.assert_allclose(_taught("eq4").success_rates(), s)
    eq4 = np.exp((0.5 - s) / 0.3)
    np.testing.assert_allclose(_taught("eq4").probabilities(), eq4 / eq4.sum(), rtol=1e-12)
    frontier = np.exp(-np.abs(0.5 - s) / 0.3)
    np.testing.assert_allclose(_taught("frontier").probabilities(), frontier / frontier.sum(), rtol=1e-12)
    np.testing.assert_allclose(_taught("uniform").probabilities(), 1 / 3)
    assert Curriculum([1, 2], "eq4").probabilities().tolist() == [0.5, 0.5]  # nothing known: no preference
    assert np.isfinite(_taught("eq4", tau=1e-6).probabilities()).all()


def test_curriculum_samples_at_its_probabilities():
    curriculum, rng = _taught("eq4"), np.random.default_rng(0)
    drawn = [curriculum.sample(rng) for _ in range(4000)]
    shares = [drawn.count(t) / 4000 for t in (5, 7, 9)]
    np.testing.assert_allclose(shares, curriculum.probabilities(), atol=0.03)


def test_curriculum_forgets_and_resumes():
    curriculum = Curriculum([0, 1], window=4)
    curriculum.update((0, success) for success in [False] * 6 + [True] * 3)
    np.testing.assert_allclose(curriculum.success_rates(), [4 / 6, 0.5])  # of the last four: F T T T
    copy = Curriculum([0, 1], window=4)
    copy.load_state_dict(curriculum.state_dict())
    for c in (curriculum, copy):
        c.update([(0, False), (1, True)])  # the first pushes out the oldest, so order must have survived
    assert copy.probabilities().tolist() == curriculum.probabilities().tolist()
    assert copy.num_updates == curriculum.num_updates
    with pytest.raises(UserError, match="saved state"):
        Curriculum([0, 1, 2]).load_state_dict(curriculum.state_dict())


@pytest.mark.parametrize(
    "arguments", [dict(task_ids=[]), dict(task_ids=[1, 1]), dict(mode="hard"), dict(tau=0.0), dict(window=0)]
)
def test_curriculum_bad_input(arguments):
    with pytest.raises(UserError):
        Curriculum(**{"task_ids": [0, 1], **arguments})


# ---- environments ----------------------------------------------------------------------------------------------------

libero = pytest.mark.libero


def _make(num_workers, **options):
    settings = dict(action_repeat=2, max_steps=6, num_workers=num_workers, seed=3, progress=False)
    return LiberoVecEnv(SUITE, N, TASKS, **{**settings, **options})


@pytest.fixture(scope="module")
def one():
    envs = _make(1)
    yield envs
    envs.close()


@pytest.fixture(scope="module")
def two():
    envs = _make(2)
    yield envs
    envs.close()


@pytest.fixture(autouse=True)
def _settings(request):
    """The environments are shared between tests (a build takes seconds); each test finds the same settings."""
    yield
    for name in {"one", "two"} & set(request.fixturenames):
        envs = request.getfixturevalue(name)
        envs.action_repeat, envs.max_steps = 2, 6


def _actions(step):
    return np.random.default_rng(step).uniform(-1, 1, (N, 7))


def _record(obs, info, *flags):
    keys = (
        "eef_pos",
        "gripper",
        "init_state",
        "success",
        "episode_length",
        "task_id",
        "started",
        "_final_obs",
    )
    record = {k: np.copy(info[k]) for k in keys if k in info}
    record |= {
        "frames": obs["agentview"].copy(),
        "next_task": obs["task_id"],
        "instruction": obs["instruction"],
    }
    if "_final_obs" in info:
        record["final"] = np.array([x["agentview"] for x in info["final_obs"][info["_final_obs"]]])
    return record | {str(i): np.copy(f) for i, f in enumerate(flags)}


def _rollout(envs, steps, first=0):
    records = []
    for k in range(first, first + steps):
        obs, *flags, info = envs.step(_actions(k))
        records.append(_record(obs, info, *flags))
    return records


def _assert_same(a, b, rows=slice(None)):
    assert len(a) == len(b)
    for k, (x, y) in enumerate(zip(a, b)):
        assert x.keys() == y.keys()
        for name in x:
            if name == "final" and rows != slice(None):
                continue
            np.testing.assert_array_equal(x[name][rows], y[name][rows], err_msg=f"step {k}, {name}")


@libero
def test_same_trajectories_with_one_and_two_workers(one, two):
    runs = []
    for envs in (one, two):
        obs, info = envs.reset(seed=11)
        runs.append([_record(obs, info)] + _rollout(envs, 7))  # two episode ends in each environment
    _assert_same(*runs)
    frames = runs[0][0]["frames"]
    assert not np.array_equal(frames[0], frames[1])  # environments do not share their randomness
    obs, info = one.reset()
    assert not np.array_equal(obs["agentview"], frames)  # goes on: other episodes
    obs, info = one.reset(seed=11)
    np.testing.assert_array_equal(obs["agentview"], frames)
    obs, info = one.reset(seed=12)
    assert not np.array_equal(obs["agentview"], frames)


@libero
def test_gymnasium_interface(one):
    obs, info = one.reset(seed=0)
    assert one.observation_space.contains({**obs, "instruction": tuple(obs["instruction"])})
    assert one.single_action_space.shape == (7,) and one.action_space.shape == (N, 7)
    assert one.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, reward, terminated, truncated, info = one.step(one.action_space.sample())
    assert reward.shape == terminated.shape == truncated.shape == (N,)
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, bool, bool)
    assert info["eef_pos"].shape == (N, 3) and (info["gripper"] > 0).all()
    assert set(one.timing) == {"physics", "render", "reset", "busiest", "wall", "wait"}
    assert obs["instruction"][0] == one._instructions[obs["task_id"][0]]


@libero
def test_info_is_what_gymnasium_wrappers_expect(one):
    """Two real wrappers, over episode ends: a list of dicts, of which those that ended have their last observation."""
    envs = DictInfoToList(RecordEpisodeStatistics(one))
    obs, infos = envs.reset(seed=3)
    assert [info["init_state"] for info in infos] == [-1] * N
    for k in range(3):
        actions = _actions(k)
        obs, reward, terminated, truncated, infos = envs.step(actions)
        assert isinstance(infos, list) and len(infos) == N
        for i, info in enumerate(infos):
            assert info["episode_length"] == 2 * (k + 1) and info["eef_pos"].shape == (3,)
            assert (
                ("final_obs" in info)
                == ("final_info" in info)
                == ("episode" in info)
                == truncated[i]
                == (k == 2)
            )
    for i, info in enumerate(infos):
        assert one.single_observation_space.contains(info["final_obs"])
        assert info["final_info"]["episode_length"] == 6 and not info["final_info"]["success"]
        assert info["final_info"]["task_id"] == info["final_obs"]["task_id"] == info["task_id"]
        assert info["episode"]["r"] == 0 and info["episode"]["l"] == 3


@libero
def test_truncation_and_final_observation(one):
    """An episode cut at the limit shows, as its last picture, what an uncut one shows at that step."""
    one.max_steps = 100
    one.reset(seed=2)
    uncut = _rollout(one, 3)
    one.max_steps = 5  # not a multiple of the action repeat
    one.reset(seed=2)
    cut = _rollout(one, 3)
    assert [r["_final_obs"].all() for r in cut] == [False, False, True]
    assert cut[2]["episode_length"].tolist() == [5] * N
    for k in range(2):
        np.testing.assert_array_equal(cut[k]["frames"], uncut[k]["frames"])
    assert not np.array_equal(cut[2]["frames"], cut[2]["final"])
    one.max_steps = 6
    one.reset(seed=2)
    last = _rollout(one, 3)[2]
    np.testing.assert_array_equal(last["final"], uncut[2]["frames"])
    np.testing.assert_array_equal(last["eef_pos"], uncut[2]["eef_pos"])  # of the state before the reset
    # truncated, not terminated, no reward
    assert last["2"].all() and not last["1"].any() and not last["0"].any()


def _soup_in_basket(state, i):
    """A copy of the saved environments in which environment i's task 0 (alphabet soup) is all but done."""
    from simulator.task import TaskSim

    task = TaskSim(SUITE, 0, "none")
    qpos = 1 + task.model.joint("alphabet_soup_1_joint0").qposadr[0]  # the state vector begins with the time
    episode = task.episode()
    episode.set_state(state[f"sim_{i}"])
    basket = episode.privileged()["objects"]["basket_1"][0]
    state = {name: array.copy() for name, array in state.items()}
    state[f"sim_{i}"][qpos : qpos + 3] = basket + [0.0, 0.0, 0.06]
    return state


@libero
def test_success_ends_the_decision_early(one):
    one.action_repeat, one.max_steps = 4, 280
    one.reset(seed=0, options={"task_ids": [0] * N, "init_states": [0, 1, 2]})
    state = _soup_in_basket(one.get_state(), i=1)
    one.set_state(state)
    obs, reward, terminated, truncated, info = one.step(np.zeros((N, 7)))
    assert (
        reward.tolist() == [0, 1, 0] and terminated.tolist() == [False, True, False] and not truncated.any()
    )
    assert info["success"].tolist() == [False, True, False]
    assert info["episode_length"][1] < 4 and info["episode_length"][0] == 4
    assert info["init_state"].tolist() == [0, 1, 2] and info["task_id"].tolist() == [0, 0, 0]
    # assigned: none of its business
    assert one.curriculum.num_updates == int(state["curriculum_num_updates"])


def _interrupt_a_step(envs):
    """Ctrl-C while the workers are at it."""

    def interrupt():
        while not envs._stepping:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # until it arrives in the middle of one
            envs.step(_actions(0))
    thread.join()


@libero
def test_an_episode_whose_simulation_diverges_is_lost(one):
    one.action_repeat, one.max_steps = 4, 20
    obs, _ = one.reset(seed=1)
    obs, *_ = one.step(_actions(0))
    state, last_seen = one.get_state(), obs["agentview"].copy()
    state["sim_1"][10] = 1e11  # a position: MuJoCo gives up beyond 1e10
    one.set_state(state)
    known = one.curriculum.num_updates
    obs, reward, terminated, truncated, info = one.step(_actions(1))
    lost = [False, True, False]
    assert (
        truncated.tolist()
        == info["unstable"].tolist()
        == info["lost"].tolist()
        == info["started"].tolist()
        == lost
    )
    assert not terminated.any() and not reward.any() and not info["worker_restarted"].any()
    np.testing.assert_array_equal(info["final_obs"][1]["agentview"], last_seen[1])
    assert one.curriculum.num_updates == known and one.num_restarts == 0
    assert info["episode_length"].tolist() == [8, 5, 8]  # noticed in the control step after
    _, _, _, truncated, info = one.step(_actions(2))  # and the next episode is an ordinary one
    assert not truncated.any() and info["episode_length"].tolist() == [12, 4, 12]


@libero
def test_saved_state_continues_equally(one, two, tmp_path):
    """Mid-episode, across episode ends, into other processes, through a file that needs no unpickling."""
    one.reset(seed=8)
    _rollout(one, 4)
    np.savez(tmp_path / "state.npz", **one.get_state())
    expected = _rollout(one, 5, first=4)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        state = dict(file)
    _rollout(two, 1)
    _interrupt_a_step(two)
    for call in (two.reset, two.get_state, lambda: two.step(_actions(0)), lambda: two.assign(0, 0)):
        with pytest.raises(RuntimeError, match="interrupted"):
            call()
    obs = two.set_state(state)
    np.testing.assert_array_equal(obs["agentview"], state["agentview"])
    _assert_same(expected, _rollout(two, 5, first=4))
    # until November 2026
    names = {"idle": "parked", "assigned_next": "asked_next"}
    two.set_state({names.get(key, key): x for key, x in state.items()})
    _assert_same(expected, _rollout(two, 5, first=4))
    with pytest.raises(UserError, match="settings"):
        two.action_repeat = 3
        two.set_state(state)


@libero
def test_a_saved_state_continues_equally_before_a_mirror():
    """The plate of libero_goal's stove mirrors what stands still, and a falling bowl does not: nor may it after a restore."""
    from simulator.task import TaskSim

    envs, others = (LiberoVecEnv("libero_goal", 1, [7], action_repeat=1, num_workers=1) for _ in range(2))
    try:
        envs.reset(seed=0)
        state, task = envs.get_state(), TaskSim("libero_goal", 7, "none")
        qpos = 1 + task.model.joint("akita_black_bowl_1_joint0").qposadr[0]
        episode = task.episode()
        episode.set_state(state["sim_0"])
        stove = episode.privileged()["objects"]["flat_stove_1"][0]
        state["sim_0"][qpos : qpos + 3] = stove + [-0.1, 0.0, 0.15]
        envs.set_state(state)
        envs.step(np.zeros((1, 7)))
        state = envs.get_state()
        expected = [envs.step(np.zeros((1, 7)))[0]["agentview"].copy() for _ in range(3)]
        others.set_state(state)
        for picture in expected:
            np.testing.assert_array_equal(others.step(np.zeros((1, 7)))[0]["agentview"], picture)
    finally:
        envs.close()
        others.close()


@libero
def test_curriculum_is_asked_and_told(one):
    one.curriculum, before = Curriculum(TASKS, "eq4", tau=0.01), one.curriculum
    one.curriculum.update([(0, True)] * 20)  # task 0 is easy, so Eq. 4 at this temperature only plays task 1
    try:
        obs, _ = one.reset(seed=1)
        assert obs["task_id"].tolist() == [1] * N
        _rollout(one, 3)
        assert one.curriculum.num_updates == 20  # its owner tells it outcomes, the environments do not
        one.curriculum.load_state_dict(Curriculum(TASKS).state_dict())
        one.curriculum.update([(1, True)] * 30)
        # fresh statistics, not those of an episode ago
        assert _rollout(one, 3)[-1]["next_task"].tolist() == [0] * N
    finally:
        one.curriculum = before


@libero
def test_assignments_and_idle_environments(one):
    one.action_repeat, one.max_steps = 2, 4
    obs, info = one.reset(options={"task_ids": [1, None, 0], "init_states": [7, None, 3]})
    assert one.active.tolist() == [True, False, True] and obs["task_id"][[0, 2]].tolist() == [1, 0]
    assert info["init_state"][[0, 2]].tolist() == [7, 3]
    one.assign(0, 0, 9)
    one.assign(2, None)
    one.step(_actions(0))
    *_, truncated, info = one.step(_actions(1))
    assert truncated.tolist() == [True, False, True] and info["started"].tolist() == [True, False, False]
    assert info["init_state"][[0, 2]].tolist() == [7, 3] and one.active.tolist() == [True, False, False]
    one.assign(1, 1, 0)  # an idle environment begins with the next step
    *_, truncated, info = one.step(_actions(2))
    assert info["started"].tolist() == [False, True, False] and one.active.tolist() == [True, True, False]
    *_, truncated, info = one.step(_actions(3))
    assert truncated.tolist() == [True, False, False] and info["init_state"][0] == 9
    # Initial state 9 of task 0 is the same picture in any environment and after any history.
    obs, _ = one.reset(options={"task_ids": [0] * N, "init_states": [9] * N})
    np.testing.assert_array_equal(obs["agentview"][0], obs["agentview"][2])


@libero
def test_protocol_states_and_close():
    envs = _make(1, init_states="protocol", tasks_per_worker=1, max_steps=2)
    try:
        _, info = envs.reset(options={"task_ids": [0, 1, 0]})
        assert (info["init_state"] == -1).all()  # assigned without one
        _, info = envs.reset()
        first = info["init_state"].tolist()
        assert all(0 <= i < 50 for i in first)
        _, _, _, truncated, info = envs.step(_actions(0))
        assert truncated.all() and info["init_state"].tolist() == first
    finally:
        (pid,) = envs.worker_pids
        envs.close()
    assert envs.closed and _gone([pid], 5)
    with pytest.raises(RuntimeError, match="closed"):
        envs.reset()


# ---- faults ----------------------------------------------------------------------------------------------------------


@libero
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_worker_is_replaced_and_the_others_keep_their_data(two, capfd, how):
    two.max_steps = 12
    two.reset(seed=4)
    undisturbed = _rollout(two, 8)
    two.reset(seed=4)
    _assert_same(undisturbed[:2], _rollout(two, 2))
    last_seen = two._arrays.agentview.copy()
    capfd.readouterr()
    os.kill(two.worker_pids[0], how)  # has environments 0 and 1
    obs, reward, terminated, truncated, info = two.step(_actions(2))
    assert (
        truncated.tolist()
        == [True, True, False]
        == info["worker_restarted"].tolist()
        == info["lost"].tolist()
    )
    assert not terminated.any() and not reward.any()
    assert info["started"].tolist() == [True, True, False]
    for i in range(2):
        np.testing.assert_array_equal(info["final_obs"][i]["agentview"], last_seen[i])
    _assert_same(undisturbed[2:3], [_record(obs, info, reward, terminated, truncated)], slice(2, 3))
    _assert_same(undisturbed[3:], _rollout(two, 5, first=3), slice(2, 3))
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "environment worker 0 (environments 0 to 1)" in lines[0], lines
    assert ("SIGKILL" if how == signal.SIGKILL else "stands still") in lines[0]


@libero
def test_kills_at_any_moment_lose_nothing(two):
    """Whatever a worker was doing, every step comes back, and each row is either an ordinary step or a marked cut."""
    two.reset(seed=6)
    rng, before = np.random.default_rng(0), two.num_restarts
    expected_length = np.zeros(N, int)
    for k in range(12):
        if k % 4 == 1:
            pid = two.worker_pids[k // 4 % 2]
            threading.Timer(rng.uniform(0, 0.12), os.kill, (pid, signal.SIGKILL)).start()
        _, reward, terminated, truncated, info = two.step(_actions(k))
        cut = info["worker_restarted"]
        assert (truncated[cut]).all() and not terminated[cut].any()
        length = info["episode_length"]
        assert ((length == expected_length + 2) | (cut & (length == expected_length))).all()
        expected_length = np.where(truncated | terminated, 0, length)
    assert two.num_restarts - before == 3


@libero
def test_a_crash_says_what_it_was(one, capfd):
    """Python's last words after it are a list of modules."""
    one.reset(seed=9)
    os.kill(one.worker_pids[0], signal.SIGSEGV)
    one.step(_actions(0))
    assert "was killed by SIGSEGV (Fatal Python error: Segmentation fault)" in capfd.readouterr().err


@libero
@pytest.mark.parametrize("ends", [True, False])
def test_what_a_dying_worker_had_reported_stands(one, ends):
    """One worker, three environments; killed between the first and the last of them, in a step that ends episodes or not."""
    one.max_steps = 6 if ends else 20
    one.reset(seed=9)
    undisturbed = _rollout(one, 3)[-1]
    one.reset(seed=9)
    _rollout(one, 2)
    pid, one._arrays.progress[0] = one.worker_pids[0], NEW

    def kill():
        while one._arrays.progress[0] != DONE:
            pass
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    obs, *flags, info = one.step(_actions(2))
    thread.join()
    record = _record(obs, info, *flags)
    if ends:
        assert info["worker_restarted"].tolist() == [False, True, True] and info["started"].all()
        _assert_same([undisturbed], [record], slice(0, 1))
    else:
        assert info["worker_restarted"].all() and flags[2].all()
        for name in ("eef_pos", "episode_length", "task_id", "init_state"):
            np.testing.assert_array_equal(record[name][0], undisturbed[name][0])
        np.testing.assert_array_equal(record["final"][0], undisturbed["frames"][0])


@libero
def test_gives_up_on_a_worker_that_never_recovers(capfd, monkeypatch):
    monkeypatch.setattr("simulator.pool.BUILD_TIMEOUT", 0.2)  # no start can make that
    with pytest.raises(UserError, match="giving up"):
        _make(1)
    assert capfd.readouterr().err.count("restarting") == 3


def _gone(pids, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [
            p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            return True
        time.sleep(0.1)
    return False


@libero
@pytest.mark.parametrize("moment", ["building", "stepping"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_main_process(how, moment):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy as np, envs\n"
        "from simulator.pool import WorkerProcess\n"
        "spawn = WorkerProcess.spawn\n"
        "def loud(self, config): spawn(self, config); print(self.process.pid, flush=True)\n"
        "WorkerProcess.spawn = loud\n"
        "e = envs.LiberoVecEnv('libero_object', 2, [0], num_workers=2, progress=False); e.reset()\n"
        "while True: e.step(np.zeros((2, 7))); print('step', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(process.stdout.readline()) for _ in range(2)]
    if moment == "stepping":
        assert process.stdout.readline().strip() == "step"
    else:
        time.sleep(2.0)  # Python has started, models are being compiled
    assert all(psutil.pid_exists(p) for p in pids)
    os.killpg(process.pid, how)
    process.communicate(timeout=20)
    assert _gone(pids, 15)


# ---- bad input -------------------------------------------------------------------------------------------------------


@libero
def test_bad_actions_are_named_and_nothing_moves(one):
    one.reset(seed=0)
    before = one.get_state()
    for value in (np.nan, np.inf):
        actions = np.zeros((N, 7))
        actions[1, 3] = value
        with pytest.raises(UserError, match="environment 1 is not finite"):
            one.step(actions)
    with pytest.raises(ValueError, match=r"shape \(3, 7\)"):
        one.step(np.zeros((2, 7)))
    after = one.get_state()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@libero
def test_bad_assignments(one):
    for task, init in [(5, 0), (0, 50), (0, -1)]:
        with pytest.raises(UserError):
            one.assign(0, task, init)
    with pytest.raises(ValueError, match="one entry per environment"):
        one.reset(options={"task_ids": [0]})
    with pytest.raises(ValueError, match="unknown option"):
        one.reset(options={"task": [0] * N})
    with pytest.raises(ValueError, match="give both"):
        one.reset(options={"init_states": [0] * N})
    _, info = one.reset(options={"task_ids": np.zeros(N, int), "init_states": np.arange(N)})  # arrays too
    assert info["init_state"].tolist() == list(range(N))


@libero
@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_envs=0),
        dict(suite="libero_objects"),
        dict(task_ids=[10]),
        dict(task_ids=[-1]),
        dict(task_ids=[]),
        dict(task_ids=[0, 0]),
        dict(action_repeat=0),
        dict(max_steps=0),
        dict(num_workers=0),
        dict(render="fast"),
        dict(init_states="stored"),
        dict(seed=-1),
        dict(task_ids=[0], curriculum=Curriculum([0, 1])),
    ],
)
def test_bad_settings_are_one_line(arguments):
    with pytest.raises(UserError) as error:
        LiberoVecEnv(**{"suite": SUITE, "num_envs": 1, "progress": False, **arguments})
    assert "\n" not in str(error.value)


@libero
def test_missing_egl_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent.json")  # libglvnd then finds no driver
    _told_at_once("apt-get install", capfd)


@libero
def test_what_a_worker_finds_missing_is_told_at_once(monkeypatch, capfd, tmp_path):
    """Another LIBERO's configuration, which this process read before it was there: no file that it names exists."""
    names = ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")
    (tmp_path / "config.yaml").write_text("".join(f"{name}: /nonexistent/{name}\n" for name in names))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    _told_at_once("/nonexistent/", capfd)


@libero
def test_what_a_worker_finds_when_it_is_imported_is_told_at_once(monkeypatch, capfd):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    _told_at_once("MUJOCO_GL=glfw does not work", capfd)


def _told_at_once(message, capfd):
    """One line, and no word of restarts: a replacement would find the same."""
    with pytest.raises(UserError, match=message) as error:
        LiberoVecEnv(SUITE, 1, [0], progress=False)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


@libero
def test_a_worker_needs_neither_torch_nor_the_vector_environment():
    code = (
        "import sys, simulator.workers; print(sorted({'torch', 'envs', 'eval', 'policy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"


@libero
def test_shared_memory_files_are_not_needed():
    """In a mount namespace of its own where nothing can be written to /dev/shm, as in some containers."""
    code = (
        "import numpy as np, envs\n"
        "e = envs.LiberoVecEnv('libero_object', 1, [0], progress=False)\n"
        "e.reset(); e.step(np.zeros((1, 7))); e.close(); print('fine')"
    )
    mount = "mount -t tmpfs -o ro tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", *mount.split()]).returncode:
        pytest.skip("a mount namespace needs root")
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "fine\n" and done.stderr == "", done
