"""LIBERO behind a Gymnasium vector environment: many episodes, a few worker processes, no copying of images.

    main process                                    worker w (one per core)
    ------------                                    -----------------------
    LiberoVecEnv.step(actions)                      a pool of compiled tasks (TaskSim), built once, shared by its slots
      writes actions and next assignments  -------> for each of its slots: a few control steps, one picture
      waits for one tiny message           <------- writes picture, reward, flags where the main process can see them

A *slot* is one running episode, row i of every array. All arrays live in one anonymous block of shared memory; the
pipes carry only words such as "step these slots". Four decisions shape the rest of the file:

1. A worker never asks what comes next. Before every step the main process has already written which task and placement
   each slot plays when its episode ends (`assignment`), so the worker resets at once, in the same step.
2. Every random choice comes from (seed, slot, number of the episode in that slot), never from a stream that slots
   share. Trajectories are then the same, byte for byte, whatever the number of workers and whatever their timing.
3. Any worker may die at any moment (a segfault in a driver, `kill -9`, a deadlock in EGL). Its pictures and counters
   live in the shared block and outlast it. A replacement starts with empty slots, and an empty slot that is told to
   step reports its episode as truncated and starts the next one: no special case, the command is just sent again.
4. Workers must not outlive the main process. They leave when their pipe closes or their parent changes, ignore Ctrl-C
   (the main process decides), and the shared block has no name that could be left behind in /dev/shm.

The curriculum over tasks (paper section 3.5, Eq. 4) comes first: it is the part of this file that the paper is about.
"""

import json
import os
import sys
import time
import weakref
from collections import deque
from multiprocessing import connection

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tqdm import tqdm

from simulator.suites import check_task_ids, instructions
from simulator.suites import max_steps as protocol_steps
from simulator.workers import (
    BUILD_TIMEOUT,
    FRAME,
    MAX_FAILURES,
    NEW,
    NO_TASK,
    RANDOM_PLACEMENT,
    RANDOM_PROTOCOL_STATE,
    Handle,
    cores,
    map_slots,
    release,
)
from support.errors import UserError
from support.quiet import progress_bar

NUM_INIT_STATES = 50  # of every LIBERO task


# --------------------------------------------------------------------------------------------------------------------
# Which task next: the curriculum
# --------------------------------------------------------------------------------------------------------------------


class Curriculum:
    """Sampling of tasks by their running success rate (paper section 3.5).

    mode "eq4":      P(j) ∝ exp((0.5 - s_j) / tau)    Eq. 4 as printed: the harder, the more often (default)
    mode "frontier": P(j) ∝ exp(-|0.5 - s_j| / tau)   what the text around Eq. 4 says: most often where s_j is near 50 %
    mode "uniform":  P(j) equal                       the ablation "no curriculum" of Table 2

    s_j is the success rate over the last `window` episodes of task j with one success and one failure added (Laplace),
    so that an unseen task counts as 0.5, neutral in both formulas, and one lucky episode does not settle anything.
    tau: temperature of the sampling; large = uniform, small = only the favourite.
    deferred: outcomes wait until `commit`. Training commits after each rollout: the probabilities then depend neither on
        which environment ended an episode first nor on how the environments are spread over processes.
    """

    MODES = ("eq4", "frontier", "uniform")

    def __init__(self, task_ids, mode="eq4", tau=0.5, window=50, deferred=False):
        self.task_ids = [int(t) for t in task_ids]
        if not self.task_ids or len(set(self.task_ids)) != len(self.task_ids):
            raise UserError(f"curriculum: task ids must be a non-empty list without repeats, not {list(task_ids)}")
        if mode not in self.MODES:
            raise UserError(f"curriculum: mode {mode!r} is unknown; choose one of {', '.join(self.MODES)}")
        if not (np.isfinite(tau) and tau > 0) or window < 1:
            raise UserError(f"curriculum: tau must be positive and window at least 1, not {tau} and {window}")
        self.mode, self.tau, self.window = mode, float(tau), int(window)
        self._row = {task: row for row, task in enumerate(self.task_ids)}
        self._outcomes = [deque(maxlen=self.window) for _ in self.task_ids]
        self.num_updates = 0
        self.deferred, self.pending = deferred, []  # pending: (task id, success) in the order in which episodes ended

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

    def update(self, task_id, success):
        """Count one finished episode (deferred: at the next `commit`)."""
        self.pending.append((int(task_id), bool(success)))
        if not self.deferred:
            self.commit()

    def commit(self, outcomes=None):
        """Let pending episodes count: this process's own, or `outcomes`, those of all processes in one order."""
        for task_id, success in self.pending if outcomes is None else outcomes:
            self._outcomes[self._row[task_id]].append(success)
            self.num_updates += 1
        self.pending = []

    def state_dict(self):
        """Arrays only: "outcomes" (num_tasks, window) int8, oldest first, -1 = none yet; "num_updates" () int64."""
        outcomes = np.full((len(self.task_ids), self.window), -1, np.int8)
        for row, seen in enumerate(self._outcomes):
            outcomes[row, : len(seen)] = seen
        return {"outcomes": outcomes, "num_updates": np.int64(self.num_updates)}

    def load_state_dict(self, state):
        outcomes = np.asarray(state["outcomes"])
        if outcomes.ndim != 2 or len(outcomes) != len(self.task_ids):
            raise UserError(f"curriculum: the saved state has {len(outcomes)} tasks, this run {len(self.task_ids)}")
        for seen, row in zip(self._outcomes, outcomes, strict=True):
            seen.clear()
            seen.extend(bool(x) for x in row[row >= 0])
        self.num_updates = int(state["num_updates"])


