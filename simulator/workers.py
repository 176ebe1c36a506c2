"""Worker processes that play LIBERO episodes, and the block of memory that they share with the main process."""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import OrderedDict, deque
from multiprocessing import connection
from pathlib import Path

import numpy as np
import psutil

from simulator.task import TaskSim
from support.errors import UserError
from support.machine import die_with_parent

RESOLUTION = 256
BUILD_TIMEOUT = 300.0  # seconds for one task's model; 2 to 12 are normal, ten times that on a loaded machine
HANG_CHECKS = 5  # seconds, one check in each, in which a hung worker uses no processor time
MAX_FAILURES = 3  # replacements of one worker without a finished command in between; then something is really broken

# `assignment[i]` = (task, init state, seed, episode). Two init states have a meaning beyond "protocol state number k":
RANDOM_PLACEMENT = -1  # objects placed by the episode's generator, as in LIBERO's own reset
RANDOM_PROTOCOL_STATE = -2  # one of the 50 protocol states, drawn by the episode's generator
NO_TASK = -1  # as a task: when the episode ends, park the slot

# `status[i]`: how far a slot got within the current step; lets a replacement pick up where a dead worker left off.
NEW, SAVED, DONE = 0, 1, 2


# --------------------------------------------------------------------------------------------------------------------
# The shared block
# --------------------------------------------------------------------------------------------------------------------

FRAME = (RESOLUTION, RESOLUTION, 3)
FIELDS = {  # one row per slot
    "agentview": (FRAME, np.uint8),  # the current observation
    "final_agentview": (FRAME, np.uint8),  # of an ended episode; during a step: the previous one
    "actions": ((7,), np.float64),
    "assignment": ((4,), np.int64),  # what the slot plays next: task, init state, seed, episode number
    "task_id": ((), np.int64),  # what the slot plays now
    "init_state": ((), np.int64),
    "steps": ((), np.int64),  # control steps so far
    "parked": ((), np.bool_),  # no episode: steps do nothing
    "status": ((), np.uint8),
    "reward": ((), np.float32),  # from here on: results of the last step
    "terminated": ((), np.bool_),
    "truncated": ((), np.bool_),
    "worker_restarted": ((), np.bool_),
    "started": ((), np.bool_),  # an episode began in this step (after an end, or in a parked slot)
    "stepped_task": ((), np.int64),  # the episode that the action belonged to
    "stepped_init": ((), np.int64),
    "stepped_length": ((), np.int64),
    "eef_pos": ((3,), np.float64),
    "gripper": ((), np.float64),
    "seconds": ((3,), np.float64),  # physics, render, reset
}


def map_slots(descriptor, num_envs):
    """Namespace of arrays over the shared block; `descriptor` None makes a new block. Returns (arrays, descriptor)."""
    offsets, end = {}, 0
    for name, (shape, dtype) in FIELDS.items():
        offsets[name] = end
        end += -(-num_envs * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize // 64) * 64  # own cache lines
    if descriptor is None:
        # A memfd has no name, so nothing is left in /dev/shm however the process ends. Elsewhere: an unlinked file.
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("libero-slots")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, end)
    block = mmap.mmap(descriptor, end)
    arrays = {
        name: np.ndarray((num_envs, *shape), dtype, buffer=block, offset=offsets[name])
        for name, (shape, dtype) in FIELDS.items()
    }
    return types.SimpleNamespace(**arrays), descriptor


# --------------------------------------------------------------------------------------------------------------------
# Worker process
# --------------------------------------------------------------------------------------------------------------------


