"""What a process needs to know of its machine, and what it must tell it: cores, caches, system libraries, environment variables."""

import ctypes
import functools
import math
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from support.errors import UserError

# The wheels bring everything but these: EGL and OpenGL (Mesa's software renderer will do) and what OpenCV, which
# robosuite imports, links to. Names of Debian 12; Ubuntu has the same.
SYSTEM_LIBRARIES = ("libEGL.so.1", "libGL.so.1", "libOpenGL.so.0", "libgthread-2.0.so.0")
DEBIAN_PACKAGES = "libegl1 libgl1 libopengl0 libgl1-mesa-dri libglib2.0-0"

# Set, but to nothing, is unset. Libraries disagree about that: to some, an empty path is the current directory.
MAY_BE_EMPTY = (
    "XDG_CACHE_HOME LIBERO_CONFIG_PATH LIBERO_DATASETS_PATH HF_HOME HF_HUB_CACHE HF_TOKEN TORCH_HOME NUMBA_CACHE_DIR "
    "MUJOCO_GL MUJOCO_EGL_DEVICE_ID PYOPENGL_PLATFORM EGL_LOG_LEVEL LP_NUM_THREADS "
    "GOMP_SPINCOUNT OMP_WAIT_POLICY OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMBA_NUM_THREADS"
).split()


def set_library_variables():
    """Set the environment variables that libraries read once, when they are imported: torch, MuJoCo, Mesa.

    `import support` does it, so `support` comes before them. What the user has set stays.
    """
    for name in MAY_BE_EMPTY:
        if os.environ.get(name) == "":
            del os.environ[name]
    # torch's threads wait for each other in a loop that keeps the core busy, by default for 0.2 s and more. Beside another
    # busy program, the thread that they wait for may be the one without a core. Sleeping at once is slower on a quiet machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if cores() < _allowed():  # a quota of time: more threads than that only wait for the next share
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    os.environ.setdefault("MUJOCO_GL", "egl")  # draw without a display
    # Mesa reports every GPU device file that it may not open, on machines where software rendering was wanted anyway.
    os.environ.setdefault("EGL_LOG_LEVEL", "fatal")


def cores(root="/"):
    """Cores that this process may keep busy: those it may run on, or the share of them that a container is limited to.

    `taskset` and Slurm set an affinity; `docker --cpus` and Kubernetes a quota of time, which a program with a thread for
    every core overruns and is then stopped for. Half a core counts as one. root: where /proc and /sys are, for tests.
    """
    return max(1, math.ceil(min(_allowed(), _quota(Path(root)))))


def _allowed():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _quota(root):
    """CPU seconds per second that the control groups of this process leave it; infinite without a limit."""
    quota = math.inf
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return quota
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mounts, read = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = ["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"], _quota_v1
        else:
            continue
        # Inside a container the path may be the host's, and what is mounted the group itself: look at every ancestor.
        parts = Path(group).parts[1:]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                try:
                    quota = min(quota, read(root.joinpath(mount, *parts[:depth])))
                except (OSError, ValueError, ZeroDivisionError):
                    pass  # no limit is set there
    return quota


def _quota_v2(directory):
    quota, period = (directory / "cpu.max").read_text().split()
    return int(quota) / int(period)  # "max" is no number: no limit


def _quota_v1(directory):
    quota = int((directory / "cpu.cfs_quota_us").read_text())
    return quota / int((directory / "cpu.cfs_period_us").read_text()) if quota > 0 else math.inf


def cache_dir():
    """Where what can be computed again is kept: `$XDG_CACHE_HOME/vla_rl`, or ~/.cache/vla_rl.

    Without a home, or where it cannot be written, a directory of this user under the temporary one.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    here = Path(root) / "vla_rl"
    if here.is_absolute() and can_write(str(here)):
        return here
    return Path(_temporary_cache(tempfile.gettempdir()))


@functools.cache
def _temporary_cache(parent):
    """This user's directory under the temporary one; another one where somebody else has made that."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    path = os.path.join(parent, f"vla_rl-{user}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and os.lstat(path).st_uid != user:
            path = tempfile.mkdtemp(prefix="vla_rl-", dir=parent)
    except OSError:
        pass  # then nothing is kept
    return path


@functools.cache
def can_write(directory):
    """Whether files can be made in `directory` (str), which is made if need be. Tried once: permissions alone do not tell."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def require_system_libraries():
    """Raise UserError, naming the Debian packages, unless the libraries that rendering needs can be loaded."""
    missing = []
    for name in SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    if missing:
        raise UserError(
            f"no {', '.join(missing)} here; on Debian or Ubuntu: sudo apt-get install {DEBIAN_PACKAGES}"
        )


def seed_everything(seed):
    """Seed the global generators of Python, NumPy and torch. Code here prefers generators that are passed in."""
    import numpy as np  # not at the top: this module is imported before torch, to set what torch reads
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def die_with_parent():
    """Let the kernel end this process when its parent ends, however that happens. Linux; elsewhere it does nothing.

    A process that is stopped (SIGSTOP) or waits for work from a pool could not notice by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
