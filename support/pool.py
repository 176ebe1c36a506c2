"""A pool of processes that needs no shared memory: jobs and answers travel through pipes.

`multiprocessing.Pool` takes semaphores from /dev/shm, which containers often lack.
"""

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import wait

from support.errors import UserError
from support.machine import die_with_parent


def _work(connection, function):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    die_with_parent()
    while (job := connection.recv()) is not None:
        try:
            connection.send((function(job), None))
        except UserError as exc:
            connection.send((None, str(exc)))


def run_jobs(function, jobs, workers):
    """Yield `function(job)` of every job, in the order in which they end. Processes are spawned, not forked.

    Raises: UserError as a worker raised it, or where one died (its own traceback is on stderr).
    """
    context, jobs = multiprocessing.get_context("spawn"), list(jobs)
    processes, idle = {}, []
    for _ in range(min(workers, len(jobs))):
        ours, theirs = context.Pipe()
        processes[ours] = context.Process(target=_work, args=(theirs, function), daemon=True)
        processes[ours].start()
        theirs.close()  # so that a dead worker reads as the end of its pipe
        idle.append(ours)
    waiting, left = jobs[::-1], len(jobs)
    try:
        while left:
            while idle and waiting:
                with contextlib.suppress(OSError):  # of a dead worker: found below
                    idle.pop(0).send(waiting.pop())
            for connection in wait(list(processes)):
                try:
                    result, problem = connection.recv()
                except (EOFError, OSError):
                    processes[connection].join()
                    code = processes[connection].exitcode
                    raise UserError(
                        f"a worker process ended with exit code {code}; try --num-workers 1"
                    ) from None
                if problem:
                    raise UserError(problem)
                idle.append(connection)
                left -= 1
                yield result
    finally:
        # Those with nothing to do end by themselves, and free what they hold, such as tqdm's semaphore.
        for connection in idle:
            with contextlib.suppress(OSError):
                connection.send(None)
        for connection, process in processes.items():
            process.join(10 if connection in idle else 0)
            process.terminate()
        for process in processes.values():
            process.join()
