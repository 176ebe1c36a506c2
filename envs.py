"""The environment: N robots at work at the same time, and the curriculum that gives them their tasks (paper section 3.5).

`train.py` needs no more than this of an environment, so another simulator can stand behind it (docs/forking.md has one):

    action_repeat                control steps per decision
    reset(seed=…)                -> obs, info: a new episode in each of the N environments
    observation()                -> obs: "agentview" (N, 256, 256, 3) uint8, "instruction": N strings
    step(actions)                -> obs, reward, terminated, truncated, info: one decision in each, actions (N, 7)
    timing                       seconds that the last step took, a dict
    get_state(), set_state(x)    flat dict of numpy arrays that goes on byte for byte, in the middle of episodes
    merge_states, split_state    (several ranks only) of the states of all ranks one, and back
    close()

An episode that ends is followed by the next one in the same step (Gymnasium's SAME_STEP): obs is then the first of the new
episode, and the last of the old one is info["final_obs"]. Of info, `train.py` reads besides: "task_id", "episode_length" in
control steps, and "lost", where an episode ended by no doing of the policy. The curriculum chooses the new task, and
`train.py` tells it the outcomes of a rollout. An evaluation (`eval.py`) chooses tasks and initial states itself: it needs
`suite`, `num_envs`, `max_steps`, `active`, `closed`, `assign`, the options of `reset`, of obs "task_id", and of info
"_final_obs", "started", "success", "worker_restarted" and "unstable" too.

Behind `LiberoVecEnv`, worker processes play the episodes (simulator/). Every random choice comes from (seed, environment,
number of its episode), never from a stream that environments share: trajectories are the same, byte for byte, whatever the
number of workers and ranks and whatever their timing.
"""

import functools
import time
from collections import deque

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simulator.pool import WorkerPool
from simulator.shared import FRAME, FRESH, NEW, NO_TASK, RANDOM_PLACEMENT, RANDOM_PROTOCOL_STATE
from simulator.states import current_names, merge_states, pack_settings, split_state
from simulator.suites import check_task_ids, instructions, num_init_states
from simulator.suites import max_steps as protocol_steps
from support.errors import UserError
from support.machine import cores
from support.quiet import progress_bar

# --------------------------------------------------------------------------------------------------------------------
# Which task next: the curriculum
# --------------------------------------------------------------------------------------------------------------------


class Curriculum:
    """Sampling of tasks by their running success rate (paper section 3.5).

    mode "eq4":      P(j) ∝ exp((0.5 - s_j) / tau)    Eq. 4 as printed: the harder, the more often (7B)
    mode "frontier": P(j) ∝ exp(-|0.5 - s_j| / tau)   what the text around Eq. 4 says: those near 50 % first (tiny)
    mode "uniform":  P(j) equal                       the ablation "no curriculum" of Table 2

    s_j is the success rate over the last `window` episodes of task j with one success and one failure added (Laplace),
    so that an unseen task counts as 0.5 (Eq. 4's middle, the favourite of "frontier"), and one lucky episode does not
    settle anything.
    tau: temperature of the sampling; large = uniform, small = only the favourite.
    """

    MODES = ("eq4", "frontier", "uniform")

    def __init__(self, task_ids, mode="eq4", tau=0.5, window=50):
        self.task_ids = [int(t) for t in task_ids]
        if not self.task_ids or len(set(self.task_ids)) != len(self.task_ids):
            raise UserError(
                f"curriculum: task ids must be a non-empty list without repeats, not {list(task_ids)}"
            )
        if mode not in self.MODES:
            raise UserError(f"curriculum: mode {mode!r} is unknown; choose one of {', '.join(self.MODES)}")
        if not (np.isfinite(tau) and tau > 0) or window < 1:
            raise UserError(f"curriculum: tau must be positive and window at least 1, not {tau} and {window}")
        self.mode, self.tau, self.window = mode, float(tau), int(window)
        self._row = {task: row for row, task in enumerate(self.task_ids)}
        self._outcomes = [deque(maxlen=self.window) for _ in self.task_ids]
        self.num_updates = 0  # episodes counted

    def success_rates(self):
        """(num_tasks,) float64 in (0, 1): s_j with the prior."""
        return np.array([(sum(o) + 1) / (len(o) + 2) for o in self._outcomes])

    def probabilities(self):
        """(num_tasks,) float64, sums to 1, in the order of `task_ids`."""
        rates = self.success_rates()
        if self.mode == "eq4":
            logits = (0.5 - rates) / self.tau  # Eq. 4
        elif self.mode == "frontier":
            logits = -np.abs(0.5 - rates) / self.tau
        else:
            logits = np.zeros_like(rates)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def sample(self, rng):
        """One task id, drawn with `rng` (np.random.Generator)."""
        return self.task_ids[int(rng.choice(len(self.task_ids), p=self.probabilities()))]

    def update(self, outcomes):
        """Count finished episodes, (task id, success) each, in this order.

        Training does so once after each rollout: probabilities then depend neither on which environment ended an episode
        first nor on how the environments are spread over processes.
        """
        for task_id, success in outcomes:
            self._outcomes[self._row[task_id]].append(success)
            self.num_updates += 1

    def state_dict(self):
        """Arrays only: "outcomes" (num_tasks, window) int8, oldest first, -1 = none yet; "num_updates" () int64."""
        outcomes = np.full((len(self.task_ids), self.window), -1, np.int8)
        for row, seen in enumerate(self._outcomes):
            outcomes[row, : len(seen)] = seen
        return {"outcomes": outcomes, "num_updates": np.int64(self.num_updates)}

    def load_state_dict(self, state):
        """Inverse of `state_dict`. Raises UserError for another number of tasks."""
        outcomes = np.asarray(state["outcomes"])
        if outcomes.ndim != 2 or len(outcomes) != len(self.task_ids):
            raise UserError(
                f"curriculum: the saved state has {len(outcomes)} tasks, this run {len(self.task_ids)}"
            )
        for seen, row in zip(self._outcomes, outcomes, strict=True):
            seen.clear()
            seen.extend(bool(x) for x in row[row >= 0])
        self.num_updates = int(state["num_updates"])


