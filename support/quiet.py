"""A quiet terminal: progress bars that suit a pipe, and the simulator's start-up and exit noise stopped where it is made.

Not by redirecting stderr, which would swallow real errors too.
"""

import contextlib
import functools
import logging
import os
import sys

from support.machine import require_system_libraries


def progress_bar(*args, **kwargs):
    """tqdm's bar: alive in a terminal; in a pipe or a log file, where it cannot redraw itself, a word every half minute.

    Bars inside bars (`leave=False`) are for terminals only.
    """
    from tqdm import tqdm  # not at the top: scripts without a bar start faster

    if not sys.stderr.isatty():
        kwargs = {"mininterval": 30.0, "maxinterval": 30.0, "dynamic_ncols": False, **kwargs}
        kwargs["disable"] = kwargs.get("disable", False) or not kwargs.get("leave", True)
    return tqdm(*args, **kwargs)


def silence_third_party():
    """Import robosuite and LIBERO without their noise. Call once per process, instead of the first `import libero`.

    Takes a few seconds (robosuite compiles its helpers with numba) and does nothing the second time.
    Raises UserError where EGL or OpenGL is missing, which would otherwise be an AttributeError deep inside PyOpenGL.
    """
    if sys.platform == "linux":
        require_system_libraries()

    # Source 1, robosuite/__init__.py: three warnings that recommend a private macro file. Only those are dropped.
    logger = logging.getLogger("robosuite_logs")
    if not any(isinstance(f, _NoMacroWarning) for f in logger.filters):
        logger.addFilter(_NoMacroWarning())
    import mujoco  # here and not at the top: only once the above is set

    with _during_import_of_robosuite():
        from libero.libero import benchmark
        from robosuite.utils import binding_utils

    # Source 2, libero/benchmark: prints the order of its tasks each time that a suite is made. Its warnings stay.
    benchmark.print = _print_unless_info

    # Source 3, rendering contexts: an atexit hook terminates the EGL display, and afterwards `__del__` of every
    # context that is still alive calls EGL on it and prints a traceback. The display takes its contexts with it, so
    # at exit there is nothing left to free. MuJoCo's own context class, which robosuite's is a copy of, does the
    # same.
    contexts = [binding_utils.MjRenderContext, binding_utils.GLContext]
    if "mujoco.egl" in sys.modules:
        contexts.append(sys.modules["mujoco.egl"].GLContext)
    for context in contexts:
        if hasattr(context, "__del__") and not hasattr(context.__del__, "__wrapped__"):
            context.__del__ = _not_at_exit(context.__del__)

    # Source 4, MuJoCo: by default a physics warning appends to MUJOCO_LOG.TXT in whatever directory the user stands in.
    # Say it once on stderr instead.
    mujoco.set_mju_user_warning(_mujoco_warning)


@contextlib.contextmanager
def _during_import_of_robosuite():
    """Keep from robosuite what it makes the wrong use of when it is imported.

    It asserts that the number of the EGL device is one of CUDA_VISIBLE_DEVICES. Those are two ways of counting, and
    CUDA_VISIBLE_DEVICES=1 MUJOCO_EGL_DEVICE_ID=0 is how the second of several GPUs is chosen in a container. It does not
    draw here, so it need not know. And it logs to /tmp/robosuite.log, which may be another user's file.
    """
    devices, file_handler = os.environ.pop("CUDA_VISIBLE_DEVICES", None), logging.FileHandler
    logging.FileHandler = _NoFile
    try:
        yield
    finally:
        logging.FileHandler = file_handler
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices


class _NoFile(logging.NullHandler):
    def __init__(self, *arguments, **options):
        super().__init__()


class _NoMacroWarning(logging.Filter):
    def filter(self, record):
        message = str(record.msg)
        return "private macro" not in message and "setup_macros" not in message


def _print_unless_info(*values, **options):
    if not (values and str(values[0]).startswith("[info]")):
        print(*values, **options)


def _not_at_exit(method):
    @functools.wraps(method)
    def guarded(self):
        if not sys.is_finalizing():
            method(self)

    return guarded


@functools.cache
def _say_once(text):
    print(f"mujoco: {text}", file=sys.stderr)


def _mujoco_warning(message):
    # without the simulated time, which would make each message a new one
    _say_once(message.split(". Time")[0])