class LiberoVecEnv(VectorEnv):
    """LIBERO tasks as one Gymnasium vector environment.

    suite, task_ids: what to play (default: all tasks of the suite). num_envs: number of slots N.
    action_repeat: control steps (20 Hz) per decision; an episode may end within a decision.
    max_steps: control steps per episode (default: LIBERO's limit for the suite).
    render: "light" (simplified visual meshes) or "exact".
    num_workers: processes (default: one per core, at most N).
    seed: of every random choice in here.
    init_states: "random" (objects placed anew, for training) or "protocol" (one of the 50 evaluation states at random).
    curriculum: a `Curriculum` over task_ids, or None for uniform sampling. Episodes that were asked for by `assign` or
        by the options of `reset` do not count in its statistics.
    autoreset: True = SAME_STEP; False = a slot whose episode ended is parked until `reset`.
    tasks_per_worker: compiled tasks that a worker keeps (default: all, at most 10), 0.1 GB each and 0.4 GB more for
        the first; a slot costs 5 MB. Beyond that number, the least recently used task that no slot plays is dropped, and a
        later visit costs a rebuild (seconds).
    timeout: seconds that a worker may take for one command before it is replaced. One that stands still (stopped, or a
        deadlock: no processor time) is noticed after about HANG_CHECKS seconds.
    egl_devices: EGL device numbers, given to the workers in turn (default: leave the choice to EGL).
    first_slot: number of the first slot among those of all ranks. Random choices come from this number, so an episode is
        the same whichever rank plays it.

    Observation: {"agentview": (N, 256, 256, 3) uint8, upright as OpenVLA expects it, "task_id": (N,) int64,
    "instruction": list of N strings}. The pictures are *views* of the shared block: the next step overwrites them.
    Action: (N, 7) float, end-effector deltas in [-1, 1] and gripper from 0 = close to 1 = open.

    Raises UserError for settings that cannot work, including what only a worker can find out, such as missing EGL.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, suite, num_envs, task_ids=None, *, action_repeat=1, max_steps=None, render="light",
                 num_workers=None, seed=0, init_states="random", curriculum=None, autoreset=True, tasks_per_worker=None,
                 progress=True, timeout=60.0, egl_devices=None, first_slot=0):
        task_ids = [int(t) for t in check_task_ids(suite, task_ids)]
        if len(set(task_ids)) != len(task_ids):
            raise UserError(f"task ids must not repeat: {task_ids}")
        num_workers = cores() if num_workers is None else num_workers
        tasks_per_worker = min(len(task_ids), 10) if tasks_per_worker is None else tasks_per_worker
        max_steps = protocol_steps(suite) if max_steps is None else max_steps
        for what, value in [("number of environments", num_envs), ("action repeat", action_repeat),
                            ("step limit", max_steps), ("number of workers", num_workers),
                            ("number of tasks per worker", tasks_per_worker)]:
            if value < 1:
                raise UserError(f"the {what} must be at least 1, not {value}")
        if render not in ("light", "exact"):
            raise UserError(f"render mode {render!r} is unknown; choose light or exact")
        if init_states not in ("random", "protocol"):
            raise UserError(f"init states {init_states!r} are unknown; choose random or protocol")
        if seed < 0:
            raise UserError(f"the seed must not be negative, but is {seed}")
        if curriculum is not None and not set(curriculum.task_ids) <= set(task_ids):
            raise UserError(f"the curriculum has tasks {curriculum.task_ids}, the environments only {task_ids}")

        self.suite, self.num_envs, self.task_ids, self.render_quality = suite, num_envs, task_ids, render
        self.action_repeat, self.max_steps, self.timeout = action_repeat, max_steps, timeout  # may change between steps
        self.seed, self.autoreset, self.first_slot = seed, autoreset, first_slot
        self.curriculum = Curriculum(task_ids, "uniform") if curriculum is None else curriculum
        self._init_code = RANDOM_PLACEMENT if init_states == "random" else RANDOM_PROTOCOL_STATE
        self._instructions = instructions(suite)
        self._make_spaces()

        self._s, shared_fd = map_slots(None, num_envs)
        self._s.parked[:] = True
        self._s.assignment[:, 0] = NO_TASK
        self._episode = np.full(num_envs, -1)  # number of the running episode of each slot, counted since seeding
        self._asked_now = np.zeros(num_envs, bool)  # the running episode was asked for, not chosen by the curriculum
        self._asked_next = np.zeros(num_envs, bool)  # the coming one is
        self._drawn_at = np.full(num_envs, -1)  # curriculum.num_updates when the coming task was drawn
        self._stepping = np.zeros(num_envs, bool)
        self._began_at = np.zeros(num_envs)  # of each slot's last step, on the clock of time.perf_counter
        self._egl_devices = egl_devices
        self.num_restarts = 0  # workers replaced so far
        self._config = {"parent": os.getpid(), "suite": suite, "num_envs": num_envs, "render": render,
                        "first_slot": first_slot,
                        "autoreset": autoreset, "tasks_per_worker": tasks_per_worker, "shared_fd": shared_fd}
        shares = np.array_split(np.arange(num_envs), min(num_envs, num_workers))
        self._workers = [Handle(w, share.tolist()) for w, share in enumerate(shares)]
        self._finalizer = weakref.finalize(self, release, self._workers, shared_fd)  # at exit too, hung workers or not
        self._build(task_ids[:tasks_per_worker], progress)

    def _make_spaces(self):
        mode = AutoresetMode.SAME_STEP if self.autoreset else AutoresetMode.DISABLED
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        printable = "".join(chr(c) for c in range(32, 127))
        self.single_observation_space = gym.spaces.Dict({
            "agentview": gym.spaces.Box(0, 255, FRAME, np.uint8),
            "task_id": gym.spaces.Discrete(len(self._instructions)),
            "instruction": gym.spaces.Text(max_length=300, charset=printable),
        })
        low, high = np.array([-1.0] * 6 + [0.0], np.float32), np.ones(7, np.float32)
        self.single_action_space = gym.spaces.Box(low, high)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    # ---- workers -----------------------------------------------------------------------------------------------------

    @property
    def worker_pids(self):
        return [handle.process.pid for handle in self._workers if handle.process]

    def _spawn(self, handle):
        handle.spawn(self._config, self._egl_devices and self._egl_devices[handle.index % len(self._egl_devices)])

    def _build(self, tasks, progress):
        """Start all workers; each compiles the tasks that fit into its pool."""
        total = len(tasks) * len(self._workers)
        bar = progress_bar(total=total, desc=f"building {self.suite}", unit="task", disable=not progress)
        try:
            for handle in self._workers:
                self._spawn(handle)
                handle.send(("build", tasks), BUILD_TIMEOUT)
            self._await(range(self.num_envs), on_built=bar.update)
        except BaseException:
            self.close()
            raise
        finally:
            bar.close()

    def _command(self, slots, name, *arguments):
        """Send a command to the workers that own `slots`, each with its own share of them."""
        wanted = set(slots)
        for handle in self._workers:
            if share := [i for i in handle.slots if i in wanted]:
                handle.send((name, share, *arguments), self.timeout)

    def _await(self, slots, on_built=None):
        """Receive until no worker owes an answer that concerns `slots`. Returns the answers."""
        wanted, answers = set(slots), []
        while owing := [h for h in self._workers if h.outstanding and wanted.intersection(h.slots)]:
            patience = min(h.deadline for h in owing) - time.monotonic()
            ready = connection.wait([h.conn for h in owing], min(max(0.0, patience), 1.0))
            for handle in owing:
                if handle.conn in ready:
                    self._receive(handle, answers, on_built)
                elif time.monotonic() > handle.deadline:
                    self._replace(handle, "gave no answer in time")
                elif handle.is_hung():
                    self._replace(handle, "stands still")
        return answers

    def _receive(self, handle, answers, on_built):
        try:
            kind, *content = handle.conn.recv()
        except (EOFError, OSError):
            self._replace(handle, handle.how_it_ended())
            return
        patience = BUILD_TIMEOUT if kind == "building" or handle.failures else self.timeout  # a replacement warms up
        handle.deadline, handle.building = time.monotonic() + patience, kind == "building"
        if kind == "built" and on_built:
            on_built(1)
        elif kind == "done":
            handle.outstanding.popleft()
            handle.failures, handle.busy_seconds = 0, content[1]
            answers.append(content[0])
        elif kind == "user_error":
            self.close()
            raise UserError(content[0])
        elif kind == "error":
            self._replace(handle, f"failed: {content[0]}")

    def _replace(self, handle, why):
        """Kill and respawn a worker and repeat what it owed. Its slots are empty then; see `cut_lost_episode`."""
        handle.failures += 1
        self.num_restarts += 1
        name = f"environment worker {handle.index} (environments {handle.slots[0]} to {handle.slots[-1]})"
        why = " ".join(why.split())
        if handle.failures > MAX_FAILURES:
            self.close()
            raise UserError(f"{name} {why}; giving up after {MAX_FAILURES} restarts in a row")
        # Through tqdm, so that the line does not land in the middle of somebody's progress bar.
        tqdm.write(f"{name} {why}; restarting it, its episodes are cut", file=sys.stderr)
        handle.kill()
        self._spawn(handle)
        commands, handle.outstanding = handle.outstanding, deque()
        for command in commands:
            handle.send(command, BUILD_TIMEOUT)  # the first answer waits for the start of Python and a compiled task

    def close_extras(self, **kwargs):
        """Stop the workers. They hold nothing that needs saving, so they are killed: quick, and hung ones go too."""
        self._finalizer()

    def _check_idle(self, what, slots):
        if self.closed:
            raise RuntimeError(f"{what}: these environments are closed")
        if self._stepping[slots].any():
            raise RuntimeError(f"{what}: a step is under way; call step_wait first")

    # ---- what each slot plays next -----------------------------------------------------------------------------------

    @property
    def active(self):
        """(N,) bool: slots with a running episode (the others are parked)."""
        return ~self._s.parked

    def _draw_next(self, i):
        """Let the curriculum choose what slot i plays after the running episode."""
        number = int(self._episode[i]) + 1
        rng = np.random.default_rng([self.seed, self.first_slot + i, number, 1])  # 1: not the generator that places the objects
        self._s.assignment[i] = self.curriculum.sample(rng), self._init_code, self.seed, number
        self._asked_next[i], self._drawn_at[i] = False, self.curriculum.num_updates

    def assign(self, i, task_id, init_state=None):
        """Choose the next episode of slot i, once; after that the curriculum chooses again.

        init_state: number of a protocol state, or None for a random placement. task_id None: the slot is parked when
        its episode ends, and stays so until `assign` or `reset`. A parked slot begins an assignment with the next step.
        """
        self._check_idle("assign", [i])
        if task_id is not None and task_id not in self.task_ids:
            raise UserError(f"task {task_id} is not among the tasks of these environments: {self.task_ids}")
        if init_state is not None and not 0 <= init_state < NUM_INIT_STATES:
            raise UserError(f"initial states are numbered 0 to {NUM_INIT_STATES - 1}; {init_state} is none of them")
        task = NO_TASK if task_id is None else int(task_id)
        init = RANDOM_PLACEMENT if init_state is None else int(init_state)
        self._s.assignment[i] = task, init, self.seed, self._episode[i] + 1
        self._asked_next[i] = True

    def _began(self, i):
        """Slot i took up its assignment."""
        self._episode[i] += 1
        self._asked_now[i] = self._asked_next[i]
        self._draw_next(i)

    # ---- Gymnasium ---------------------------------------------------------------------------------------------------

    def reset(self, *, seed=None, options=None):
        """Begin a new episode in every slot. Returns (obs, info).

        seed: restarts all random choices; None goes on with them (episodes differ from those before).
        options: "task_ids" (N entries, None = leave the slot parked) and "init_states" (N entries, None = random
        placement) choose the episodes; "reset_mask" (N,) bool resets only some slots and leaves the others alone.
        """
        options, n = {} if options is None else options, self.num_envs
        if unknown := set(options) - {"task_ids", "init_states", "reset_mask"}:
            raise ValueError(f"reset: unknown option {sorted(unknown)[0]!r}")
        mask = np.asarray(options.get("reset_mask", np.ones(n, bool)), bool)
        task_ids, init_states = options.get("task_ids"), options.get("init_states") or [None] * n
        if mask.shape != (n,) or len(init_states) != n or task_ids is not None and len(task_ids) != n:
            raise ValueError(f"reset: options must have one entry per environment ({n})")
        slots = np.flatnonzero(mask).tolist()
        self._check_idle("reset", slots)
        if seed is not None:
            if seed < 0:
                raise UserError(f"the seed must not be negative, but is {seed}")
            self.seed = int(seed)
            self._episode[slots] = -1
        for i in slots:
            if task_ids is not None:
                self.assign(i, task_ids[i], init_states[i])
            elif not self._asked_next[i] or self._s.assignment[i, 0] == NO_TASK:
                self._draw_next(i)
            self._s.assignment[i, 2:] = self.seed, self._episode[i] + 1
        s = self._s
        s.parked[slots], s.steps[slots] = True, 0
        if starting := [i for i in slots if s.assignment[i, 0] != NO_TASK]:
            self._command(starting, "reset")
            self._await(starting)
        for i in starting:
            self._began(i)
        info = {"eef_pos": s.eef_pos.copy(), "gripper": s.gripper.copy(), "init_state": s.init_state.copy()}
        return self.observation(), info

    def observation(self, slots=slice(None)):
        """The current observation of a group of slots (a slice) that are not in the middle of a step."""
        task_id = self._s.task_id[slots].copy()
        instruction = [self._instructions[t] for t in task_id]
        return {"agentview": self._s.agentview[slots], "task_id": task_id, "instruction": instruction}

    def step(self, actions):
        """One decision in every slot: the action for `action_repeat` control steps, one picture at the end.

        actions: (N, 7). Returns obs, reward (N,) float32 (1.0 on success), terminated (N,) bool, truncated (N,) bool,
        info. Where an episode ended, obs is already the next one's first, and info has
          "final_obs" {"agentview": (N, 256, 256, 3)}, valid where "_final_obs" (N,) bool; "success" (N,) bool;
          "worker_restarted" (N,) bool: cut because its worker died (truncated, and unknown to the curriculum)
        In every row, of the state that this action led to and of its episode, before any reset:
          "eef_pos" (N, 3) metres; "gripper" (N,) metres between the fingers; "episode_length" (N,) int control steps;
          "task_id_ended" (N,) int; "init_state" (N,) int (-1 = random placement)
        "started" (N,) bool: obs is the first of an episode. "timing": seconds of physics, render, reset (summed over
        the slots), busiest (the longest worker), wall (the whole step) and wait (the main process blocked).
        Raises ValueError for actions of another shape, UserError for NaN or infinity; nothing has moved then.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions, slots=slice(None)):
        """Begin a step of a group of slots (a slice); the other groups may be waited for meanwhile.

        With two groups of half the slots each, the policy computes actions for one while physics runs for the other.
        actions: (slots in the group, 7).
        """
        rows, s, began = range(self.num_envs)[slots], self._s, time.perf_counter()
        self._check_idle("step_async", rows)
        actions = np.asarray(actions, np.float64)
        if actions.shape != (len(rows), 7):
            raise ValueError(f"actions must have shape ({len(rows)}, 7), not {actions.shape}")
        if not np.isfinite(actions).all():
            row = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
            raise UserError(f"action of environment {rows[row]} is not finite: {actions[row].tolist()}")
        for i in rows:
            # The curriculum may have learnt something since the coming task was drawn; the same generator draws again.
            if not self._asked_next[i] and not s.parked[i] and self._drawn_at[i] != self.curriculum.num_updates:
                self._draw_next(i)
        s.actions[slots], s.status[slots], s.reward[slots], s.seconds[slots] = actions, NEW, 0.0, 0.0
        for flags in (s.terminated, s.truncated, s.worker_restarted, s.started):
            flags[slots] = False
        self._stepping[slots], self._began_at[slots] = True, began
        self._command(rows, "step", self.action_repeat, self.max_steps)

    def step_wait(self, slots=slice(None)):
        """Results of `step_async` for the same slice: what `step` returns, with one row per slot of the group."""
        rows, s = range(self.num_envs)[slots], self._s
        if not self._stepping[slots].all():
            raise RuntimeError("step_wait: call step_async for these environments first")
        waiting_since = time.perf_counter()
        self._await(rows)
        wait = time.perf_counter() - waiting_since
        self._stepping[slots] = False
        for i in rows:  # in the order of the slots, whoever answered first
            ended = s.terminated[i] or s.truncated[i]
            if ended and not (self._asked_now[i] or s.worker_restarted[i]):
                self.curriculum.update(s.stepped_task[i], s.terminated[i])
            if s.started[i]:
                self._began(i)
            elif s.parked[i] and not self._asked_next[i]:  # no autoreset: the curriculum waits for `reset`
                s.assignment[i, 0] = NO_TASK
        names = dict(success="terminated", episode_length="stepped_length", init_state="stepped_init",
                     task_id_ended="stepped_task", worker_restarted="worker_restarted", started="started",
                     eef_pos="eef_pos", gripper="gripper")
        info = {name: getattr(s, field)[slots].copy() for name, field in names.items()}
        info["final_obs"] = {"agentview": s.final_agentview[slots]}
        info["_final_obs"] = (s.terminated | s.truncated)[slots]
        physics, render, reset = s.seconds[slots].sum(axis=0).tolist()
        busiest = max(h.busy_seconds for h in self._workers if set(h.slots).intersection(rows))
        flags = (s.reward[slots].copy(), s.terminated[slots].copy(), s.truncated[slots].copy())
        obs, wall = self.observation(slots), time.perf_counter() - float(self._began_at[slots].min())
        info["timing"] = dict(physics=physics, render=render, reset=reset, busiest=busiest, wall=wall, wait=wait)
        return obs, *flags, info

    # ---- exact resume ------------------------------------------------------------------------------------------------

    _SAVED = ("agentview", "assignment", "task_id", "init_state", "steps", "parked", "eef_pos", "gripper")

    def _settings(self):
        names = ("suite", "task_ids", "num_envs", "render_quality", "action_repeat")
        return np.frombuffer(json.dumps({name: getattr(self, name) for name in names}).encode(), np.uint8).copy()

    def get_state(self):
        """Everything that the future depends on, mid-episode included: a flat dict of numpy arrays (no object arrays).

        Holds per slot the full simulator state, the current picture, the counters and the coming assignment; and the
        curriculum's statistics. `set_state` on environments of the same settings continues byte for byte.
        """
        self._check_idle("get_state", slice(None))
        self._command(range(self.num_envs), "get_state")
        simulators = {f"sim_{i}": array for share in self._await(range(self.num_envs)) for i, array in share.items()}
        curriculum = {f"curriculum_{name}": np.asarray(x) for name, x in self.curriculum.state_dict().items()}
        slots = {name: getattr(self._s, name).copy() for name in self._SAVED}
        mine = {"episode": self._episode.copy(), "seed": np.int64(self.seed), "settings": self._settings(),
                "asked_now": self._asked_now.copy(), "asked_next": self._asked_next.copy()}
        return slots | simulators | curriculum | mine

    def set_state(self, state):
        """Continue from `get_state()`. Returns the observation. Raises UserError for a state of other settings.

        A step that is under way is abandoned. So an interrupted evaluation can still hand back what it borrowed.
        """
        self._await(range(self.num_envs))
        self._stepping[:] = False
        self._check_idle("set_state", slice(None))
        theirs, ours = bytes(np.asarray(state["settings"])), bytes(self._settings())
        if theirs != ours:
            raise UserError(f"the saved environments had the settings {theirs.decode(errors='replace')}, "
                            f"these have {ours.decode()}; they must be equal")
        for name in self._SAVED:
            getattr(self._s, name)[:] = np.asarray(state[name])
        self._episode[:], self.seed = np.asarray(state["episode"]), int(state["seed"])
        self._asked_now[:], self._asked_next[:] = np.asarray(state["asked_now"]), np.asarray(state["asked_next"])
        prefix = "curriculum_"
        self.curriculum.load_state_dict({k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)})
        self._drawn_at[:] = -1  # drawn again before the next step, with the same statistics: the same tasks
        for handle in self._workers:
            arrays = {i: np.asarray(state[f"sim_{i}"]) for i in handle.slots if f"sim_{i}" in state}
            handle.send(("set_state", handle.slots, arrays), self.timeout)
        self._await(range(self.num_envs))
        return self.observation()


