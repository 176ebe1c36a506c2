"""Giving memory back: what compiling a task leaves behind."""

import ctypes
from pathlib import Path

import mujoco

from simulator import MUJOCO_WAS_UNUSED

(_LIBMUJOCO,) = Path(mujoco.__file__).parent.glob("libmujoco.*")
_LIBMUJOCO, _LIBC = ctypes.CDLL(str(_LIBMUJOCO)), ctypes.CDLL(None)  # for what has no Python binding

if MUJOCO_WAS_UNUSED:
    # MuJoCo keeps up to 500 MB of decoded meshes and textures in case that a later model wants them. Without them a
    # task compiles in 2.2 s instead of 0.5 s. It must be switched off before the first model: 3.3.2 crashes when a
    # cache that has been used shrinks.
    _LIBMUJOCO.mj_globalCache.restype = ctypes.c_void_p
    _LIBMUJOCO.mj_setCacheSize.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _LIBMUJOCO.mj_setCacheSize(_LIBMUJOCO.mj_globalCache(), 0)


def free_build_memory():
    """Give back what compiling left behind: MuJoCo's copy of the last XML model (0.1 GB) and free heap (0.4 GB)."""
    _LIBMUJOCO.mj_freeLastXML()
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)
