"""What runs in a worker process: compiled tasks, and the episodes of some of the environments.

A worker never asks what comes next. Before every step the main process has already written which task and placement each
environment plays when its episode ends (`assignment`), so the worker begins it at once, in the same step.

A worker may die at any moment: a segfault in a driver, `kill -9`, a deadlock in EGL. Its replacement starts without episodes,
and an environment without its episode, when told to step, reports it as truncated and begins the next one. No special case:
the command is just sent again (`simulator/pool.py`).
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from multiprocessing import connection
from pathlib import Path

import numpy as np

from simulator.render import Kept
from simulator.shared import (
    DONE,
    FRESH,
    NO_TASK,
    RANDOM_PLACEMENT,
    RANDOM_PROTOCOL_STATE,
    RESOLUTION,
    SAVED,
    shared_arrays,
)
from simulator.task import TaskSim
from support.errors import UserError
from support.machine import die_with_parent


class Worker:
    """Its public methods are the commands that the main process sends: build, reset, step, get_state, set_state."""

    def __init__(self, conn, config):
        self.conn, self.config = conn, config
        self.shared, _ = shared_arrays(config["descriptor"], config["num_envs"])
        self.tasks = OrderedDict()  # task id -> TaskSim, least recently used first
        self.episodes = {}  # environment -> Episode; none where it was lost with the worker that this one replaces

    def build(self, task_ids):
        for task_id in task_ids:
            self._task(task_id)

    def reset(self, envs):
        for i in envs:
            self.shared.agentview[i] = self._start(i)
            self._publish_privileged(i)
            self.shared.idle[i] = False

    def step(self, envs, action_repeat, max_steps):
        s = self.shared
        for i in envs:
            ended = s.terminated[i] or s.truncated[i]
            if ended or s.started[i]:
                # Reported by a worker that died before it had done all its environments: the report stands, and the
                # episode after it begins once more.
                self._begin_next(i)
            elif s.idle[i]:
                s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], 0
                if s.assignment[i, 0] != NO_TASK:
                    self._begin_next(i)  # the action of this step belongs to no episode
            elif i in self.episodes:
                self._step(i, action_repeat, max_steps)
            else:
                self._report_lost_episode(i)
            s.progress[i] = DONE

    def get_state(self, envs):
        """{environment: array of `Episode.get_state`}."""
        here = [i for i in envs if i in self.episodes]
        # A stove's mirror shows what stands still, so go on as an environment that is brought back does.
        for i in here:
            self.episodes[i].kept = Kept()
        return {i: self.episodes[i].get_state() for i in here}

    def set_state(self, envs, states):
        """Inverse of `get_state`. The main process restores the shared arrays itself."""
        for i in envs:
            if i in states:
                episode = self._load(i, int(self.shared.task_id[i]))
                episode.set_state(states[i])
                episode.kept = Kept()
            else:
                self.episodes.pop(i, None)

    # ---- tasks and episodes ------------------------------------------------------------------------------------------

    def _task(self, task_id):
        """The compiled task, kept or built now (seconds: announced, so that it is not taken for a hang)."""
        if task_id not in self.tasks:
            self.conn.send(("building", task_id))
            in_use = {id(episode.sim) for episode in self.episodes.values()}
            for old in [t for t, sim in self.tasks.items() if id(sim) not in in_use]:
                if len(self.tasks) < self.config["tasks_per_worker"]:
                    break
                self.tasks.pop(old).close()
            self.tasks[task_id] = TaskSim(self.config["suite"], task_id, self.config["render"], RESOLUTION)
            self.conn.send(("built", task_id))
        self.tasks.move_to_end(task_id)
        return self.tasks[task_id]

    def _load(self, i, task_id):
        """An Episode object on task `task_id` for environment i; the old one is kept when it already plays that task."""
        if i in self.episodes and self.episodes[i].sim.task_id != task_id:
            del self.episodes[i]  # first, so that its task may be dropped
        task = self._task(task_id)
        if i not in self.episodes:
            self.episodes[i] = task.episode()
        return self.episodes[i]

    def _start(self, i):
        """Begin the assigned episode in environment i. Returns its first picture."""
        s = self.shared
        task_id, init_state, seed, number = (int(x) for x in s.assignment[i])
        episode = self._load(i, task_id)
        rng = np.random.default_rng([seed, self.config["first_env"] + i, number])
        if init_state == RANDOM_PROTOCOL_STATE:
            init_state = int(rng.integers(episode.sim.num_init_states))
        placed_anew = init_state == RANDOM_PLACEMENT or init_state >= FRESH
        if init_state >= FRESH:
            rng = np.random.default_rng([task_id, init_state])
        t0 = time.perf_counter()
        episode.reset(None if placed_anew else init_state, rng)
        t1 = time.perf_counter()
        frame = episode.render()
        s.seconds[i] += 0.0, time.perf_counter() - t1, t1 - t0
        s.task_id[i], s.init_state[i], s.steps[i] = task_id, init_state, 0
        return frame

    def _publish_privileged(self, i):
        p = self.episodes[i].privileged()
        self.shared.eef_pos[i] = p["eef_pos"]
        # the fingers open in opposite directions
        self.shared.gripper[i] = p["gripper_qpos"][0] - p["gripper_qpos"][1]

    def _step(self, i, action_repeat, max_steps):
        s, episode = self.shared, self.episodes[i]
        # Keep the picture that the policy acted on until the new one is complete: should this process die in between,
        # it is the last observation of the episode, and the value of a truncated episode needs one.
        s.final_agentview[i] = s.agentview[i]
        s.progress[i] = SAVED
        t0 = time.perf_counter()
        success, steps = False, int(s.steps[i])
        for _ in range(action_repeat):
            success = bool(episode.step(s.actions[i]))
            steps += 1
            if success or episode.unstable or steps >= max_steps:
                break
        t1 = time.perf_counter()
        frame = episode.render()
        s.seconds[i] += t1 - t0, time.perf_counter() - t1, 0.0
        s.steps[i] = steps
        self._publish_privileged(i)
        s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], steps
        s.unstable[i] = episode.unstable
        if episode.unstable:  # MuJoCo has put the scene back: what it shows is nothing that the action led to
            frame = s.final_agentview[i].copy()
        truncated = not success and (episode.unstable or steps >= max_steps)
        if success or truncated:
            self._end(i, frame, success, truncated)
        else:
            s.agentview[i] = frame

    def _report_lost_episode(self, i):
        """Step of an environment whose episode was lost with an earlier worker."""
        s = self.shared
        # NEW: that worker had not touched it. DONE: the step is complete. In between, the picture may be half new.
        last_frame = (s.final_agentview if s.progress[i] == SAVED else s.agentview)[i].copy()
        s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], s.steps[i]
        s.worker_restarted[i] = True
        self._end(i, last_frame, success=False, truncated=True)

    def _end(self, i, last_frame, success, truncated):
        """The episode of environment i is over: report it, then begin the next one in the same step."""
        s = self.shared
        s.final_agentview[i] = last_frame
        s.reward[i], s.terminated[i], s.truncated[i] = float(success), success, truncated
        self._begin_next(i)

    def _begin_next(self, i):
        """The assigned episode; without one the environment becomes idle and shows its last picture."""
        s = self.shared
        if s.assignment[i, 0] != NO_TASK:
            was_idle = s.idle[i]
            s.agentview[i] = self._start(i)
            if was_idle:  # after an end, these stay those of the state that the action led to
                self._publish_privileged(i)
            s.started[i], s.idle[i] = True, False
        else:
            s.agentview[i], s.idle[i] = s.final_agentview[i], True


# --------------------------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------------------------


def worker_main(descriptor):
    """Entry point of a worker process; `descriptor` is its end of a socket pair.

    It must not outlive the main process: it leaves when the pipe closes, when its parent changes or is killed, and leaves
    Ctrl-C to the main process. Whatever ends it stands on the last line of its stderr (`pool.WorkerProcess.how_it_ended`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    conn = connection.Connection(descriptor)
    config = conn.recv()

    def leave_with_parent():
        # The pipe's end says the same, but only while the worker is reading it, and not while it is building a model.
        while os.getppid() == config["parent"]:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        worker = Worker(conn, config)
        while True:
            command, *arguments = conn.recv()
            began = time.perf_counter()
            result = getattr(worker, command)(*arguments)
            conn.send(("done", result, time.perf_counter() - began))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the main process is gone
    except UserError as exc:
        last_words = f"error: {exc}"
    except (FileNotFoundError, NotADirectoryError, PermissionError) as exc:
        # The next worker would not find it either.
        last_words = f"error: {exc.strerror}: {exc.filename}" if exc.filename else f"error: {exc}"
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        last_words = f"{type(exc).__name__}: {exc} ({Path(where.filename).name}:{where.lineno})"
    print(" ".join(last_words.split()), file=sys.stderr, flush=True)
    # no clean-up: freeing GL contexts is where drivers hang, and the operating system does it anyway
    os._exit(1)
