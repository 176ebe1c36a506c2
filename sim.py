"""One LIBERO task in one process: built once, stepped lean, rendered light.

Stock LIBERO spends most of a control step outside physics: robosuite evaluates the controller and every observable at
each of the 25 physics substeps, runs all of `mj_forward` three times where parts of it would do, and renders 300,000
triangles into 256 pixels; an episode's end rebuilds the whole model. This file keeps the simulator's results and drops
the rest:

* `TaskSim` compiles a task once (LIBERO builds the scene, the goal predicates stay LIBERO's own).
* `Episode` is one running episode: its own `MjData` on the shared model, so that many episodes of one task share the
  compiled model, the textures and the render context. Changing an environment's task is picking another `TaskSim`.
* `Episode.step` is robosuite's OSC_POSE controller, substep for substep (`mj_step1` - torques - `mj_step2`), in one
  compiled function. qpos and qvel are those of the stock environment, bit for bit, in every suite
  (`tests/test_sim.py`); see "Equal to the last bit" below for what that takes.
* `light` rendering draws simplified copies of the meshes (quadric decimation; texture coordinates and normals come from
  the original surface), smooths edges by a picture 1.375 times as large instead of four samples per pixel, and draws
  what stands still once instead of every time. Only the renderer's copy is simplified: physics never sees it.

Sources: robosuite 1.4.0 `controllers/osc.py`, `utils/control_utils.py`, `models/grippers/panda_gripper.py`; LIBERO
`envs/bddl_base_domain.py`; measured facts in README ("Environments").
"""

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import mmap
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # headless rendering; must be set before mujoco is imported

from common import DEBIAN_PACKAGES, UserError, silence_third_party

EGL_HELP = (
    f"no EGL for off-screen rendering: on Debian or Ubuntu run `sudo apt-get install {DEBIAN_PACKAGES}` (Mesa, in "
    "software) or install the GPU's driver, and leave MUJOCO_GL unset"
)
if os.environ["MUJOCO_GL"] not in ("egl", "osmesa"):
    raise UserError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work without a display; unset it")
_MUJOCO_WAS_UNUSED = "mujoco" not in sys.modules
try:
    silence_third_party()
except ModuleNotFoundError:
    raise
except (ImportError, AttributeError, RuntimeError) as exc:  # mujoco and PyOpenGL look for OpenGL when they are imported
    raise UserError(f"{EGL_HELP} ({type(exc).__name__}: {exc})") from exc

import cv2
import fast_simplification
import mujoco
import numba
import numpy as np
from libero.libero import benchmark, get_libero_path
from libero.libero.envs.env_wrapper import ControlEnv
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error, set_goal_orientation
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

# Policy steps per episode in LIBERO's evaluation protocol (control steps at 20 Hz, the 10 settling steps not counted).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = tuple(MAX_STEPS)
SETTLE_STEPS = 10  # no-op steps after placing the objects, so that they come to rest
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])  # policy convention: gripper 1 = open
CONTROL_FREQ = 20  # Hz
SUBSTEPS = 25  # 500 Hz physics at 20 Hz control
CAMERA = "agentview"

# OSC_POSE constants of robosuite's default configuration (controllers/config/osc_pose.json).
OUTPUT_MAX = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])  # an action of 1.0 moves the goal 5 cm or 0.5 rad
KP = 150.0
KD = 2.0 * np.sqrt(KP)  # critically damped
GRIPPER_SPEED = 0.01  # per substep, in normalised finger position

_FULL_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


def base_suite(suite):
    """The original suite behind a LIBERO-PRO perturbation (`libero_object_swap` -> `libero_object`)."""
    for name in SUITES:
        if suite == name or suite.startswith(name + "_"):
            return name
    raise UserError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)} (or a LIBERO-PRO variant of one)")


def max_steps(suite):
    """Step limit of the suite's evaluation protocol, in control steps."""
    return MAX_STEPS[base_suite(suite)]


def get_suite(suite):
    """LIBERO's benchmark object for a suite name; UserError for an unknown one."""
    base_suite(suite)
    try:
        return benchmark.get_benchmark(suite)()
    except (KeyError, AttributeError):
        known = sorted(benchmark.get_benchmark_dict()) if hasattr(benchmark, "get_benchmark_dict") else list(SUITES)
        raise UserError(f"unknown suite {suite!r}: choose one of {', '.join(known)}") from None


def num_tasks(suite):
    return get_suite(suite).n_tasks


def instructions(suite):
    """The language instruction of every task of a suite, in task order."""
    bench = get_suite(suite)
    return [bench.get_task(i).language for i in range(bench.n_tasks)]


def check_task_ids(suite, task_ids):
    """Return `task_ids` (all tasks when None) or raise UserError naming the valid range."""
    n = num_tasks(suite)
    task_ids = list(range(n)) if task_ids is None else list(task_ids)
    bad = [t for t in task_ids if not 0 <= t < n]
    if bad or not task_ids:
        raise UserError(f"task id {bad[0] if bad else '(none)'} is not in {suite}: valid ids are 0 to {n - 1}")
    if len(set(task_ids)) < len(task_ids):
        raise UserError(f"task ids {','.join(map(str, task_ids))}: name each task once")
    return task_ids