class Worker:
    """What runs in a worker process: a pool of compiled tasks and the episodes of some slots."""

    def __init__(self, conn, config):
        self.conn, self.config = conn, config
        self.shared, _ = map_slots(config["shared_fd"], config["num_envs"])
        self.pool = OrderedDict()  # task id -> TaskSim, least recently used first
        self.episodes = {}  # slot -> Episode; an empty slot lost its episode with the worker that this one replaces

    def build(self, tasks):
        for task_id in tasks:
            self.task(task_id)

    def task(self, task_id):
        """The compiled task, from the pool or built now (seconds: announced, so that it is not taken for a hang)."""
        if task_id not in self.pool:
            self.conn.send(("building", task_id))
            in_use = {id(episode.sim) for episode in self.episodes.values()}
            for old in [t for t, s in self.pool.items() if id(s) not in in_use]:
                if len(self.pool) < self.config["tasks_per_worker"]:
                    break
                self.pool.pop(old).close()
            built = TaskSim(self.config["suite"], task_id, self.config["render"], RESOLUTION)
            self.pool[task_id] = built
            self.conn.send(("built", task_id))
        self.pool.move_to_end(task_id)
        return self.pool[task_id]

    def load(self, i, task_id):
        """An Episode object on task `task_id` in slot i; the old one is kept when it already plays that task."""
        if i in self.episodes and self.episodes[i].sim.task_id != task_id:
            del self.episodes[i]  # first, so that its task may leave the pool
        task = self.task(task_id)
        if i not in self.episodes:
            self.episodes[i] = task.episode()
        return self.episodes[i]

    def start(self, i):
        """Begin the assigned episode in slot i. Returns its first picture."""
        s = self.shared
        task_id, init, seed, number = (int(x) for x in s.assignment[i])
        episode = self.load(i, task_id)
        rng = np.random.default_rng([seed, self.config["first_slot"] + i, number])
        if init == RANDOM_PROTOCOL_STATE:
            init = int(rng.integers(episode.sim.num_init_states))
        t0 = time.perf_counter()
        episode.reset(None if init == RANDOM_PLACEMENT else init, rng)
        t1 = time.perf_counter()
        frame = episode.render()
        s.seconds[i] += 0.0, time.perf_counter() - t1, t1 - t0
        s.task_id[i], s.init_state[i], s.steps[i] = task_id, init, 0
        return frame

    def publish_privileged(self, i):
        p = self.episodes[i].privileged()
        self.shared.eef_pos[i] = p["eef_pos"]
        self.shared.gripper[i] = p["gripper_qpos"][0] - p["gripper_qpos"][1]  # the fingers open in opposite directions

    def reset(self, slots):
        for i in slots:
            self.shared.agentview[i] = self.start(i)
            self.publish_privileged(i)
            self.shared.parked[i] = False

    def step(self, slots, action_repeat, max_steps):
        s = self.shared
        for i in slots:
            ended = s.terminated[i] or s.truncated[i]
            if ended or s.started[i]:  # reported by a worker that died before it had done all its slots:
                self.begin_next(i)  # the report stands, and the episode after it begins once more
            elif s.parked[i]:
                s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], 0
                if self.config["autoreset"] and s.assignment[i, 0] != NO_TASK:
                    self.begin_next(i)  # the action of this step belongs to no episode
            elif i in self.episodes:
                self.step_slot(i, action_repeat, max_steps)
            else:
                self.cut_lost_episode(i)
            s.status[i] = DONE

    def step_slot(self, i, action_repeat, max_steps):
        s, episode = self.shared, self.episodes[i]
        # Keep the picture that the policy acted on until the new one is complete: should this process die in between,
        # it is the last observation of the episode, and the value of a truncated episode needs one.
        s.final_agentview[i] = s.agentview[i]
        s.status[i] = SAVED
        t0 = time.perf_counter()
        success, steps = False, int(s.steps[i])
        for _ in range(action_repeat):
            success = bool(episode.step(s.actions[i]))
            steps += 1
            if success or steps >= max_steps:
                break
        t1 = time.perf_counter()
        frame = episode.render()
        s.seconds[i] += t1 - t0, time.perf_counter() - t1, 0.0
        s.steps[i] = steps
        self.publish_privileged(i)
        s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], steps
        truncated = not success and steps >= max_steps
        if success or truncated:
            self.end(i, frame, success, truncated)
        else:
            s.agentview[i] = frame

    def cut_lost_episode(self, i):
        """Step of a slot whose episode died with an earlier worker."""
        s = self.shared
        # NEW: it had not touched this slot. DONE: the step is complete. In between, the picture may be half new.
        last_frame = (s.final_agentview if s.status[i] == SAVED else s.agentview)[i].copy()
        s.stepped_task[i], s.stepped_init[i], s.stepped_length[i] = s.task_id[i], s.init_state[i], s.steps[i]
        s.worker_restarted[i] = True
        self.end(i, last_frame, success=False, truncated=True)

    def end(self, i, last_frame, success, truncated):
        """The episode of slot i is over: report it, then begin the next one in the same step."""
        s = self.shared
        s.final_agentview[i] = last_frame
        s.reward[i], s.terminated[i], s.truncated[i] = float(success), success, truncated
        self.begin_next(i)

    def begin_next(self, i):
        """The assigned episode; without one (or without autoreset) the slot is parked and shows its last picture."""
        s = self.shared
        if self.config["autoreset"] and s.assignment[i, 0] != NO_TASK:
            fresh = s.parked[i]
            s.agentview[i] = self.start(i)
            if fresh:  # after an end, these stay those of the state that the action led to
                self.publish_privileged(i)
            s.started[i], s.parked[i] = True, False
        else:
            s.agentview[i], s.parked[i] = s.final_agentview[i], True

    def get_state(self, slots):
        return {i: self.episodes[i].get_state() for i in slots if i in self.episodes}

    def set_state(self, slots, states):
        """states: slot -> array for `Episode.set_state`. The main process restores the shared block itself."""
        for i in slots:
            if i in states:
                self.load(i, int(self.shared.task_id[i])).set_state(states[i])
            else:
                self.episodes.pop(i, None)

    def serve(self):
        while True:
            try:
                command, *arguments = self.conn.recv()
            except EOFError:
                return
            began = time.perf_counter()
            result = getattr(self, command)(*arguments)
            self.conn.send(("done", result, time.perf_counter() - began))


