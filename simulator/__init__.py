"""Fast LIBERO, bit for bit: suites, one compiled task and its episodes, controller, pictures, memory, worker processes.

Importing this package quiets the simulator's libraries and checks that they can render off-screen.
"""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # headless rendering; must be set before mujoco is imported

from support.errors import UserError
from support.machine import DEBIAN_PACKAGES
from support.quiet import silence_third_party

EGL_HELP = (
    f"no EGL for off-screen rendering: on Debian or Ubuntu run `sudo apt-get install {DEBIAN_PACKAGES}` (Mesa, in "
    "software) or install the GPU's driver, and leave MUJOCO_GL unset"
)
if os.environ["MUJOCO_GL"] not in ("egl", "osmesa"):
    raise UserError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work without a display; unset it")
MUJOCO_WAS_UNUSED = "mujoco" not in sys.modules
try:
    silence_third_party()
except ModuleNotFoundError:
    raise
except (ImportError, AttributeError, RuntimeError) as exc:  # mujoco and PyOpenGL look for OpenGL when they are imported
    raise UserError(f"{EGL_HELP} ({type(exc).__name__}: {exc})") from exc