# --------------------------------------------------------------------------------------------------------------------
# The controller: OSC_POSE as one compiled function
# --------------------------------------------------------------------------------------------------------------------


# Equal to the last bit. Contact is chaotic: a difference of 1e-14 was seen to become one of 4e-8 within a control step
# (a finger that strikes a can), so "equal within 1e-9 after 100 steps" can only be had by being equal exactly:
# 1. The same floating-point operations in the same order. `_osc_control` repeats robosuite's, and its memory layouts:
#    robosuite's index lists (`jacp[:, [0, ..., 6]]`) make column-major arrays, for which BLAS sums in another order.
# 2. The same history of the contact solver. It iterates from its last solution (`qacc_warmstart`) and stops within a
#    tolerance, so each solve leaves a trace. robosuite solves three times per substep: before the controller, again
#    when the controller measures, and in the step itself. `_stock_solves` repeats the first two, without the collision
#    detection and kinematics of a whole `mj_forward`, whose results cannot differ.


@numba.njit(cache=True)
def _osc_control(ctrl, gripper, gripper_step, finger_ctrl, finger_bias, finger_weight, jacp, jacr, mass, qpos, qvel,
                 ee_pos, ee_mat, goal_pos, goal_ori, rest_qpos, bias, torque_limit):
    """Write one substep's `ctrl`: robosuite's `OperationalSpaceController` and `PandaGripper.format_action`.

    jacp, jacr (3, nv): Jacobians of the grip site; mass (nv, nv): the whole model's inertia, of which the arm is the
    first 7 degrees of freedom; bias (nv,): gravity and Coriolis; gripper (2,): finger targets, changed in place.
    The decoupled form: forces through the position block, torques through the rotation block, and a weak pull of the
    redundant degree of freedom to the rest pose through the null space.
    """
    j_pos, j_ori = np.asfortranarray(jacp[:, :7]), np.asfortranarray(jacr[:, :7])
    arm_mass, joint_pos, joint_vel = np.asfortranarray(mass[:7, :7]), qpos[:7].copy(), qvel[:7].copy()
    force = (goal_pos - ee_pos) * KP - np.dot(jacp, qvel) * KD
    torque = orientation_error(goal_ori, ee_mat) * KP - np.dot(jacr, qvel) * KD
    j_full = np.vstack((j_pos, j_ori))
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(arm_mass, j_full, j_pos, j_ori)
    wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
    tau = np.dot(j_full.T, wrench) + bias[:7]
    tau += nullspace_torques(arm_mass, nullspace, rest_qpos, joint_pos, joint_vel)
    ctrl[:7] = np.minimum(np.maximum(tau, -torque_limit), torque_limit)
    gripper[:] = np.minimum(np.maximum(gripper + gripper_step, -1.0), 1.0)
    for j in range(2):
        ctrl[finger_ctrl[j]] = finger_bias[j] + finger_weight[j] * gripper[j]


def _stock_solves(model, data, n):
    """Solve for the accelerations of the present state `n` times, as `mj_forward` would after `mj_step1`."""
    for _ in range(n):
        mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 1)


# --------------------------------------------------------------------------------------------------------------------
# Light rendering: decimated copies of the visual meshes
# --------------------------------------------------------------------------------------------------------------------

# Three triangles for four pixels of a mesh's bounding circle on the 256 px image, and never fewer than MIN_FACES.
# Chosen by measurement: at 0.5 libero_90 loses 1.5 dB of PSNR, at 1.0 nothing is gained (README, "Environments").
FACES_PER_PIXEL = 0.75
PLAIN_FACES_PER_PIXEL = 0.3  # without texture: the robot and its mount, smooth shapes that fewer faces describe
WICKER_FACES_PER_PIXEL = 2.5  # the basket's weave is geometry; where it is large (from WICKER_PIXELS on), that shows
WICKER_PIXELS = 100
MIN_FACES = 60
# Software OpenGL spends half of a picture on LIBERO's 4 samples per pixel. A plain picture of 352 px, averaged down to 256,
# costs little more than a plain one of 256 and is 1 to 3 dB closer to `exact`.
SUPERSAMPLING = 1.375
# What stands still is drawn once and kept, with its depths; each picture draws the rest and takes, pixel by pixel, what is
# nearer. To stand still is to stay in one cell of a grid of 2^-13 (0.12 mm, 0.007 degrees) for two pictures, and in light
# pictures everything is drawn where its cell is: so a picture follows from the state alone, whichever part was kept.
POSE_GRID = 2.0**-13
STILL_PICTURES = 2
DECIMATION_AGGRESSIVENESS = 2  # fast_simplification's `agg`: lower is slower and closer to the original