def worker_main(descriptor):
    """Entry point of a worker process; `descriptor` is its end of a socket pair."""
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
        Worker(conn, config).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the main process is gone
    except UserError as exc:
        conn.send(("user_error", str(exc)))
    except Exception as exc:
        import traceback

        where = traceback.extract_tb(exc.__traceback__)[-1]
        conn.send(("error", f"{type(exc).__name__}: {exc} ({Path(where.filename).name}:{where.lineno})"))
    os._exit(0)  # no clean-up: freeing GL contexts is where drivers hang, and the operating system does it anyway


# --------------------------------------------------------------------------------------------------------------------
# The main process' side of a worker
# --------------------------------------------------------------------------------------------------------------------


class Handle:
    """The main process' side of one worker."""

    def __init__(self, index, slots):
        self.index, self.slots = index, slots
        self.process = self.conn = self.log = None
        self.outstanding = deque()  # commands without an answer yet, oldest first: what a replacement must do again
        self.deadline = 0.0
        self.building = True  # Python is starting or a model is being compiled: reading files takes no processor time
        self.checked_at, self.processor_time, self.idle_checks = 0.0, 0.0, 0
        self.failures = 0
        self.busy_seconds = 0.0

    def spawn(self, config, egl_device=None):
        # A plain `python -c` instead of multiprocessing: it does not import the caller's main script (and torch with
        # it) into every worker, needs no `if __name__ == "__main__"` there, and takes its environment as an argument.
        ours, theirs = socket.socketpair()
        # One thread each: the workers themselves fill the cores. LP_NUM_THREADS=0 lets Mesa's software renderer draw in
        # the calling thread; a single helper thread (=1) costs a hand-over per picture.
        numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        # Without the fixed threshold, glibc keeps a task's freed building blocks (100 MB) in a fragmented heap.
        environment = {"MUJOCO_GL": "egl", "MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
        environment |= {**dict.fromkeys(numbers, "1"), "LP_NUM_THREADS": "0"}
        if egl_device is not None:
            environment["MUJOCO_EGL_DEVICE_ID"] = str(egl_device)
        here = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import simulator.workers; simulator.workers.worker_main({theirs.fileno()})"
        self.log = tempfile.TemporaryFile()  # what third parties print; shown only if the worker dies: the last line
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code],
            pass_fds=(theirs.fileno(), config["shared_fd"]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            process_group=0,  # Ctrl-C in the terminal goes to the main process alone
        )
        theirs.close()
        self.building, self.idle_checks = True, 0
        self.conn = connection.Connection(ours.detach())
        self.conn.send(config)

    def send(self, command, timeout):
        if not self.outstanding:
            self.deadline, self.idle_checks = time.monotonic() + timeout, 0
        self.outstanding.append(command)
        with contextlib.suppress(OSError):  # a dead worker: found, and the command repeated, when the answer is awaited
            self.conn.send(command)

    def is_hung(self):
        """Whether the worker, which owes an answer, has stopped working: called often, looks once a second.

        A stopped process or a deadlock in a driver uses no processor time. A busy machine does not look like that: it
        slows a worker down, but never denies it every tick. Checks are counted, not seconds, because this process may
        have been stopped too.
        """
        now = time.monotonic()
        if now - self.checked_at >= 1.0:
            before, self.checked_at, self.processor_time = self.processor_time, now, -1.0
            with contextlib.suppress(psutil.Error):  # it has just died; its closed pipe says so
                self.processor_time = sum(psutil.Process(self.process.pid).cpu_times()[:2])
            self.idle_checks = self.idle_checks + 1 if self.processor_time == before else 0
        return self.idle_checks >= HANG_CHECKS * (6 if self.building else 1)

    def how_it_ended(self):
        """In words; for a worker whose pipe is closed."""
        try:
            code = self.process.wait(10.0)  # the pipe closes first, then a gigabyte is given back
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        self.log.seek(0)
        words = [f"({line.strip()})" for line in self.log.read().decode(errors="replace").strip().splitlines()[-1:]]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return " ".join([how, *words])

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.conn.close()
            self.log.close()
            self.process = None


def release(handles, descriptor):
    for handle in handles:
        handle.kill()
    os.close(descriptor)


def cores():
    """Cores that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