# --------------------------------------------------------------------------------------------------------------------
# The vector environment
# --------------------------------------------------------------------------------------------------------------------


class LiberoVecEnv(VectorEnv):
    """LIBERO tasks as one Gymnasium vector environment.

    suite, task_ids: what to play (default: all tasks of the suite). num_envs: N.
    action_repeat: control steps (20 Hz) per decision; an episode may end within a decision.
    max_steps: control steps per episode (default: LIBERO's limit for the suite).
    render: "light" (simplified visual meshes) or "exact".
    num_workers: processes (default: one per core, at most N).
    seed: of every random choice in here.
    init_states: "random" (objects placed anew, for training) or "protocol" (a random one of the evaluation's states).
    curriculum: a `Curriculum` over task_ids, or None for uniform sampling. It is asked here, and told outcomes by its owner.
    tasks_per_worker: compiled tasks that a worker keeps (default: all, at most 10), 0.07 GB each beside 0.6 GB for a
        worker with its first; an environment costs 3 MB (docs/simulator.md). Beyond that number, the least recently used
        task that no environment plays is dropped, and a later visit costs a rebuild (seconds).
    timeout: seconds that a worker may take for one command before it is replaced (simulator/pool.py; one that stands still
        is noticed sooner). egl_devices: EGL device numbers, given to the workers in turn (default: EGL chooses).
    first_env: number of the first environment among those of all ranks. Random choices come from this number, so an
        episode is the same whichever rank plays it.

    Observation: {"agentview": (N, 256, 256, 3) uint8, upright as OpenVLA expects it, "task_id": (N,) int64,
    "instruction": list of N strings}. The pictures, also those of "final_obs", are *views* of shared memory: the next step
    overwrites them.
    Action: (N, 7) float, end-effector deltas in [-1, 1] and gripper from 0 = close to 1 = open.

    Raises UserError for settings that cannot work, including what only a worker can find out, such as missing EGL.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, suite, num_envs, task_ids=None, *, action_repeat=1, max_steps=None, render="light", num_workers=None,
                 seed=0, init_states="random", curriculum=None, tasks_per_worker=None, progress=True, timeout=60.0,
                 egl_devices=None, first_env=0):  # fmt: skip
        self.suite, self.num_envs, self.render_quality = suite, num_envs, render
        self.task_ids = [int(t) for t in check_task_ids(suite, task_ids)]
        self.curriculum = Curriculum(self.task_ids, "uniform") if curriculum is None else curriculum
        self.action_repeat = action_repeat
        self.max_steps = protocol_steps(suite) if max_steps is None else max_steps  # may change between steps
        self.seed, self.first_env = _checked_seed(seed), first_env
        self.timing = {}
        num_workers = cores() if num_workers is None else num_workers
        tasks_per_worker = min(len(self.task_ids), 10) if tasks_per_worker is None else tasks_per_worker
        for what, value in (
            ("number of environments", num_envs),
            ("action repeat", action_repeat),
            ("step limit", self.max_steps),
            ("number of workers", num_workers),
            ("number of tasks per worker", tasks_per_worker),
        ):
            if value < 1:
                raise UserError(f"the {what} must be at least 1, not {value}")
        if render not in ("light", "exact"):
            raise UserError(f"render mode {render!r} is unknown; choose light or exact")
        if init_states not in ("random", "protocol"):
            raise UserError(f"init states {init_states!r} are unknown; choose random or protocol")
        if not set(self.curriculum.task_ids) <= set(self.task_ids):
            raise UserError(
                f"the curriculum has tasks {curriculum.task_ids}, the environments only {self.task_ids}"
            )
        self._init_code = RANDOM_PLACEMENT if init_states == "random" else RANDOM_PROTOCOL_STATE
        self._num_init_states = functools.cache(functools.partial(num_init_states, suite))
        for task in self.task_ids if init_states == "protocol" else ():
            if not self._num_init_states(task):
                raise UserError(
                    f"{suite} task {task} has no initial states; choose random ones, or other tasks"
                )
        self._instructions = instructions(suite)
        self._make_spaces()

        # Of each environment: the number of its running episode, counted since seeding; whether the next one was assigned,
        # not chosen by the curriculum; curriculum.num_updates when the next one's task was drawn.
        self._episode, self._drawn_at = np.full(num_envs, -1), np.full(num_envs, -1)
        self._assigned_next = np.zeros(num_envs, bool)
        self._stepping = False  # also after an interrupted step
        settings = dict(suite=suite, render=render, first_env=first_env, tasks_per_worker=tasks_per_worker)
        self._pool = WorkerPool(num_envs, num_workers, timeout, egl_devices, **settings)
        self._arrays = self._pool.arrays
        self._arrays.idle[:], self._arrays.assignment[:, 0] = True, NO_TASK
        first_tasks = self.task_ids[:tasks_per_worker]
        total = len(first_tasks) * min(num_envs, num_workers)
        with progress_bar(total=total, desc=f"building {suite}", unit="task", disable=not progress) as bar:
            self._pool.start(first_tasks, bar.update)

    def _make_spaces(self):
        printable = "".join(chr(c) for c in range(32, 127))
        self.single_observation_space = gym.spaces.Dict(
            agentview=gym.spaces.Box(0, 255, FRAME, np.uint8),
            task_id=gym.spaces.Discrete(len(self._instructions)),
            instruction=gym.spaces.Text(max_length=300, charset=printable),
        )
        low, high = np.array([-1.0] * 6 + [0.0], np.float32), np.ones(7, np.float32)
        self.single_action_space = gym.spaces.Box(low, high)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def worker_pids(self):
        return self._pool.pids

    @property
    def num_restarts(self):
        """Workers replaced so far."""
        return self._pool.num_restarts

    @property
    def closed(self):  # by `close`, or by an error that no replacement of a worker can mend
        return self._pool.closed

    def close(self, **kwargs):
        self._pool.close()

    def _check_ready(self, what):
        if self.closed:
            raise RuntimeError(f"{what}: these environments are closed")
        if self._stepping:
            raise RuntimeError(f"{what}: a step was interrupted; call set_state first")

    # ---- what each environment plays next ----------------------------------------------------------------------------

    @property
    def active(self):
        """(N,) bool: environments with a running episode. The others are idle: a step does nothing in them."""
        return ~self._arrays.idle

    def assign(self, i, task_id, init_state=None):
        """Choose the next episode of environment i, once; after that the curriculum chooses again.

        init_state: number of a protocol state; FRESH + k for random placement k of the task, the same in every environment;
        None for any random placement. task_id None: the environment becomes idle when its episode ends, until `assign` or
        `reset`. An idle environment begins an assignment with the next step.
        """
        self._check_ready("assign")
        if task_id is not None and task_id not in self.task_ids:
            raise UserError(f"task {task_id} is not among the tasks of these environments: {self.task_ids}")
        n = self._num_init_states(task_id) if task_id is not None else 0
        if init_state is not None and not (0 <= init_state < n or init_state >= FRESH):
            raise UserError(
                f"{self.suite} task {task_id} has {n} initial states, from 0 on; {init_state} is none of them"
            )
        task = NO_TASK if task_id is None else int(task_id)
        init = RANDOM_PLACEMENT if init_state is None else int(init_state)
        self._arrays.assignment[i] = task, init, self.seed, self._episode[i] + 1
        self._assigned_next[i] = True

    def _draw_next(self, i):
        """Let the curriculum choose what environment i plays after the running episode."""
        number = int(self._episode[i]) + 1
        # The 1 makes it another generator than the one that places the objects.
        rng = np.random.default_rng([self.seed, self.first_env + i, number, 1])
        self._arrays.assignment[i] = self.curriculum.sample(rng), self._init_code, self.seed, number
        self._assigned_next[i], self._drawn_at[i] = False, self.curriculum.num_updates

    def _began(self, i):
        """Environment i took up its assignment."""
        self._episode[i] += 1
        self._draw_next(i)

    # ---- Gymnasium ---------------------------------------------------------------------------------------------------

    def reset(self, *, seed=None, options=None):
        """Begin a new episode in every environment. Returns (obs, info).

        seed: restarts all random choices; None goes on with them (episodes differ from those before).
        options: "task_ids" (N entries, None = stay idle) and "init_states" (N entries, None = random placement) assign the
        episodes. info: "eef_pos", "gripper" and "init_state" as in `step`.
        """
        options, n, a = options or {}, self.num_envs, self._arrays
        if unknown := set(options) - {"task_ids", "init_states"}:
            raise ValueError(f"reset: unknown option {sorted(unknown)[0]!r}")
        task_ids, init_states = options.get("task_ids"), options.get("init_states")
        if task_ids is None and init_states is not None:
            raise ValueError("reset: init_states are those of task_ids: give both")
        init_states = [None] * n if init_states is None else init_states
        if len(init_states) != n or task_ids is not None and len(task_ids) != n:
            raise ValueError(f"reset: options must have one entry per environment ({n})")
        self._check_ready("reset")
        if seed is not None:
            self.seed = _checked_seed(seed)
            self._episode[:] = -1
        for i in range(n):
            if task_ids is not None:
                self.assign(i, task_ids[i], init_states[i])
            elif not self._assigned_next[i] or a.assignment[i, 0] == NO_TASK:
                self._draw_next(i)
        a.assignment[:, 2], a.assignment[:, 3] = self.seed, self._episode + 1
        a.idle[:], a.steps[:] = True, 0
        starting = np.flatnonzero(a.assignment[:, 0] != NO_TASK).tolist()
        self._pool.call("reset", envs=starting)
        for i in starting:
            self._began(i)
        info = {name: getattr(a, name).copy() for name in ("eef_pos", "gripper", "init_state")}
        return self.observation(), info

    def observation(self):
        """The current observation, without a step: see the class."""
        task_id = self._arrays.task_id.copy()
        instruction = [self._instructions[t] for t in task_id]
        return {"agentview": self._arrays.agentview, "task_id": task_id, "instruction": instruction}

    def step(self, actions):
        """One decision in every environment: its action for `action_repeat` control steps, one picture at the end.

        actions: (N, 7). Returns obs, reward (N,) float32 (1.0 on success), terminated (N,) bool, truncated (N,) bool, and
        info, in which every row is about the state that this action led to and about its episode, before any reset:
          "success" (N,) bool; "episode_length" (N,) int, control steps; "task_id" (N,) int; "init_state" (N,) int, -1 =
          random placement, FRESH + k = random placement k; "eef_pos" (N, 3) metres; "gripper" (N,) metres between the fingers
          "lost" (N,) bool: truncated by no doing of the policy, because its worker died ("worker_restarted" (N,) bool) or
          the simulation diverged ("unstable" (N,) bool)
          "started" (N,) bool: obs is the first of an episode
        Where the environment was idle, or its worker died, no action was carried out: "eef_pos" and "gripper" are old then,
        as they mean nothing where the simulation diverged.
        Where an episode ended, obs is already the next one's first, and "final_obs" (N,) has its last observation, a dict,
        and "final_info" its info (with the masks "_final_obs" and "_final_info", as in Gymnasium).
        Raises ValueError for actions of another shape, UserError for NaN or infinity; nothing has moved then.
        """
        began, a, n = time.perf_counter(), self._arrays, self.num_envs
        self._check_ready("step")
        actions = np.asarray(actions, np.float64)
        if actions.shape != (n, 7):
            raise ValueError(f"actions must have shape ({n}, 7), not {actions.shape}")
        if len(bad := np.flatnonzero(~np.isfinite(actions).all(axis=1))):
            raise UserError(f"action of environment {bad[0]} is not finite: {actions[bad[0]].tolist()}")
        for i in range(n):
            # The curriculum may have learnt something since the coming task was drawn; the same generator draws again.
            if (
                not self._assigned_next[i]
                and not a.idle[i]
                and self._drawn_at[i] != self.curriculum.num_updates
            ):
                self._draw_next(i)

        a.actions[:], a.progress[:], a.reward[:], a.seconds[:] = actions, NEW, 0.0, 0.0
        for flags in (a.terminated, a.truncated, a.worker_restarted, a.unstable, a.started):
            flags[:] = False
        self._stepping = True
        wait = time.perf_counter()
        self._pool.call("step", self.action_repeat, self.max_steps)
        wait = time.perf_counter() - wait
        self._stepping = False

        ended, lost = a.terminated | a.truncated, a.worker_restarted | a.unstable
        final_obs = self._final_observations(ended)
        for i in np.flatnonzero(a.started):
            self._began(i)
        info = {
            "success": a.terminated,
            "episode_length": a.stepped_length,
            "task_id": a.stepped_task,
            "init_state": a.stepped_init,
            "eef_pos": a.eef_pos,
            "gripper": a.gripper,
            "lost": lost,
            "worker_restarted": a.worker_restarted,
            "unstable": a.unstable,
            "started": a.started,
        }
        info = {name: x.copy() for name, x in info.items()}
        info |= {"final_info": dict(info), "_final_info": ended, "final_obs": final_obs, "_final_obs": ended}
        sums = a.seconds.sum(axis=0).tolist()  # over the environments
        self.timing = dict(zip(("physics", "render", "reset"), sums))
        self.timing["busiest"] = self._pool.busy_seconds  # of the worker that took longest
        self.timing["wait"] = wait  # of this process for the workers
        self.timing["wall"] = time.perf_counter() - began
        return self.observation(), a.reward.copy(), a.terminated.copy(), a.truncated.copy(), info

    def _final_observations(self, ended):
        """(N,) array of dicts, None where no episode ended."""
        a, final = self._arrays, np.full(self.num_envs, None, object)
        for i in np.flatnonzero(ended):
            sentence = self._instructions[a.stepped_task[i]]
            final[i] = dict(agentview=a.final_agentview[i], task_id=a.stepped_task[i], instruction=sentence)
        return final

    # ---- exact resume ------------------------------------------------------------------------------------------------

    # Those of several ranks.
    merge_states, split_state = staticmethod(merge_states), staticmethod(split_state)

    _SAVED = ("agentview", "assignment", "task_id", "init_state", "steps", "idle", "eef_pos", "gripper")

    def _settings(self):
        names = ("suite", "task_ids", "num_envs", "render_quality", "action_repeat")
        return pack_settings({name: getattr(self, name) for name in names})

    def get_state(self):
        """Everything that the future depends on, mid-episode included: a flat dict of numpy arrays (no object arrays).

        Holds per environment the full simulator state, the current picture, the counters and the coming assignment; and
        the curriculum's statistics. `set_state` on environments of the same settings continues byte for byte.
        """
        self._check_ready("get_state")
        simulators = {i: x for share in self._pool.call("get_state") for i, x in share.items()}
        return {
            **{name: getattr(self._arrays, name).copy() for name in self._SAVED},
            **{f"sim_{i}": x for i, x in simulators.items()},
            **{f"curriculum_{name}": np.asarray(x) for name, x in self.curriculum.state_dict().items()},
            "episode": self._episode.copy(),
            "seed": np.int64(self.seed),
            "settings": self._settings(),
            "assigned_next": self._assigned_next.copy(),
        }

    def set_state(self, state):
        """Continue from `get_state()`. Returns the observation. Raises UserError for a state of other settings.

        A step that was interrupted (Ctrl-C) is abandoned. So an interrupted evaluation can still hand back what it borrowed.
        """
        self._pool.finish()
        self._stepping = False
        self._check_ready("set_state")
        state = current_names(state)
        theirs, ours = bytes(np.asarray(state["settings"])), bytes(self._settings())
        if theirs != ours:
            theirs, ours = theirs.decode(errors="replace"), ours.decode()
            raise UserError(f"the saved environments had other settings than these: {theirs} and {ours}")
        for name in self._SAVED:
            getattr(self._arrays, name)[:] = np.asarray(state[name])
        self._episode[:], self.seed = np.asarray(state["episode"]), int(state["seed"])
        self._assigned_next[:] = state["assigned_next"]
        known = {k.removeprefix("curriculum_"): x for k, x in state.items() if k.startswith("curriculum_")}
        self.curriculum.load_state_dict(known)
        self._drawn_at[:] = -1  # drawn again before the next step, with the same statistics: the same tasks
        simulators = {int(k[4:]): np.asarray(x) for k, x in state.items() if k.startswith("sim_")}
        self._pool.call("set_state", split=[simulators])
        return self.observation()


def _checked_seed(seed):
    if seed < 0:
        raise UserError(f"the seed must not be negative, but is {seed}")
    return int(seed)