def _decimate(vert, face, normal, face_normal, uv, face_uv, target):
    """Fewer triangles for one mesh, or None where it cannot be reduced.

    MuJoCo stores textured meshes unindexed (three own vertices per face), so coincident vertices are welded first.
    Quadric decimation only moves positions; each new corner then takes the normal and the texture coordinate of an
    original corner nearby, of the same connected part: a book's pages lie a millimetre under its cover. Among the
    candidates the one closest in texture space to the face's own centre wins: a texture is cut into charts, and a face
    whose corners came from two charts would show a smear.

    Returns: vertices (V, 3), faces (F, 3), corner normals (F, 3, 3), corner texture coordinates (F, 3, 2) or None.
    """
    weld, index = np.unique(np.round(vert, 7), axis=0, return_inverse=True)
    welded = index.reshape(-1)[face]
    solid = (welded[:, 0] != welded[:, 1]) & (welded[:, 1] != welded[:, 2]) & (welded[:, 0] != welded[:, 2])
    if solid.sum() <= target:
        return None
    points, triangles = weld.astype(np.float32), welded[solid].astype(np.int32)
    new_vert, new_face, collapses = fast_simplification.simplify(
        points, triangles, target_count=int(target), agg=DECIMATION_AGGRESSIVENESS, return_collapses=True
    )
    if len(new_face) == 0 or len(new_face) >= len(face) or len(new_vert) > len(vert):
        return None

    def unit_normals(corners):  # (F, 3, 3) -> (F, 3)
        n = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        return n / (np.linalg.norm(n, axis=1, keepdims=True) + 1e-12)

    edges = coo_array((np.ones(2 * len(triangles)), triangles[:, [0, 1, 1, 2]].reshape(-1, 2).T), shape=2 * [len(weld)])
    part, new_part = connected_components(edges, directed=False)[1], np.zeros(len(new_vert))
    new_part[fast_simplification.replay_simplification(points, triangles, collapses)[2]] = part  # old vertex -> new one
    old, new = vert[face[solid]], new_vert[new_face]
    old_n, new_n = unit_normals(old), unit_normals(new)
    scale = np.ptp(vert, axis=0).max()
    # Nearest original face in position and orientation (0.1 * scale weighs 60 degrees like a tenth of the size), and
    # other parts are far away.
    facing, apart = 0.1 * scale, 10.0 * scale * part[:, None]
    new_apart = 10.0 * scale * new_part[:, None]
    old_faces = np.hstack([old.mean(1), old_n * facing, apart[triangles[:, 0]]])
    _, near = cKDTree(old_faces).query(np.hstack([new.mean(1), new_n * facing, new_apart[new_face[:, 0]]]))
    old_corners = np.hstack([old.reshape(-1, 3), apart[triangles.reshape(-1)]])
    dist, candidates = cKDTree(old_corners).query(np.hstack([new_vert, new_apart]), k=min(24, len(old_corners)))
    rows = np.arange(len(new_face))
    corner_normal = normal[face_normal[solid]].reshape(-1, 3)
    out_normal = np.empty((len(new_face), 3, 3), np.float32)
    out_uv = None
    if uv is not None:
        corner_uv = uv[face_uv[solid]].reshape(-1, 2)
        anchor = uv[face_uv[solid]][near].mean(1)
        out_uv = np.empty((len(new_face), 3, 2), np.float32)
    for j in range(3):
        cand, far = candidates[new_face[:, j]], 4.0 * dist[new_face[:, j]] / scale
        facing = 0.5 * (1.0 - (corner_normal[cand] * new_n[:, None]).sum(2))
        out_normal[:, j] = corner_normal[cand[rows, (facing + far).argmin(1)]]
        if uv is not None:
            jump = np.linalg.norm(corner_uv[cand] - anchor[:, None], axis=2)
            out_uv[:, j] = corner_uv[cand[rows, (jump + far).argmin(1)]]
    return new_vert, new_face, out_normal, out_uv


def _write_mesh(model, i, vert, face, normal, uv):
    """Overwrite mesh `i` of a render-only model copy with a smaller mesh. Returns False where it does not fit.

    Corners share normals and texture coordinates where the original's did: those are all the original's, so the distinct
    ones always fit into its place.
    """
    n = len(face)
    if len(vert) > model.mesh_vertnum[i]:
        return False
    va, fa = model.mesh_vertadr[i], model.mesh_faceadr[i]
    model.mesh_vert[va : va + len(vert)] = vert
    model.mesh_face[fa : fa + n] = face
    for values, start, array, index in (
        (normal, model.mesh_normaladr[i], model.mesh_normal, model.mesh_facenormal),
        (uv, model.mesh_texcoordadr[i], model.mesh_texcoord, model.mesh_facetexcoord),
    ):
        if values is not None:
            distinct, corners = np.unique(values.reshape(3 * n, -1), axis=0, return_inverse=True)
            array[start : start + len(distinct)] = distinct
            index[fa : fa + n] = corners.reshape(n, 3)
    model.mesh_facenum[i] = n
    return True


def _cache_dir():
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "vla_rl" / "meshes"


