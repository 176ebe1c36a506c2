"""Fast LIBERO, bit for bit: suites, one compiled task and its episodes, controller, pictures, memory, worker processes.

Importing this package imports robosuite and LIBERO without their noise, and checks that they can render off-screen. It comes
before mujoco, which reads once how it is to render.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

from support.errors import UserError
from support.machine import DEBIAN_PACKAGES, cache_dir, can_write
from support.quiet import silence_third_party

EGL_HELP = (
    f"no EGL for off-screen rendering: on Debian or Ubuntu run `sudo apt-get install {DEBIAN_PACKAGES}` (Mesa, in "
    "software) or install the GPU's driver, and leave MUJOCO_GL unset"
)
MUJOCO_WAS_UNUSED = "mujoco" not in sys.modules


def _place_numba_cache():
    """numba keeps compiled functions beside their source files, and fails where it cannot and there is no home either."""
    sources = [Path(__file__).parent]
    if spec := importlib.util.find_spec("robosuite"):
        sources.append(Path(spec.origin).parent / "utils")
    if "NUMBA_CACHE_DIR" not in os.environ and not all(can_write(str(s / "__pycache__")) for s in sources):
        os.environ["NUMBA_CACHE_DIR"] = str(cache_dir() / "numba")


def _is_about_opengl(exc):
    """Whether an import failed where mujoco and PyOpenGL look for OpenGL."""
    files = [frame.filename for frame in traceback.extract_tb(exc.__traceback__)]
    return any(part in file for file in files for part in ("/OpenGL/", "/mujoco/egl/", "/mujoco/osmesa/"))


if os.environ["MUJOCO_GL"] not in ("egl", "osmesa"):
    raise UserError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work without a display; unset it")
if os.environ.get("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"]).lower() != os.environ["MUJOCO_GL"]:
    raise UserError(
        f"PYOPENGL_PLATFORM={os.environ['PYOPENGL_PLATFORM']} does not work without a display; unset it"
    )
_place_numba_cache()
try:
    silence_third_party()
except (ImportError, AttributeError, RuntimeError) as exc:
    what = f"{type(exc).__name__}: {exc}"
    if _is_about_opengl(exc):
        raise UserError(f"{EGL_HELP} ({what})") from exc
    raise UserError(
        f"cannot import robosuite and LIBERO ({what}): is all of requirements.txt installed?"
    ) from exc
