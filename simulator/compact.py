"""Models without what nobody reads: physics without textures and visual meshes (4 of 270 MB), pictures without the rest.

A compiled LIBERO task is nearly all appearance: 4096 px textures, and for every visual mesh its triangles, polygons and bounding
volumes. MuJoCo has no way to leave them out, because sizes are fixed when a model is compiled. But its binary format (MJB) is simple:
a header, the sizes, the options, then every array in a fixed order. So a smaller model is written as MJB, with shorter arrays, and
read back. Bodies, joints, geoms and all ids stay what they were.
"""

import functools
import re
from pathlib import Path

import mujoco
import numpy as np
from mujoco.introspect.structs import STRUCTS

HEADER = 20  # bytes before the sizes: MuJoCo's own marks and counts

# Arrays that hold a stretch for each mesh, and in the last two rows for each vertex and polygon of the meshes: where the
# stretches begin, how long they are, the arrays themselves, and what their length is called.
STRETCHES = (
    ("mesh_vertadr", "mesh_vertnum", ["mesh_vert", "mesh_polymapadr", "mesh_polymapnum"], "nmeshvert"),
    ("mesh_normaladr", "mesh_normalnum", ["mesh_normal"], "nmeshnormal"),
    ("mesh_texcoordadr", "mesh_texcoordnum", ["mesh_texcoord"], "nmeshtexcoord"),
    ("mesh_faceadr", "mesh_facenum", ["mesh_face", "mesh_facenormal", "mesh_facetexcoord"], "nmeshface"),
    ("mesh_polyadr", "mesh_polynum", ["mesh_polynormal", "mesh_polyvertadr", "mesh_polyvertnum"], "nmeshpoly"),
    ("mesh_polymapadr", "mesh_polymapnum", ["mesh_polymap"], "nmeshpolymap"),
    ("mesh_polyvertadr", "mesh_polyvertnum", ["mesh_polyvert"], "nmeshpolyvert"),
)  # fmt: skip
# bounding volumes: stretches for each body and each mesh
VOLUMES = ("bvh_depth", "bvh_child", "bvh_nodeid", "bvh_aabb")


def physics_model(model):
    """`model` without textures, and with only those meshes that can collide: simulates equally, bit for bit."""
    mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    collides[np.concatenate([model.pair_geom1, model.pair_geom2])] = True
    needed = np.zeros(model.nmesh, bool)
    needed[model.geom_dataid[mesh & collides]] = True
    return _with_meshes(model, needed)


def _with_meshes(model, needed):
    """`model` without textures, and with the meshes for which `needed` (nmesh,) bool is true."""
    new = {"tex_data": [], "ntexdata": 0} | dict.fromkeys(
        ("tex_adr", "tex_height", "tex_width"), np.zeros(model.ntex)
    )
    for _, count, _, _ in STRETCHES[:5]:
        new[count] = np.where(needed, getattr(model, count), 0)

    def get(name):
        return new[name] if name in new else getattr(model, name)

    for address, count, arrays, length in STRETCHES:
        rows = _rows(get(address), get(count))
        new |= {name: get(name)[rows] for name in arrays}
        new[address], new[length] = _addresses(get(address), get(count)), len(rows)
    bodies, meshes = model.body_bvhnum, np.where(needed, model.mesh_bvhnum, 0)
    rows = np.concatenate([_rows(model.body_bvhadr, bodies), _rows(model.mesh_bvhadr, meshes)])
    new |= {name: getattr(model, name)[rows] for name in VOLUMES}
    new |= {"nbvh": len(rows), "nbvhstatic": len(rows), "mesh_bvhnum": meshes}
    new["body_bvhadr"] = _addresses(model.body_bvhadr, bodies)
    new["mesh_bvhadr"] = _addresses(model.mesh_bvhadr, meshes, first=bodies.sum())
    return rebuilt(model, new)


def _rows(address, count):
    """Indices of all elements of stretches, one stretch after the other."""
    starts = np.repeat(address - np.cumsum(count) + count, count)
    return starts + np.arange(len(starts))


def _addresses(address, count, first=0):
    """Where stretches begin once they lie one after the other. -1 (none) stays."""
    return np.where(address < 0, -1, first + np.cumsum(count) - count)


def model_to_draw(model, new):
    """`model` with other meshes and textures, `new`: arrays and sizes by name. Only for a renderer: nothing in it collides."""
    none = np.zeros(model.nmesh, int)
    return rebuilt(model, new | {
        "nmeshpoly": 0, "mesh_polynum": none, "mesh_polyadr": none, "mesh_polynormal": [], "mesh_polyvertadr": [],
        "mesh_polyvertnum": [], "nmeshpolyvert": 0, "mesh_polyvert": [], "nmeshpolymap": 0, "mesh_polymap": [],
        "mesh_polymapadr": np.zeros(new["nmeshvert"]), "mesh_polymapnum": np.zeros(new["nmeshvert"]),
        "nmeshgraph": 0, "mesh_graph": [], "mesh_graphadr": none - 1,
        "nbvh": 0, "nbvhstatic": 0, **dict.fromkeys(VOLUMES, []), "mesh_bvhnum": none, "mesh_bvhadr": none - 1,
        "body_bvhnum": np.zeros(model.nbody), "body_bvhadr": np.full(model.nbody, -1),
    })  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# MJB
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _format():
    """Names and dtypes of a model's sizes, and names of its arrays, in the order of the format."""
    fields = STRUCTS["mjModel"].fields
    count = [field.name for field in fields].index("opt")
    sizes = [(field.name, np.uint64 if str(field.type) == "size_t" else np.int32) for field in fields[:count]]
    macros = (Path(mujoco.__file__).parent / "include/mujoco/mjxmacro.h").read_text()
    macros = macros[macros.index("#define MJMODEL_POINTERS ") :].split("\n\n")[0]
    return sizes, re.findall(r"X\w*\s*\(\s*\w+,\s*(\w+),", macros)


def rebuilt(model, new):
    """`model` with other arrays and sizes, through its binary format."""
    sizes, arrays = _format()
    whole = model_bytes(model)
    before = HEADER + sum(np.dtype(kind).itemsize for _, kind in sizes)
    after = sum(_nbytes(getattr(model, name)) for name in arrays)
    options = whole[before : len(whole) - after].tobytes()
    header = whole[:HEADER].tobytes()
    del whole
    data, nbuffer = [], 0
    for name in arrays:
        old = getattr(model, name)
        data.append(old if isinstance(old, bytes) else np.asarray(new.get(name, old), old.dtype).tobytes())
        nbuffer += -nbuffer % 64 + len(data[-1])  # MuJoCo aligns each array
    values = [new.get(name, getattr(model, name)) for name, _ in sizes[:-1]] + [nbuffer]
    numbers = [kind(value).tobytes() for value, (_, kind) in zip(values, sizes, strict=True)]
    return model_from_bytes(b"".join([header, *numbers, options, *data]))


def _nbytes(array):
    return len(array) if isinstance(array, bytes) else array.nbytes


def model_bytes(model):
    """A model in MuJoCo's binary format, (n,) uint8."""
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer


def model_from_bytes(data):
    """Inverse of `model_bytes`; data: bytes."""
    return mujoco.MjModel.from_binary_path("model.mjb", {"model.mjb": data})