def _cache_version():
    """Everything that the simplified meshes depend on besides the mesh itself."""
    names = ("mujoco", "fast-simplification", "numpy", "scipy")
    found = []
    for name in names:
        try:
            found.append(f"{name}={version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return ";".join(found) + f";{MIN_FACES};{DECIMATION_AGGRESSIVENESS};by part"


def _decimate_cached(key, arrays, target):
    """`_decimate` with a disk cache; an unreadable or unwritable cache only costs the time of computing again."""
    digest = hashlib.sha256(key.encode())
    for a in arrays:
        digest.update(b"-" if a is None else np.ascontiguousarray(a).tobytes())
    digest.update(str(int(target)).encode())
    path = _cache_dir() / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as z:
            if "face" not in z:
                return None
            return z["vert"], z["face"], z["normal"], z["uv"] if "uv" in z else None
    except Exception:  # absent, or damaged: numpy and zipfile then raise nearly every kind
        pass
    result = _decimate(*arrays, target)
    fields = {}
    if result is not None:
        fields = dict(vert=result[0], face=result[1], normal=result[2])
        if result[3] is not None:
            fields["uv"] = result[3]
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(temporary, **fields)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return result


def _shrink_textures(model, limit):
    """Halve a render-only model copy's textures until no side exceeds `limit` pixels, averaging 2 x 2 blocks.

    LIBERO ships 4096 px textures for objects that cover 50 pixels of the image; the renderer's own mipmaps would
    average them down anyway. It saves memory: the renderer holds 47 MB for a task instead of 172. Cube maps shrink like
    the others: their six faces are stacked, and no 2 x 2 block reaches across an edge.
    """
    for i in range(model.ntex):
        height, width, channels = model.tex_height[i], model.tex_width[i], model.tex_nchannel[i]
        start = model.tex_adr[i]
        image = model.tex_data[start : start + height * width * channels].reshape(height, width, channels)
        while max(height, width) > limit and height % 2 == 0 and width % 2 == 0:
            blocks = image.reshape(height // 2, 2, width // 2, 2, channels)
            image = ((blocks.astype(np.uint16).sum((1, 3)) + 2) // 4).astype(np.uint8)
            height, width = height // 2, width // 2
        if width != model.tex_width[i]:
            model.tex_data[start : start + image.size] = image.reshape(-1)
            model.tex_height[i], model.tex_width[i] = height, width


def light_model(model, data, image_size=256):
    """A copy of `model` for the renderer, with every mesh reduced to what `image_size` pixels can show.

    A mesh's budget follows from its size on screen: the projected diameter of its bounding sphere at its distance.
    """
    light = copy.copy(model)
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
    focal = 0.5 * image_size / np.tan(0.5 * np.deg2rad(model.cam_fovy[camera]))  # pixels
    diameter = np.zeros(model.nmesh)
    for g in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH):
        if model.geom_group[g] == 1:  # group 1 is what robosuite draws; group 0 is collision geometry
            distance = np.linalg.norm(data.geom_xpos[g] - data.cam_xpos[camera])
            i = model.geom_dataid[g]
            diameter[i] = max(diameter[i], 2.0 * model.geom_rbound[g] * focal / distance)
    key = _cache_version()
    for i in range(model.nmesh):
        if diameter[i] == 0.0:
            light.mesh_facenum[i] = 0  # never drawn: nothing to upload
            continue
        per_pixel = FACES_PER_PIXEL if model.mesh_texcoordadr[i] >= 0 else PLAIN_FACES_PER_PIXEL
        if diameter[i] >= WICKER_PIXELS and "basket_vis" in model.mesh(i).name:
            per_pixel = WICKER_FACES_PER_PIXEL
        target = max(MIN_FACES, int(per_pixel * np.pi / 4 * diameter[i] ** 2))
        if model.mesh_facenum[i] <= target:
            continue
        v = slice(model.mesh_vertadr[i], model.mesh_vertadr[i] + model.mesh_vertnum[i])
        f = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
        n = slice(model.mesh_normaladr[i], model.mesh_normaladr[i] + model.mesh_normalnum[i])
        textured = model.mesh_texcoordadr[i] >= 0
        t = slice(model.mesh_texcoordadr[i], model.mesh_texcoordadr[i] + model.mesh_texcoordnum[i])
        arrays = (
            model.mesh_vert[v], model.mesh_face[f], model.mesh_normal[n], model.mesh_facenormal[f],
            model.mesh_texcoord[t] if textured else None, model.mesh_facetexcoord[f] if textured else None,
        )
        result = _decimate_cached(key, arrays, target)
        if result is not None:
            _write_mesh(light, i, *result)
    _shrink_textures(light, 2 * image_size)
    return light


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------

(_LIBMUJOCO,) = Path(mujoco.__file__).parent.glob("libmujoco.*")
_LIBMUJOCO, _LIBC = ctypes.CDLL(str(_LIBMUJOCO)), ctypes.CDLL(None)  # for what has no Python binding

if _MUJOCO_WAS_UNUSED:
    # MuJoCo keeps up to 500 MB of decoded meshes and textures in case that a later model wants them. Without them a
    # task compiles in 2.2 s instead of 0.5 s. It must be switched off before the first model: 3.3.2 crashes when a
    # cache that has been used shrinks.
    _LIBMUJOCO.mj_globalCache.restype = ctypes.c_void_p
    _LIBMUJOCO.mj_setCacheSize.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _LIBMUJOCO.mj_setCacheSize(_LIBMUJOCO.mj_globalCache(), 0)


def _free_build_memory():
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


def _release_visual_data(model):
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
            (model.mesh_polyadr[i], model.mesh_polynum[i], "mesh_polynormal mesh_polyvertadr mesh_polyvertnum"),
            (model.mesh_bvhadr[i], model.mesh_bvhnum[i], "bvh_aabb bvh_child bvh_depth bvh_nodeid"),
        ):
            for name in names.split() if start >= 0 else ():
                _release_pages(getattr(model, name)[start : start + count])


# --------------------------------------------------------------------------------------------------------------------
# Rendering context
# --------------------------------------------------------------------------------------------------------------------

_GL = None  # one OpenGL context per process; every TaskSim's MjrContext lives in it


def _gl_context():
    global _GL
    if _GL is None:
        mujoco.GLContext._context = None  # its __del__ reads this, also where __init__ failed
        try:
            _GL = mujoco.GLContext(640, 480)
        except Exception as exc:  # PyOpenGL raises ImportError, AttributeError or its own EGLError, by what is missing
            raise UserError(f"{EGL_HELP} ({type(exc).__name__}: {exc})") from exc
    _GL.make_current()
    return _GL


def check_egl():
    """Raise UserError, with the Debian packages to install, where off-screen rendering does not work."""
    _gl_context()


def num_egl_devices():
    """How many devices EGL can render on here; 0 without EGL. `MUJOCO_EGL_DEVICE_ID` counts them."""
    from mujoco.egl import egl_ext

    try:
        return len(egl_ext.eglQueryDevicesEXT())
    except Exception:  # PyOpenGL raises several kinds where the library or the extension is missing
        return 0


def default_render():
    """"exact" where a GPU renders, "light" where the processor does it (Mesa's llvmpipe or softpipe)."""
    from OpenGL.GL import GL_RENDERER, glGetString

    _gl_context()
    renderer = (glGetString(GL_RENDERER) or b"").decode(errors="replace").lower()
    return "light" if any(name in renderer for name in ("llvmpipe", "softpipe", "swrast", "swr")) else "exact"


# --------------------------------------------------------------------------------------------------------------------
# A task and its episodes
# --------------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _take_nearer(pixels, depth, other_pixels, other_depth):
    """Overwrite `pixels` (H, W, 3) with `other_pixels` where that picture's depth (0 far ... 1 near) is not smaller."""
    for y in range(len(depth)):
        for x in range(depth.shape[1]):
            if other_depth[y, x] >= depth[y, x]:
                for c in range(3):
                    pixels[y, x, c] = other_pixels[y, x, c]


@dataclasses.dataclass
class _Kept:
    """What stands still in an episode's pictures, and the picture of that (see POSE_GRID). Only saves time: no state."""

    cells: np.ndarray = None  # (G, 12) of all visual geoms in the last picture
    still: np.ndarray = None  # (G,) for how many pictures they have not changed
    resting: np.ndarray = None  # (G,) bool, what `pixels` (H, W, 3) shows, and in which cells
    resting_cells: np.ndarray = None
    pixels: np.ndarray = None
    depth: np.ndarray = None


class TaskSim:
    """One LIBERO task, compiled: model, goal predicates, render context. Costs 2 to 5 s and about 0.1 GB.

    Args:
        suite: a LIBERO suite name. task_id: index into it.
        render: "light" (simplified meshes), "exact" (stock LIBERO's picture), or "none" (no render context at all).
        resolution: image side in pixels.
    Raises: UserError for an unknown suite or task id, or where EGL is missing.
    """

    def __init__(self, suite, task_id, render="light", resolution=256):
        if render not in ("light", "exact", "none"):
            raise UserError(f"unknown render mode {render!r}: choose light, exact or none")
        check_task_ids(suite, [task_id])
        bench = get_suite(suite)
        task = bench.get_task(task_id)
        self.suite, self.task_id, self.render_mode, self.resolution = suite, task_id, render, resolution
        self.name, self.instruction = task.name, task.language
        self.init_states = np.asarray(bench.get_task_init_states(task_id))
        self.num_init_states = len(self.init_states)
        if render != "none":
            _gl_context()
        bddl = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        self.env = ControlEnv(bddl_file_name=str(bddl), has_offscreen_renderer=False, use_camera_obs=False)
        self.env.env.hard_reset = False  # a reset moves objects; it need not compile the same model again
        # A stock reset loads the task a second time, and LIBERO then lists each articulated fixture (a drawer that
        # starts open) twice and draws its joint twice. Without the same draws, what is placed next lands elsewhere.
        self.env.env.object_property_initializers *= 2
        self._stock_reset(seed=0)
        self.model = self.env.sim.model._model
        robot = self.env.env.robots[0]
        self.site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, robot.controller.eef_name)
        assert list(robot.controller.qvel_index) == list(range(7)) == list(robot._ref_joint_actuator_indexes)
        self.finger_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        self.finger_ctrl = np.array([self.env.sim.model.actuator_name2id(a) for a in robot.gripper.actuators])
        low, high = self.model.actuator_ctrlrange[self.finger_ctrl].T
        self.finger_bias, self.finger_weight = 0.5 * (high + low), 0.5 * (high - low)
        self.torque_limit = np.array(robot.torque_limits[1])
        # What every episode starts from: the controller as robosuite leaves it after a reset, and the fixtures as
        # `seed(0); reset()` places them. Fixtures are not part of a stored initial state: this is LIBERO's seed trap.
        self.rest_qpos = np.array(robot.controller.initial_joint)
        c = robot.controller
        self.initial_goal = (np.array(c.goal_pos), np.array(c.goal_ori))
        # robosuite computes an episode's first torque (one substep of 2 ms) from the pose of the reset, not from the
        # initial state set after it. Results equal to the stock environment's need the same stale measurement, here as
        # `_osc_control` takes it: jacp, jacr, mass, qpos, qvel (at rest), ee_pos, ee_mat.
        nv = self.model.nv
        shapes = ((3, nv), (3, nv), (nv, nv), (self.model.nq,), (nv,), (3,), (3, 3))
        arm = (c.J_pos, c.J_ori, c.mass_matrix, c.joint_pos, c.joint_vel, c.ee_pos, c.ee_ori_mat)
        self.reset_measurement = tuple(np.zeros(shape) for shape in shapes)
        for whole, part in zip(self.reset_measurement, arm, strict=True):
            whole[tuple(slice(size) for size in part.shape)] = part
        self.reset_warmstart = self.env.sim.data._data.qacc_warmstart.copy()  # the solver's guess after that reset
        self.protocol_bodies = (self.model.body_pos.copy(), self.model.body_quat.copy())
        self.moved_bodies = np.array(
            [self.env.sim.model.body_name2id(f.root_body) for f in self.env.env.fixtures], dtype=int
        )
        self.objects = dict(self.env.env.obj_body_id)  # name -> body id, fixtures included
        _free_build_memory()  # here too, because the renderer's copy of the model comes next: the peak is 0.4 GB lower
        self._render_setup()
        _release_visual_data(self.model)
        _free_build_memory()
        self._jacp, self._jacr, self._mass = np.zeros((3, nv)), np.zeros((3, nv)), np.zeros((nv, nv))

    def _stock_reset(self, seed):
        """What the stock protocol's `seed(seed); reset()` does, without compiling the model a second time.

        A stock reset makes a new simulation, in which the fixtures stand where the XML has them, and runs `mj_forward` on
        it twice (robosuite's `_initialize_sim` and its render context). Both matter. LIBERO places a bowl on a stove by
        where the stove's sites are at that moment, so a stove that still stood where the last reset moved it would count
        twice, and the bowl fall to the floor. And the two passes leave the contact solver a warm start, without which an
        object that touches something settles 1e-7 m elsewhere.
        """
        sim = self.env.sim
        for fixture in self.env.env.fixtures:
            body, xml = sim.model.body_name2id(fixture.root_body), fixture.get_obj()
            sim.model.body_pos[body] = np.array(xml.get("pos", "0 0 0").split(), float)
            sim.model.body_quat[body] = np.array(xml.get("quat", "1 0 0 0").split(), float)
        soft = sim.reset
        sim.reset = lambda: (soft(), sim.forward(), sim.forward())
        saved = np.random.get_state()  # LIBERO draws placements from numpy's global generator
        try:
            self.env.seed(seed)
            self.env.reset()
        finally:
            np.random.set_state(saved)
            del sim.reset

    def _render_setup(self):
        self._context = None
        if self.render_mode == "none":
            return
        data = self.env.sim.data._data
        light = self.render_mode == "light"
        model = light_model(self.model, data, self.resolution) if light else copy.copy(self.model)
        size = round(SUPERSAMPLING * self.resolution) if light else self.resolution
        if light:
            model.vis.quality.offsamples = 0
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0  # spare the 64 MB shadow map that nothing would draw
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        self._scene = mujoco.MjvScene(self.model, maxgeom=1000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision geometry stays invisible, as in robosuite
        self._options.geomgroup[1] = 1
        self._perturb = mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._pixels, self._depth = np.empty((size, size, 3), np.uint8), np.empty((size, size), np.float32)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # as OpenGL has it: far 0, near 1

        # A sky that walls hide costs a tenth of a picture. The camera and the walls do not move, so one look is enough.
        _GL.make_current()
        skybox = mujoco.mjtRndFlag.mjRND_SKYBOX
        with_sky = self._draw(data).copy()
        self._scene.flags[skybox] = 0
        self._sky = int((self._draw(data) != with_sky).any())

        m = self.model
        self._visual = np.flatnonzero(m.geom_group == 1)
        arm = m.body_rootid == m.body_rootid[m.site_bodyid[self.site]]
        self._movers = (arm & (m.body_weldid != 0))[m.geom_bodyid[self._visual]]  # what will not stand still
        material = m.geom_matid[self._visual]
        self._glass = (m.geom_rgba[self._visual, 3] < 1.0) | ((material >= 0) & (m.mat_rgba[material, 3] < 1.0))

    def _draw(self, data, sky=None, depth=None):
        """Render `data` into `_pixels`, and its depths into `depth`: rows bottom-up. The GL context must be current."""
        if sky is not None:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = sky
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self._options, self._perturb, self._camera, everything, self._scene)
        # robosuite hides its gripper sites by a negative opacity; software OpenGL would still blend nothing into the
        # picture, for 0.4 ms each. Sites come last in a scene.
        while self._scene.ngeom and self._scene.geoms[self._scene.ngeom - 1].rgba[3] <= 0.0:
            self._scene.ngeom -= 1
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, depth, self._viewport, self._context)
        return self._pixels

    def draw(self, data, kept):
        """The agentview picture of `data`, (resolution, resolution, 3) uint8, upright. The GL context must be current.

        kept: the episode's `_Kept`, what its last picture leaves for this one. A mirror (the plate of LIBERO's stove) shows
        what is drawn in one go with it: in light pictures, what stands still.
        """
        if self.render_mode == "exact":
            return self._draw(data, self._sky)[::-1, ::-1].copy()
        position, rotation = data.geom_xpos[self._visual], data.geom_xmat[self._visual]
        cells = np.rint(np.hstack((position, rotation)) / POSE_GRID)
        if kept.cells is None:
            kept.still = np.where(self._movers, 0, STILL_PICTURES)
        else:
            kept.still = np.where((cells == kept.cells).all(1), kept.still + 1, 0)
        kept.cells = cells
        resting = kept.still >= STILL_PICTURES
        if not resting[self._glass].all():
            resting[:] = True  # glass needs what is behind it: everything in one go
        model, options, group = self.model, self._options, self.model.geom_group
        data.geom_xpos[self._visual], data.geom_xmat[self._visual] = POSE_GRID * cells[:, :3], POSE_GRID * cells[:, 3:]
        if not (np.array_equal(resting, kept.resting) and np.array_equal(cells[resting], kept.resting_cells)):
            kept.resting, kept.resting_cells = resting, cells[resting]
            group[self._visual] = np.where(resting, 1, 5)  # MuJoCo does not draw group 5
            options.sitegroup[:], sites = 0, options.sitegroup.copy()  # a stove's flame comes and goes
            kept.depth = np.empty_like(self._depth)
            kept.pixels = self._draw(data, self._sky, kept.depth).copy()
            options.sitegroup[:] = sites
        group[self._visual] = np.where(resting, 5, 1)
        self._draw(data, 0, self._depth)
        group[self._visual] = 1
        data.geom_xpos[self._visual], data.geom_xmat[self._visual] = position, rotation
        _take_nearer(self._pixels, self._depth, kept.pixels, kept.depth)
        small = cv2.resize(self._pixels, (self.resolution, self.resolution), interpolation=cv2.INTER_AREA)
        # OpenGL's rows run bottom-up; LIBERO keeps that ("upside down"), and OpenVLA rotates by 180 degrees.
        return small[::-1, ::-1].copy()

    def episode(self):
        """A new `Episode` of this task. Call its `reset` first."""
        return Episode(self)

    def close(self):
        """Free the render context and LIBERO's environment. The process's OpenGL context stays."""
        if self._context is not None:
            self._context.free()
            self._context = None
        if self.env is not None:
            self.env.close()
            self.env = None


