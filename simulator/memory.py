"""Giving memory back: what compiling a task leaves behind, and what only the renderer needed."""

import ctypes
import mmap
from pathlib import Path

import mujoco
import numpy as np

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


def _release_pages(array):
    """Return the whole pages of a contiguous array to the operating system. They read as zeros from now on."""
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def release_visual_data(model):
    """Empty the model's textures and visual-only meshes once the renderer has its own copies: 250 of 270 MB.

    Physics reads a mesh only where one of its geoms can collide. Numbers, addresses and sizes stay, so that the scene
    can still name the meshes that the renderer holds; only their vertices, faces and pixels are gone.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return  # not Linux: only memory is lost
    _release_pages(model.tex_data)
    mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    collides[np.concatenate([model.pair_geom1, model.pair_geom2])] = True
    needed = set(model.geom_dataid[mesh & collides])
    for i in set(range(model.nmesh)) - needed:
        for start, count, names in (
            (model.mesh_vertadr[i], model.mesh_vertnum[i], "mesh_vert mesh_polymapadr mesh_polymapnum"),
            (model.mesh_faceadr[i], model.mesh_facenum[i], "mesh_face mesh_facenormal mesh_facetexcoord"),
            (model.mesh_normaladr[i], model.mesh_normalnum[i], "mesh_normal"),
            (model.mesh_texcoordadr[i], model.mesh_texcoordnum[i], "mesh_texcoord"),
            (
                model.mesh_polyadr[i],
                model.mesh_polynum[i],
                "mesh_polynormal mesh_polyvertadr mesh_polyvertnum",
            ),
            (model.mesh_bvhadr[i], model.mesh_bvhnum[i], "bvh_aabb bvh_child bvh_depth bvh_nodeid"),
        ):
            for name in names.split() if start >= 0 else ():
                _release_pages(getattr(model, name)[start : start + count])
