"""Pictures of `agentview`: the process's OpenGL context, and the camera of one task.

Two kinds. `exact` is stock LIBERO's picture, pixel for pixel. `light` is close to it (30 dB and more) at a tenth of the time where
the processor draws: it shows simplified meshes (`simulator.meshes`), smooths edges by a picture 1.375 times as large instead of
four samples per pixel, and draws what stands still once instead of every time.
"""

import dataclasses
import importlib
import os

import cv2
import mujoco
import numba
import numpy as np

from simulator import EGL_HELP
from support.errors import UserError

CAMERA = "agentview"

# Software OpenGL spends half of a picture on LIBERO's 4 samples per pixel. A plain picture of 352 px, averaged down to 256,
# costs little more than a plain one of 256 and is 1 to 3 dB closer to `exact`.
SUPERSAMPLING = 11 / 8
# What stands still is drawn once and kept, with its depths; each picture draws the rest and takes, pixel by pixel, what is
# nearer. To stand still is to stay in one cell of a grid of 2^-13 (0.12 mm, 0.007 degrees) for two pictures, and in light
# pictures everything is drawn where its cell is: so a picture follows from the state alone, whichever part was kept.
POSE_GRID = 2.0**-13
STILL_PICTURES = 2
# Of the rest, only the rectangle in which it can be seen is read back and averaged down: whole blocks of 8 x 8 pixels, which
# are 11 x 11 drawn ones, so that the averages are those of the whole picture.
BLOCK = 8
VISIBLE, HIDDEN = 1, 5  # geom groups: robosuite's visual geometry, and one that MuJoCo does not draw


@dataclasses.dataclass
class Kept:
    """What stands still in an episode's pictures, and the picture of that (see POSE_GRID). Only saves time, except that a
    mirror (see `Renderer.draw`) shows what stands still."""

    cells: np.ndarray = None  # (G, 12) of all visual geoms in the last picture
    still: np.ndarray = None  # (G,) for how many pictures they have not changed
    resting: np.ndarray = None  # (G,) bool, what `pixels` (H, W, 3) shows, and in which cells
    resting_cells: np.ndarray = None
    pixels: np.ndarray = None
    depth: np.ndarray = None
    small: np.ndarray = None  # `pixels` at the picture's resolution


