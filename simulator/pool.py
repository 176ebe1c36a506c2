"""Worker processes seen from the main process: they are started, watched, replaced and ended here.

    main process                                    worker w (one per core)
    ------------                                    -----------------------
    WorkerPool.call("step", ...)                    compiled tasks, each built once and shared by its environments
      a tiny message to every worker       ------->  for each of its environments: some control steps, one picture
      waits for one tiny message of each   <-------  results stand in the shared arrays

A worker that dies, stands still or takes too long is replaced, and what it owed is asked of its replacement once more.
The shared arrays outlive it, so nothing that it had finished is lost (`simulator/workers.py` has the other half of this).
An error that a person must mend, such as a missing library or file, is told at once instead.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from multiprocessing import connection
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from simulator.shared import shared_arrays
from support.errors import UserError

BUILD_TIMEOUT = 300.0  # seconds for one task's model; 2 to 12 are normal, ten times that on a loaded machine
HANG_CHECKS = (
    5  # so many seconds in a row without any processor time, and a worker that owes an answer is hung
)
MAX_FAILURES = (
    3  # replacements of one worker without a finished command in between; then something is really broken
)


class WorkerPool:
    """Processes that play the episodes of `num_envs` environments, a contiguous share each.

    arrays: the shared arrays of `simulator/shared.py`, one row per environment. busy_seconds: of the busiest worker in the
    last `call`. num_restarts: workers replaced so far. timeout: seconds that a worker may take for one command.
    egl_devices: EGL device numbers, given to the workers in turn (None: leave the choice to EGL).
    settings: what `workers.Worker` needs to know: suite, render, first_env, tasks_per_worker.

    Raises UserError, from any method, for what a replacement cannot mend.
    """

    def __init__(self, num_envs, num_workers, timeout, egl_devices=None, **settings):
        self.arrays, descriptor = shared_arrays(None, num_envs)
        self.num_envs, self.timeout, self.num_restarts, self.busy_seconds = num_envs, timeout, 0, 0.0
        self._config = {"parent": os.getpid(), "num_envs": num_envs, "descriptor": descriptor, **settings}
        devices = egl_devices or [None]
        shares = np.array_split(np.arange(num_envs), min(num_envs, num_workers))
        self._workers = [
            WorkerProcess(w, share.tolist(), devices[w % len(devices)]) for w, share in enumerate(shares)
        ]
        # At exit too, hung workers or not. They hold nothing that needs saving, so they are killed.
        self._finalizer = weakref.finalize(self, _release, self._workers, descriptor)

    @property
    def pids(self):
        return [worker.process.pid for worker in self._workers if worker.process]

    def start(self, task_ids, on_built=lambda: None):
        """Start all workers, each with these tasks compiled. on_built(): called as each one is."""
        try:
            for w, worker in enumerate(self._workers):
                worker.spawn(self._config)
                # Each begins with another task: what one has compiled, the others load (simulator/compiled.py).
                first = w * len(task_ids) // len(self._workers)
                worker.send(("build", [*task_ids[first:], *task_ids[:first]]), BUILD_TIMEOUT)
            self.finish(on_built)
        except BaseException:
            self.close()
            raise

    def call(self, command, *arguments, envs=None, split=()):
        """Let workers carry out a command for `envs` (default: all). Returns their answers.

        split: dicts by environment, sent after `arguments`; each worker gets its own environments' entries.
        """
        self.finish()  # of a call that was interrupted
        wanted = set(range(self.num_envs) if envs is None else envs)
        for worker in self._workers:
            if share := [i for i in worker.envs if i in wanted]:
                own = [{i: entries[i] for i in share if i in entries} for entries in split]
                worker.send((command, share, *arguments, *own), self.timeout)
        return self.finish()

    def finish(self, on_built=lambda: None):
        """Wait until no worker owes an answer. Returns the answers."""
        answers, self.busy_seconds = [], 0.0
        while owing := [worker for worker in self._workers if worker.outstanding]:
            patience = min(worker.deadline for worker in owing) - time.monotonic()
            ready = connection.wait([worker.conn for worker in owing], min(max(0.0, patience), 1.0))
            for worker in owing:
                if worker.conn in ready:
                    self._receive(worker, answers, on_built)
                elif time.monotonic() > worker.deadline:
                    self._replace(worker, "gave no answer in time")
                elif worker.is_hung():
                    self._replace(worker, "stands still")
        return answers

    @property
    def closed(self):
        return not self._finalizer.alive

    def close(self):
        self._finalizer()

    def _receive(self, worker, answers, on_built):
        try:
            kind, *content = worker.conn.recv()
        except (EOFError, OSError):
            how, is_user_error = worker.how_it_ended()
            if is_user_error:
                self.close()
                raise UserError(how) from None
            self._replace(worker, how)
            return
        worker.building = kind == "building"
        # a replacement warms up
        patience = BUILD_TIMEOUT if worker.building or worker.failures else self.timeout
        worker.deadline = time.monotonic() + patience
        if kind == "built":
            on_built()
        elif kind == "done":
            worker.outstanding.popleft()
            worker.failures = 0
            answers.append(content[0])
            self.busy_seconds = max(self.busy_seconds, content[1])

    def _replace(self, worker, why):
        """Kill and respawn a worker and repeat what it owed. It has no episodes then: `Worker._report_lost_episode`."""
        worker.failures += 1
        self.num_restarts += 1
        name = f"environment worker {worker.index} (environments {worker.envs[0]} to {worker.envs[-1]})"
        if worker.failures > MAX_FAILURES:
            self.close()
            raise UserError(f"{name} {why}; giving up after {MAX_FAILURES} restarts in a row")
        # Through tqdm, so that the line does not land in the middle of somebody's progress bar.
        tqdm.write(f"{name} {why}; restarting it, its episodes count as truncated", file=sys.stderr)
        worker.kill()
        worker.spawn(self._config)
        commands, worker.outstanding = worker.outstanding, deque()
        for command in commands:
            # the first answer waits for the start of Python and a compiled task
            worker.send(command, BUILD_TIMEOUT)


class WorkerProcess:
    """One worker: its process, its pipe, and what it owes."""

    def __init__(self, index, envs, egl_device=None):
        self.index, self.envs, self.egl_device = index, envs, egl_device
        self.process = self.conn = self.log = None
        # commands without an answer yet, oldest first: what a replacement must do again
        self.outstanding = deque()
        self.deadline = 0.0
        self.building = (
            True  # Python is starting or a model is being compiled: reading files takes no processor time
        )
        self.checked_at, self.processor_time, self.idle_checks = 0.0, 0.0, 0
        self.failures = 0

    def spawn(self, config):
        # A plain `python -c` instead of multiprocessing: it does not import the caller's main script (and torch with
        # it) into every worker, needs no `if __name__ == "__main__"` there, and takes its environment as an argument.
        ours, theirs = socket.socketpair()
        # One thread each: the workers themselves fill the cores. LP_NUM_THREADS=0 lets Mesa's software renderer draw in
        # the calling thread; a single helper thread (=1) costs a hand-over per picture.
        numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        # Without the fixed threshold, glibc keeps a task's freed building blocks (100 MB) in a fragmented heap.
        environment = {"MUJOCO_GL": "egl", "MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
        environment |= {**dict.fromkeys(numbers, "1"), "LP_NUM_THREADS": "0"}
        if self.egl_device is not None:
            environment["MUJOCO_EGL_DEVICE_ID"] = str(self.egl_device)
        root, pipe = str(Path(__file__).resolve().parent.parent), theirs.fileno()
        code = f"import sys; sys.path.insert(0, {root!r}); from simulator import workers; workers.worker_main({pipe})"
        self.log = tempfile.TemporaryFile()  # what the worker and third parties print: shown only if it dies
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code],
            pass_fds=(pipe, config["descriptor"]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            process_group=0,  # Ctrl-C in the terminal goes to the main process alone
        )
        theirs.close()
        self.building, self.idle_checks = True, 0
        self.conn = connection.Connection(ours.detach())
        with contextlib.suppress(OSError):  # as in `send`
            self.conn.send(config)

    def send(self, command, timeout):
        if not self.outstanding:
            self.deadline, self.idle_checks = time.monotonic() + timeout, 0
        self.outstanding.append(command)
        # A dead worker is found, and the command repeated, when the answer is awaited.
        with contextlib.suppress(OSError):
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
        """Of a worker whose pipe is closed: (in words, is it something that a person must mend?)."""
        try:
            code = self.process.wait(10.0)  # the pipe closes first, then a gigabyte is given back
        except subprocess.TimeoutExpired:
            return "closed its pipe", False
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").strip().splitlines()]
        if code == 1:  # a UserError, of `worker_main` or of an import
            for line in reversed(lines):
                if line.startswith("error: "):
                    return line.removeprefix("error: "), True
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        # After a segmentation fault, faulthandler lists the loaded modules last, and says first what happened.
        fatal = [line for line in lines if line.startswith("Fatal Python error")]
        return " ".join([how, *(f"({line})" for line in (fatal or lines)[-1:])]), False

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.conn.close()
            self.log.close()
            self.process = None


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _release(workers, descriptor):
    for worker in workers:
        worker.kill()
        worker.outstanding.clear()
    os.close(descriptor)
