"""What a process needs to know of its machine: system libraries, seeds, the end of its parent."""

import ctypes
import random
import signal
import sys

from support.errors import UserError

# The wheels bring everything but these: EGL and OpenGL (Mesa's software renderer will do) and what OpenCV, which
# robosuite imports, links to. Names of Debian 12; Ubuntu has the same.
SYSTEM_LIBRARIES = ("libEGL.so.1", "libGL.so.1", "libOpenGL.so.0", "libgthread-2.0.so.0")
DEBIAN_PACKAGES = "libegl1 libgl1 libopengl0 libgl1-mesa-dri libglib2.0-0"


def require_system_libraries():
    """Raise UserError, naming the Debian packages, unless the libraries that rendering needs can be loaded."""
    missing = []
    for name in SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    if missing:
        raise UserError(f"no {', '.join(missing)} here; on Debian or Ubuntu: sudo apt-get install {DEBIAN_PACKAGES}")


def seed_everything(seed):
    """Seed the global generators of Python, NumPy and torch. Code here prefers generators that are passed in."""
    import numpy as np
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
