"""Light meshes: copies of a model's meshes and textures with only what the image can show. Physics never sees them.

LIBERO's scenes have 300,000 to 500,000 triangles, and software OpenGL's time goes into triangles, not into pixels. Each mesh
gets a budget of triangles by its size on the 256 px image; quadric decimation gets it there, and normals and texture coordinates
come from the original surface.
"""

import contextlib
import hashlib
import inspect
import os
from importlib.metadata import PackageNotFoundError, version

import cv2
import fast_simplification
import mujoco
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from simulator.compact import model_to_draw
from simulator.render import CAMERA, VISIBLE
from support.machine import cache_dir

# Three triangles for four pixels of a mesh's bounding circle on the 256 px image, and never fewer than MIN_FACES.
# Chosen by measurement: at 0.5 libero_90 loses 1.5 dB of PSNR, at 1.0 nothing is gained.
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


def versions(*names):
    """Names and versions of packages, as one line: part of a cache's key."""
    found = []
    for name in names:
        try:
            found.append(f"{name}={version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return ";".join(found)


def _cache_version():
    """Everything that the simplified meshes depend on besides the mesh itself."""
    known = versions("mujoco", "fast-simplification", "numpy", "scipy")
    return f"{known};{DECIMATION_AGGRESSIVENESS};{inspect.getsource(decimate)}"


def decimate_cached(key, arrays, target):
    """`decimate` with a disk cache; an unreadable or unwritable cache only costs the time of computing again."""
    digest = hashlib.sha256(key.encode())
    for a in arrays:
        digest.update(b"-" if a is None else np.ascontiguousarray(a).tobytes())
    digest.update(str(int(target)).encode())
    path = cache_dir() / "meshes" / f"{digest.hexdigest()[:32]}.npz"
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


def shrunk(image, limit):
    """A texture (H, W, channels) uint8, halved until no side exceeds `limit` pixels, by averages of 2 x 2 blocks.

    LIBERO ships 4096 px textures for objects that cover 50 pixels of the image; the renderer's own mipmaps would average them
    down anyway. Cube maps shrink like the others: their six faces are stacked, and no 2 x 2 block reaches across an edge.
    """
    while max(image.shape[:2]) > limit and image.shape[0] % 2 == image.shape[1] % 2 == 0:
        size = image.shape[1] // 2, image.shape[0] // 2
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
    return image


def _face_budgets(model, data, image_size):
    """How many triangles each mesh may have, (nmesh,) int; 0 for one that is never drawn.

    It follows from the mesh's size on screen: the projected diameter of its bounding sphere at its distance.
    """
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
    focal = 0.5 * image_size / np.tan(0.5 * np.deg2rad(model.cam_fovy[camera]))  # pixels
    budgets = np.zeros(model.nmesh, int)
    for g in np.flatnonzero((model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) & (model.geom_group == VISIBLE)):
        i, distance = model.geom_dataid[g], np.linalg.norm(data.geom_xpos[g] - data.cam_xpos[camera])
        diameter = 2.0 * model.geom_rbound[g] * focal / distance
        # The arm's meshes have texture coordinates and a material without texture: only a texture that is drawn counts.
        material = model.geom_matid[g]
        textured = material >= 0 and model.mesh_texcoordadr[i] >= 0 and (model.mat_texid[material] >= 0).any()
        per_pixel = FACES_PER_PIXEL if textured else PLAIN_FACES_PER_PIXEL
        if diameter >= WICKER_PIXELS and "basket_vis" in model.mesh(i).name:
            per_pixel = WICKER_FACES_PER_PIXEL
        budgets[i] = max(budgets[i], MIN_FACES, int(per_pixel * np.pi / 4 * diameter**2))
    return budgets


def _stretch(address, count):
    return slice(address, address + count)


def light_model(model, physics, data, image_size=256):
    """The model that the renderer gets for light pictures: `model` with every mesh and texture reduced to what it can show.

    physics: `physics_model(model)`, for all that is no mesh and no texture. data: the scene after a reset, for what is how far
    from the camera. The result is only for drawing.
    """
    budgets, key = _face_budgets(model, data, image_size), _cache_version()
    arrays = {name: [] for name in ("vert", "face", "normal", "facenormal", "texcoord", "facetexcoord")}
    for i in range(model.nmesh):
        v = _stretch(model.mesh_vertadr[i], model.mesh_vertnum[i])
        f = _stretch(model.mesh_faceadr[i], model.mesh_facenum[i])
        n = _stretch(model.mesh_normaladr[i], model.mesh_normalnum[i])
        t = _stretch(model.mesh_texcoordadr[i], model.mesh_texcoordnum[i])
        textured = model.mesh_texcoordadr[i] >= 0
        mesh = [model.mesh_vert[v], model.mesh_face[f], model.mesh_normal[n], model.mesh_facenormal[f]]
        mesh += [model.mesh_texcoord[t], model.mesh_facetexcoord[f]] if textured else [None, None]
        if budgets[i] == 0:
            mesh = [part if part is None else part[:0] for part in mesh]
        elif model.mesh_facenum[i] > budgets[i]:
            fewer = decimate_cached(key, mesh, budgets[i])
            if fewer is not None:
                mesh = [*fewer[:2], *_indexed(fewer[2]), *_indexed(fewer[3])]
        if mesh[4] is None:
            mesh[4:] = np.empty((0, 2)), np.zeros_like(mesh[1])
        for parts, part in zip(arrays.values(), mesh, strict=True):
            parts.append(part)
    new = {f"mesh_{name}": np.concatenate(parts) for name, parts in arrays.items()}
    for name in ("vert", "face", "normal", "texcoord"):
        count = np.array([len(part) for part in arrays[name]])
        new[f"mesh_{name}num"] = count
        new[f"mesh_{name}adr"] = np.where(getattr(model, f"mesh_{name}adr") < 0, -1, np.cumsum(count) - count)
        new[f"nmesh{name}"] = count.sum()
    textures = []
    for i in range(model.ntex):
        shape = model.tex_height[i], model.tex_width[i], model.tex_nchannel[i]
        image = model.tex_data[_stretch(model.tex_adr[i], np.prod(shape))].reshape(shape)
        textures.append(shrunk(image, 2 * image_size))
    pixels = np.array([image.size for image in textures])
    new |= {
        "tex_data": np.concatenate([image.reshape(-1) for image in textures]),
        "tex_adr": np.cumsum(pixels) - pixels,
        "tex_height": [image.shape[0] for image in textures],
        "tex_width": [image.shape[1] for image in textures],
        "ntexdata": pixels.sum(),
    }
    return model_to_draw(physics, new)


def _indexed(corners):
    """(F, 3, d) values at the corners of faces -> a list of values (3 F, d) and indices into it (F, 3). None -> two Nones."""
    if corners is None:
        return None, None
    return corners.reshape(-1, corners.shape[2]), np.arange(3 * len(corners)).reshape(-1, 3)