class Episode:
    """One running episode: own `MjData`, controller goal and gripper on a shared `TaskSim`."""

    def __init__(self, sim):
        self.sim = sim
        self.data = mujoco.MjData(sim.model)
        self.goal_pos, self.goal_ori = (g.copy() for g in sim.initial_goal)
        self.gripper = np.zeros(2)  # normalised finger targets, ramped by GRIPPER_SPEED per substep
        self.first = True  # the next substep is the episode's first
        self._kept = _Kept()
        d = self.data  # as `_osc_control` takes them; MuJoCo never moves these arrays
        site = (d.site_xpos[sim.site], d.site_xmat[sim.site].reshape(3, 3))
        self._measurement = (sim._jacp, sim._jacr, sim._mass, d.qpos, d.qvel, *site)
        self.body_pos, self.body_quat = (b[sim.moved_bodies] for b in sim.protocol_bodies)

    def _activate(self):
        """Make this episode the one that LIBERO's predicates and the shared model see."""
        sim = self.sim
        sim.env.sim.data._data = self.data
        if len(sim.moved_bodies):  # fixtures live in the model, not in the state
            sim.model.body_pos[sim.moved_bodies] = self.body_pos
            sim.model.body_quat[sim.moved_bodies] = self.body_quat

    def reset(self, init_state=None, rng=None):
        """Start again: LIBERO's initial state `init_state` (0 to 49), or a random placement, then 10 settling steps.

        A random placement is LIBERO's own: what `env.reset()` draws, from a seed that `rng` (numpy Generator) gives.
        """
        sim, m, d = self.sim, self.sim.model, self.data
        self.goal_pos, self.goal_ori = (g.copy() for g in sim.initial_goal)
        self.gripper[:] = 0.0
        self.first, self._kept = True, _Kept()
        if init_state is None:
            if rng is None:
                raise ValueError("a random placement needs an rng")
            sim.env.sim.data._data = d
            sim._stock_reset(seed=int(rng.integers(2**31)))
            self.body_pos, self.body_quat = m.body_pos[sim.moved_bodies], m.body_quat[sim.moved_bodies]
        else:
            if not 0 <= init_state < sim.num_init_states:
                where = f"{sim.suite} task {sim.task_id}"
                raise UserError(f"no initial state {init_state} in {where}: valid are 0 to {sim.num_init_states - 1}")
            self.body_pos, self.body_quat = (b[sim.moved_bodies] for b in sim.protocol_bodies)
            self._activate()
            mujoco.mj_resetData(m, d)
            state = sim.init_states[init_state]
            d.time = state[0]
            d.qpos[:] = state[1 : 1 + m.nq]
            d.qvel[:] = state[1 + m.nq : 1 + m.nq + m.nv]
            d.qacc_warmstart[:] = sim.reset_warmstart
        mujoco.mj_forward(m, d)
        for _ in range(SETTLE_STEPS):
            self.step(NO_OP)

    def step(self, action):
        """One control step (0.05 s). action (7,) in policy convention, clipped to [-1, 1]; returns success (bool)."""
        sim, m, d = self.sim, self.sim.model, self.data
        self._activate()
        delta = np.clip(action[:6], -1.0, 1.0) * OUTPUT_MAX
        # OpenVLA's gripper is 0 = close, 1 = open; LIBERO's is +1 = close, -1 = open (binarised, then sign flipped).
        closing = 1.0 if action[6] < 0.5 else -1.0
        gripper_step = np.array([-GRIPPER_SPEED, GRIPPER_SPEED]) * closing
        for k in range(SUBSTEPS):
            mujoco.mj_step1(m, d)
            _stock_solves(m, d, 1 if self.first else 2)
            mujoco.mj_jacSite(m, d, sim._jacp, sim._jacr, sim.site)
            mujoco.mj_fullM(m, sim._mass, d.qM)
            measurement = sim.reset_measurement if self.first else self._measurement
            self.first = False
            if k == 0:  # a new goal, relative to where the gripper is now
                ee_pos, ee_mat = measurement[-2:]
                if np.any(np.abs(delta[3:]) > 0.0):  # a zero rotation keeps the old goal: robosuite's rule
                    self.goal_ori = set_goal_orientation(delta[3:], ee_mat)
                self.goal_pos = ee_pos + delta[:3]
            _osc_control(
                d.ctrl, self.gripper, gripper_step, sim.finger_ctrl, sim.finger_bias, sim.finger_weight, *measurement,
                self.goal_pos, self.goal_ori, sim.rest_qpos, d.qfrc_bias, sim.torque_limit,
            )
            mujoco.mj_step2(m, d)
        return bool(sim.env.check_success())

    def render(self):
        """The agentview image, (resolution, resolution, 3) uint8, rotated by 180 degrees: upright, for OpenVLA."""
        sim = self.sim
        if sim._context is None:
            raise ValueError("this TaskSim was built with render='none'")
        self._activate()
        if sim.env.env.tracking_object_states_change:
            sim.env.env._post_process()  # e.g. a stove's flame, which is a site that switches on and off
        _GL.make_current()  # somebody else's context may be current, e.g. a stock environment in the same process
        return sim.draw(self.data, self._kept)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self):
        """Everything that the future depends on, one float64 vector: MuJoCo integration state, controller, fixtures."""
        state = np.empty(mujoco.mj_stateSize(self.sim.model, _FULL_STATE))
        mujoco.mj_getState(self.sim.model, self.data, state, _FULL_STATE)
        parts = (state, self.goal_pos, self.goal_ori, self.gripper, self.first, self.body_pos, self.body_quat)
        return np.concatenate([np.ravel(p) for p in parts])

    def set_state(self, state):
        """Inverse of `get_state`; derived quantities are recomputed. Raises ValueError for another model's state."""
        n, f = mujoco.mj_stateSize(self.sim.model, _FULL_STATE), len(self.sim.moved_bodies)
        sizes = np.cumsum([n, 3, 9, 2, 1, 3 * f, 4 * f])
        if len(state) != sizes[-1]:
            raise ValueError(f"state of {len(state)} numbers where this task has {sizes[-1]}")
        full, self.goal_pos, ori, self.gripper, first, pos, quat = (p.copy() for p in np.split(state, sizes[:-1]))
        self.first = bool(first[0])
        self.goal_ori, self.body_pos, self.body_quat = ori.reshape(3, 3), pos.reshape(f, 3), quat.reshape(f, 4)
        self._activate()
        mujoco.mj_setState(self.sim.model, self.data, full, _FULL_STATE)
        # mj_forward would overwrite the solver's warm start, which is part of the state: restore it afterwards.
        warm = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.sim.model, self.data)
        self.data.qacc_warmstart[:] = warm

    def privileged(self):
        """What the simulator knows and the policy does not: for scripted experts, labels and progress measures.

        Returns a dict: eef_pos (3,) m; eef_mat (3, 3); eef_vel (3,) m/s; gripper_qpos (2,) m; joint_pos (7,) rad;
        objects: name -> (pos (3,), quat (4,) wxyz).
        """
        sim, m, d = self.sim, self.sim.model, self.data
        mujoco.mj_jacSite(m, d, sim._jacp, sim._jacr, sim.site)
        return dict(
            eef_pos=d.site_xpos[sim.site].copy(), eef_mat=d.site_xmat[sim.site].reshape(3, 3).copy(),
            eef_vel=sim._jacp @ d.qvel, gripper_qpos=d.qpos[sim.finger_qpos].copy(), joint_pos=d.qpos[:7].copy(),
            objects={name: (d.xpos[b].copy(), d.xquat[b].copy()) for name, b in sim.objects.items()},
        )