def merge_states(states):
    """`get_state()` of every rank, in the order of their slots -> the state of one LiberoVecEnv with all of them."""
    merged, first = {}, 0
    for state in states:
        for key, x in state.items():
            if key.startswith("sim_"):
                merged[f"sim_{first + int(key[4:])}"] = x
            elif key == "seed" or key == "settings" or key.startswith("curriculum_"):  # the same everywhere
                merged[key] = x
            else:
                merged[key] = np.concatenate([merged[key], x]) if key in merged else x
        first += len(state["parked"])
    merged["settings"] = _with_num_envs(merged["settings"], first)
    return merged


def split_state(state, slots):
    """The part of a state that belongs to the consecutive `slots` (a range): inverse of `merge_states`."""
    part = {}
    for key, x in state.items():
        if key.startswith("sim_"):
            if int(key[4:]) in slots:
                part[f"sim_{int(key[4:]) - slots.start}"] = x
        else:
            part[key] = x if key == "seed" or key.startswith("curriculum_") else x[slots.start : slots.stop]
    part["settings"] = _with_num_envs(state["settings"], len(slots))
    return part


def _with_num_envs(settings, num_envs):
    settings = json.loads(bytes(np.asarray(settings))) | {"num_envs": num_envs}
    return np.frombuffer(json.dumps(settings).encode(), np.uint8).copy()