class Renderer:
    """The `agentview` camera of one task.

    model: the physics model. drawn: a model of the same scene whose meshes and textures OpenGL gets (`light_model`, or for
    exact pictures the scene as compiled); it is not needed afterwards. data: the scene after a reset. arm_site: a site of the
    robot arm.
    light: the fast kind of picture. resolution: image side in pixels.
    """

    def __init__(self, model, drawn, data, arm_site, light, resolution):
        self.model, self.light, self.resolution = model, light, resolution
        size = round(SUPERSAMPLING * resolution) if light else resolution
        if light:
            drawn.vis.quality.offsamples = 0
        if not drawn.light_castshadow.any():
            drawn.vis.quality.shadowsize = 0  # spare the 64 MB shadow map that nothing would draw
        drawn.vis.global_.offwidth = drawn.vis.global_.offheight = size
        gl_context()
        self.context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_150)
        self.context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # as OpenGL has it: far 0, near 1
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        self.options = mujoco.MjvOption()
        self.options.geomgroup[0] = 0  # collision geometry stays invisible, as in robosuite
        self.options.geomgroup[VISIBLE] = 1
        self.perturb = mujoco.MjvPerturb()
        self.viewport = mujoco.MjrRect(0, 0, size, size)
        # in drawn pixels
        self.focal = 0.5 * size / np.tan(0.5 * np.deg2rad(model.cam_fovy[self.camera.fixedcamid]))
        self.block = BLOCK if resolution % BLOCK == 0 else resolution

        # A sky that walls hide costs a tenth of a picture. The camera and the walls do not move, so one look is enough.
        self.update_scene(data)
        with_sky, without = self.draw_scene(sky=1)[0], self.draw_scene(sky=0)[0]
        self.sky = int((without != with_sky).any())

        self.visual = np.flatnonzero(model.geom_group == VISIBLE)
        self.radius = np.array([_radius(drawn, geom) for geom in self.visual])
        arm = model.body_rootid == model.body_rootid[model.site_bodyid[arm_site]]
        # what will not stand still
        self.movers = (arm & (model.body_weldid != 0))[model.geom_bodyid[self.visual]]
        material = model.geom_matid[self.visual]
        self.glass = (model.geom_rgba[self.visual, 3] < 1.0) | (
            (material >= 0) & (model.mat_rgba[material, 3] < 1.0)
        )

    def close(self):
        """Free what OpenGL holds of this task. The process's context stays."""
        gl_context()
        self.context.free()

    def update_scene(self, data):
        """List what is there to draw. Returns whether that includes sites, such as the flame of a stove."""
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self.model, data, self.options, self.perturb, self.camera, everything, self.scene
        )
        # robosuite hides its gripper sites by a negative opacity; software OpenGL would still blend nothing into the
        # picture, for 0.4 ms each. Sites come last in a scene.
        while self.scene.ngeom and self.scene.geoms[self.scene.ngeom - 1].rgba[3] <= 0.0:
            self.scene.ngeom -= 1
        last = self.scene.ngeom - 1
        return last >= 0 and self.scene.geoms[last].objtype == mujoco.mjtObj.mjOBJ_SITE

    def draw_scene(self, sky, rectangle=None):
        """Pixels (h, w, 3) uint8 and depths (h, w) float32 of the scene in `rectangle` (MjrRect; None: all), rows bottom-up."""
        rectangle = rectangle or self.viewport
        pixels = np.empty((rectangle.height, rectangle.width, 3), np.uint8)
        depth = np.empty((rectangle.height, rectangle.width), np.float32) if self.light else None
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = sky
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        mujoco.mjr_render(self.viewport, self.scene, self.context)
        mujoco.mjr_readPixels(pixels, depth, rectangle, self.context)
        return pixels, depth

    def draw(self, data, kept):
        """The picture of `data`, (resolution, resolution, 3) uint8, upright.

        kept: the episode's `Kept`, what its last picture leaves for this one. A mirror (the plate of LIBERO's stove) shows
        what is drawn in one go with it: in light pictures, what stands still.
        """
        gl_context()  # somebody else's context may be current, e.g. a stock environment in the same process
        if self.light:
            pixels = self._draw_light(data, kept)
        else:
            self.update_scene(data)
            pixels, _ = self.draw_scene(self.sky)
        # OpenGL's rows run bottom-up; LIBERO keeps that ("upside down"), and OpenVLA rotates by 180 degrees.
        return pixels[::-1, ::-1].copy()

    def _draw_light(self, data, kept):
        visual, group, options = self.visual, self.model.geom_group, self.options
        position, rotation = data.geom_xpos[visual], data.geom_xmat[visual]
        cells = np.rint(np.hstack((position, rotation)) / POSE_GRID)
        if kept.cells is None:
            kept.still = np.where(self.movers, 0, STILL_PICTURES)
        else:
            kept.still = np.where((cells == kept.cells).all(1), kept.still + 1, 0)
        kept.cells = cells
        resting = kept.still >= STILL_PICTURES
        if not resting[self.glass].all():
            resting[:] = True  # glass needs what is behind it: everything in one go
        data.geom_xpos[visual], data.geom_xmat[visual] = POSE_GRID * cells[:, :3], POSE_GRID * cells[:, 3:]
        if not (np.array_equal(resting, kept.resting) and np.array_equal(cells[resting], kept.resting_cells)):
            kept.resting, kept.resting_cells = resting, cells[resting]
            group[visual] = np.where(resting, VISIBLE, HIDDEN)
            options.sitegroup[:], sites = 0, options.sitegroup.copy()  # a stove's flame comes and goes
            self.update_scene(data)
            kept.pixels, kept.depth = self.draw_scene(self.sky)
            kept.small = self._averaged(kept.pixels)
            options.sitegroup[:] = sites
        group[visual] = np.where(resting, HIDDEN, VISIBLE)
        sites = self.update_scene(data)
        group[visual] = VISIBLE
        left, bottom, right, top = self._rectangle(data, None if sites else ~resting)
        data.geom_xpos[visual], data.geom_xmat[visual] = position, rotation

        picture = kept.small.copy()
        if left < right and bottom < top:
            drawn = self.viewport.width * self.block // self.resolution  # a block's side in drawn pixels
            rows, columns = slice(bottom * drawn, top * drawn), slice(left * drawn, right * drawn)
            rectangle = mujoco.MjrRect(
                left * drawn, bottom * drawn, (right - left) * drawn, (top - bottom) * drawn
            )
            pixels, depth = self.draw_scene(0, rectangle)
            take_nearer(pixels, depth, kept.pixels[rows, columns], kept.depth[rows, columns])
            rows, columns = (
                slice(bottom * self.block, top * self.block),
                slice(left * self.block, right * self.block),
            )
            picture[rows, columns] = self._averaged(pixels)
        return picture

    def _averaged(self, pixels):
        """Drawn pixels at the picture's resolution."""
        height, width = (n * self.resolution // self.viewport.width for n in pixels.shape[:2])
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)

    def _rectangle(self, data, which):
        """In blocks: (left, bottom, right, top) of where `which` (G,) bool of the visual geoms can be seen; None: everywhere.

        A sphere around each geom is projected. Its outline is where the line of sight touches it.
        """
        everywhere = (0, 0, self.resolution // self.block, self.resolution // self.block)
        if which is None:
            return everywhere
        camera, radius = self.camera.fixedcamid, self.radius[which, None]
        centres = data.geom_xpos[self.visual[which]] - data.cam_xpos[camera]
        # (n, 3): to the right, up, and behind the camera
        centres = centres @ data.cam_xmat[camera].reshape(3, 3)
        across, ahead = centres[:, :2], -centres[:, 2:]
        if (ahead <= radius).any():
            return everywhere
        slope = radius * np.sqrt(across**2 + ahead**2 - radius**2)
        tangents = [(across * ahead + sign * slope) / (ahead**2 - radius**2) for sign in (-1.0, 1.0)]
        drawn = self.viewport.width * self.block / self.resolution
        # (n, 2)
        low, high = ((0.5 * self.viewport.width + self.focal * tangent) / drawn for tangent in tangents)
        low = np.floor(low.min(0, initial=np.inf) - 1.0 / drawn)  # and a pixel of room
        high = np.ceil(high.max(0, initial=-np.inf) + 1.0 / drawn)
        return (
            *(int(n) for n in np.clip(low, 0, everywhere[2])),
            *(int(n) for n in np.clip(high, 0, everywhere[2])),
        )


def _radius(model, geom):
    """Radius of a sphere around a geom's centre that holds all that is drawn of it; infinite for a plane."""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return np.linalg.norm(model.mesh_vert[first : first + model.mesh_vertnum[mesh]], axis=1).max()
    return model.geom_rbound[geom] if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_PLANE else np.inf


@numba.njit(cache=True)
def take_nearer(pixels, depth, other_pixels, other_depth):
    """Overwrite `pixels` (H, W, 3) with `other_pixels` where that picture's depth (0 far ... 1 near) is not smaller."""
    for y in range(len(depth)):
        for x in range(depth.shape[1]):
            if other_depth[y, x] >= depth[y, x]:
                for c in range(3):
                    pixels[y, x, c] = other_pixels[y, x, c]


# --------------------------------------------------------------------------------------------------------------------
# The OpenGL context
# --------------------------------------------------------------------------------------------------------------------

_GL = None  # one per process; every task's renderer lives in it


def gl_context():
    """Make the process's OpenGL context current; the first call creates it. UserError where EGL does not work."""
    global _GL
    if _GL is None:
        _GL = _new_context()
    _GL.make_current()
    return _GL


def _new_context():
    backend, device = os.environ["MUJOCO_GL"], os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if backend == "egl" and device is not None:
        last = num_egl_devices() - 1
        if last >= 0 and not (device.isdecimal() and int(device) <= last):
            raise UserError(
                f"MUJOCO_EGL_DEVICE_ID={device}: EGL's devices are numbered here between 0 and {last}; "
                "unset it to take the first that works"
            )
    try:  # PyOpenGL raises ImportError, AttributeError or its own EGLError, by what is missing
        # By its own name: `mujoco.GLContext` is another class where mujoco was imported before MUJOCO_GL was set.
        context_class = importlib.import_module(f"mujoco.{backend}").GLContext
        context_class._context = None  # its __del__ reads this, also where __init__ failed
        return context_class(640, 480)
    except Exception as exc:
        raise UserError(f"{EGL_HELP} ({type(exc).__name__}: {exc})") from exc


def check_egl():
    """Raise UserError, with the Debian packages to install, where off-screen rendering does not work."""
    gl_context()


def num_egl_devices():
    """How many devices EGL can render on here; 0 without EGL. `MUJOCO_EGL_DEVICE_ID` counts them."""
    try:
        from mujoco.egl import egl_ext  # not at the top: it looks for EGL when it is imported

        return len(egl_ext.eglQueryDevicesEXT())
    except Exception:  # of several kinds: without the library or the extension, and under MUJOCO_GL=osmesa
        return 0


def default_render():
    """ "exact" where a GPU renders, "light" where the processor does it (Mesa's llvmpipe or softpipe)."""
    from OpenGL.GL import GL_RENDERER, glGetString  # not at the top: it looks for OpenGL when it is imported

    gl_context()
    renderer = (glGetString(GL_RENDERER) or b"").decode(errors="replace").lower()
    return "light" if any(name in renderer for name in ("llvmpipe", "softpipe", "swrast", "swr")) else "exact"
