"""The block of memory that the main process and its workers share: arrays with one row per environment.

Commands and answers travel through pipes; pictures, actions, rewards and counters do not travel at all. The block has no
name that could be left behind in /dev/shm, and it outlives any worker that dies.
"""

import math
import mmap
import os
import tempfile
import types

import numpy as np

RESOLUTION = 256
FRAME = (RESOLUTION, RESOLUTION, 3)

# A row of `assignment` is (task, initial state, seed, episode number): what the environment plays next. In it,
NO_TASK = -1  # as a task: nothing, the environment stays idle
# as an initial state: objects placed by the episode's generator, as in LIBERO's own reset
RANDOM_PLACEMENT = -1
# as an initial state: one of the evaluation's states, drawn by the episode's generator
RANDOM_PROTOCOL_STATE = -2
FRESH = 1000  # as an initial state, this and above: a random placement that depends on the number and the task alone

# `progress`: how far a worker got with an environment's step, for the replacement of a worker that died in it.
NEW, SAVED, DONE = 0, 1, 2

FIELDS = {
    "agentview": (FRAME, np.uint8),  # the current observation
    "final_agentview": (FRAME, np.uint8),  # of an episode that ended; during a step: the previous observation
    "actions": ((7,), np.float64),
    "assignment": ((4,), np.int64),
    "task_id": ((), np.int64),  # of the current episode
    "init_state": ((), np.int64),
    "steps": ((), np.int64),  # control steps so far
    "idle": ((), np.bool_),  # no episode: steps do nothing
    "progress": ((), np.uint8),
    # Results of the last step.
    "reward": ((), np.float32),
    "terminated": ((), np.bool_),
    "truncated": ((), np.bool_),
    "worker_restarted": ((), np.bool_),  # truncated because the episode was lost with its worker
    "unstable": ((), np.bool_),  # truncated because the simulation diverged
    "started": ((), np.bool_),  # an episode began in this step, after an end or in an idle environment
    "stepped_task": ((), np.int64),  # the episode that the action belonged to
    "stepped_init": ((), np.int64),
    "stepped_length": ((), np.int64),
    "eef_pos": ((3,), np.float64),  # metres
    "gripper": ((), np.float64),  # metres between the fingers
    "seconds": ((3,), np.float64),  # physics, render, reset
}


def shared_arrays(descriptor, num_envs):
    """Namespace of the arrays `FIELDS`; `descriptor` None makes a new block. Returns (arrays, descriptor)."""
    offsets, end = {}, 0
    for name, (shape, dtype) in FIELDS.items():
        offsets[name] = end
        size = num_envs * math.prod(shape) * np.dtype(dtype).itemsize
        end += math.ceil(size / 64) * 64  # cache lines of its own
    if descriptor is None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("libero-envs")
        else:  # not Linux: a file that is deleted at once
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, end)
    block = mmap.mmap(descriptor, end)
    arrays = {
        name: np.ndarray((num_envs, *shape), dtype, buffer=block, offset=offsets[name])
        for name, (shape, dtype) in FIELDS.items()
    }
    return types.SimpleNamespace(**arrays), descriptor
