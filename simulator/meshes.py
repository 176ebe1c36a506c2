"""Light meshes: copies of a model's meshes and textures with only what the image can show. Physics never sees them.

LIBERO's scenes have 300,000 to 500,000 triangles, and software OpenGL's time goes into triangles, not into pixels. Each mesh
gets a budget of triangles by its size on the 256 px image; quadric decimation gets it there, and normals and texture coordinates
come from the original surface.
"""

import contextlib
import copy
import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fast_simplification
import mujoco
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from simulator.render import CAMERA

# Three triangles for four pixels of a mesh's bounding circle on the 256 px image, and never fewer than MIN_FACES.
# Chosen by measurement: at 0.5 libero_90 loses 1.5 dB of PSNR, at 1.0 nothing is gained (docs/simulator.md).
FACES_PER_PIXEL = 0.75
PLAIN_FACES_PER_PIXEL = (
    0.3  # without texture: the robot and its mount, smooth shapes that fewer faces describe
)
WICKER_FACES_PER_PIXEL = (
    2.5  # the basket's weave is geometry; where it is large (from WICKER_PIXELS on), that shows
)
WICKER_PIXELS = 100
MIN_FACES = 60
DECIMATION_AGGRESSIVENESS = 2  # fast_simplification's `agg`: lower is slower and closer to the original


def decimate(vert, face, normal, face_normal, uv, face_uv, target):
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

    edges = coo_array(
        (np.ones(2 * len(triangles)), triangles[:, [0, 1, 1, 2]].reshape(-1, 2).T), shape=2 * [len(weld)]
    )
    part, new_part = connected_components(edges, directed=False)[1], np.zeros(len(new_vert))
    new_part[fast_simplification.replay_simplification(points, triangles, collapses)[2]] = (
        part  # old vertex -> new one
    )
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
    dist, candidates = cKDTree(old_corners).query(
        np.hstack([new_vert, new_apart]), k=min(24, len(old_corners))
    )
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


def decimate_cached(key, arrays, target):
    """`decimate` with a disk cache; an unreadable or unwritable cache only costs the time of computing again."""
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
    result = decimate(*arrays, target)
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


def shrink_textures(model, limit):
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
            model.mesh_vert[v],
            model.mesh_face[f],
            model.mesh_normal[n],
            model.mesh_facenormal[f],
            model.mesh_texcoord[t] if textured else None,
            model.mesh_facetexcoord[f] if textured else None,
        )
        result = decimate_cached(key, arrays, target)
        if result is not None:
            _write_mesh(light, i, *result)
    shrink_textures(light, 2 * image_size)
    return light
