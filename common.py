"""What every script here needs and no paper describes: flags, errors, files, seeds, and a quiet terminal.

Four ideas, each small:

1. Flags. A script declares one dataclass; `parse_args` turns it into a command line. The dataclass is the only list of
   settings, so `--help`, the defaults and the type checks cannot drift apart.
2. Errors. Anything a user can cause (a flag, a file, a missing library) raises `UserError` and ends as one line on
   stderr. Anything else is a bug and keeps its traceback: hiding it would only make it harder to report.
3. Files. `atomic_write` gives readers the old file or the new one, never half of either.
4. Quiet. `silence_third_party` stops the simulator's start-up and exit noise where it is made, not by redirecting
   stderr: a redirection would swallow real errors too.

This module imports nothing but the standard library at the top, so that `--help` answers at once.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import types
import typing
from pathlib import Path

# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A problem that the person at the keyboard can fix. The message says what is wrong, where, and what would work."""


# Operating-system errors that say something about the machine rather than about this code.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}
_MACHINE_ERRORS |= {errno.ENOMEM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def _one_line(text):
    """One line that any terminal can print: bytes of a flag that are no UTF-8 arrive here as lone surrogates."""
    return " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()


def _show_uncaught(kind, exc, traceback):
    if issubclass(kind, UserError):
        print(f"error: {_one_line(exc)}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, exc, traceback)


# For what fails before `main` is entered: without EGL, importing the simulator is already an error of this kind.
sys.excepthook = _show_uncaught


def main_guard(main):
    """Decorator for a script's `main()`: UserError ends as one line on stderr and exit 1, Ctrl-C as exit 130."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that are no text: show them all the same
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as exc:
            print(f"error: {_one_line(exc)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            # `python eval.py … | head`: the reader has what it wanted. Python flushes stdout once more at exit; give
            # that flush somewhere to go, or it prints a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as exc:
            if exc.errno not in _MACHINE_ERRORS:
                raise
            where = f": {exc.filename}" if exc.filename else ""
            print(f"error: {exc.strerror}{where}", file=sys.stderr)
            sys.exit(1)

    return guarded


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse would print the whole usage first; one line that names the flag is easier to act on.
        print(f"error: {_one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _number(kind, low, high):
    """Reader for an int or float flag within [low, high]; either bound may be None. NaN and infinity are refused."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is too small; the least is {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is too large; the most is {high}")
        return value

    return read


def _number_list(kind, low, high):
    item = _number(kind, low, high)

    def read(text):
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list such as 0,1")
        return [item(part) for part in parts]

    return read


def _add_flags(parser, args_class):
    hints = typing.get_type_hints(args_class)
    for field in dataclasses.fields(args_class):
        kind, meta = hints[field.name], field.metadata
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # Optional[X] and X | None read like X
            (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        required = default is dataclasses.MISSING
        if required:
            shown = "required"
        elif "default" in meta:  # what a None stands for, e.g. "5e-6 for 7B, 1e-4 for tiny"
            shown = f"default: {meta['default']}"
        elif isinstance(default, bool):
            shown = f"default: {'on' if default else 'off'}"
        elif isinstance(default, (list, tuple)):
            shown = f"default: {','.join(map(str, default))}"
        else:
            shown = f"default: {'none' if default is None else default}"
        options = {
            "dest": field.name,
            "default": None if required else default,
            "required": required,
            "help": f"{meta['help']} ({shown})".replace("%", "%%"),  # argparse would format a lone %
        }
        low, high = meta.get("min"), meta.get("max")
        choices = meta.get("choices")
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        if choices is not None:
            options["choices"] = tuple(choices)
            options["metavar"] = "{" + ",".join(map(str, choices)) + "}"
        if kind is bool:
            options.pop("choices", None)
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float):
            options["type"] = _number(kind, low, high)
            options.setdefault("metavar", "N" if kind is int else "X")
        elif typing.get_origin(kind) in (list, tuple):
            options["type"] = _number_list(typing.get_args(kind)[0], low, high)
            options["metavar"] = "N,N,…" if "utf" in (sys.stdout.encoding or "").lower() else "N,N,.."
        else:
            options["type"] = kind  # str or Path
            options.setdefault("metavar", "PATH" if kind is Path else "TEXT")
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _build(args_class, namespace):
    try:
        return args_class(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(args_class)})
    except ValueError as exc:  # a __post_init__ that refuses a combination of flags
        raise UserError(str(exc)) from None


def parse_args(args_class, description, argv=None):
    """Command line of a script from its dataclass of arguments.

    Every field becomes one `--kebab-case` flag. Supported types: int, float, str, Path, bool (`--flag` / `--no-flag`),
    `X | None`, `list[int]` or `list[float]` (comma-separated: `--task-ids 0,1`), `Literal["a", "b"]`.
    Metadata of a field: "help" (required), "choices", "min" and "max" (numbers, or each number of a list), "default"
    (text that `--help` shows instead of the value, for a None that is resolved later).

    Returns an instance of `args_class`. Wrong input prints one line on stderr and exits with 2.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    _add_flags(parser, args_class)
    return _build(args_class, parser.parse_args(argv))


def parse_command(commands, description, argv=None):
    """Like `parse_args` for a script with sub-commands (`bench.py envs --workers 2`).

    commands: {name: (args_class, help)}. Returns (name, instance of that command's dataclass).
    """
    parser = _Parser(description=description, allow_abbrev=False)
    sub = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(commands) + "}")
    for name, (args_class, help_text) in commands.items():
        text = help_text.replace("%", "%%")
        _add_flags(sub.add_parser(name, help=text, description=text, allow_abbrev=False), args_class)
    namespace = parser.parse_args(argv)
    return namespace.command, _build(commands[namespace.command][0], namespace)


def parse_settings(args_class, settings, where):
    """Instance of `args_class` from a JSON object that an earlier run wrote, each value checked as its flag would be.

    A setting that is absent (the file is older than the flag) takes its default. Raises UserError naming `where`.
    """

    class Parser(_Parser):
        def error(self, message):
            raise UserError(f"{where}: {_one_line(message)}")

    hints = typing.get_type_hints(args_class)
    parser, argv, nulls = Parser(allow_abbrev=False), [], []
    _add_flags(parser, args_class)
    if not isinstance(settings, dict):
        raise UserError(f"{where}: no JSON object with settings")
    for name, value in settings.items():
        if name not in hints or value is None and type(None) not in typing.get_args(hints[name]):
            raise UserError(f"{where}: setting {name!r} = {value!r} is unknown here")
        flag = name.replace("_", "-")
        if value is None:
            nulls.append(name)
        elif isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv.append(f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    args = _build(args_class, parser.parse_args(argv))
    for name in nulls:
        setattr(args, name, None)
    return args


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def atomic_write(path, data):
    """Write `data` (bytes, or str as UTF-8) so that `path` holds either its old content or all of the new one.

    The content goes to a temporary file in the same directory (a rename is atomic only within a file system), is
    synced to the disk, and then takes the name. A full disk or a kill in between leaves the old file as it was.
    Raises UserError when the file cannot be written.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes private files (0600); give this one the mode that open() would
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
        sync_directory(path.parent)
    except OSError as exc:
        raise UserError(f"cannot write {path}: {exc.strerror or exc}; check the path and the free space") from exc
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError for anything else."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no text
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def fingerprint(checkpoint):
    """Tells apart two checkpoints that had the same name. Cheap at 15 GB: sizes, and the last megabyte of each file."""
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*")):
        if path.suffix in (".safetensors", ".json") and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                file.seek(-min(path.stat().st_size, 2**20), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16] if Path(checkpoint).is_dir() else str(checkpoint)


def write_film(path, frames, fps):
    """Write frames (each (H, W, 3) uint8) as an mp4, atomically. One that cannot be written (full disk; Ctrl-C reaches
    ffmpeg as well) costs a warning, not the run."""
    import imageio

    temporary = path.with_suffix(".tmp.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(temporary, frames, fps=fps, macro_block_size=None)
        os.replace(temporary, path)
    except OSError as exc:
        print(f"warning: no video {path}: {str(exc).strip().splitlines()[0]}", file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_directory(directory):
    """Make a rename inside `directory` survive a power cut: the name is stored in the directory, not in the file."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safe_name(text, limit=100):
    """File name from free text such as a task's instruction: letters, digits, `.`, `_`, `-`; never a path, never empty.

    Names that had to be cut end in a hash of the whole text, so that two long instructions stay two files.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", str(text)).strip("._-")
    if len(name) > limit:
        digest = hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name[: limit - 9]}_{digest}"
    return name or "unnamed"


# --------------------------------------------------------------------------------------------------------------------
# Numbers and seeds
# --------------------------------------------------------------------------------------------------------------------


def wilson_interval(successes, n, z=1.96):
    """Wilson score interval of a success rate: (low, high), both in [0, 1]. With n = 0 nothing is known: (0, 1).

    Preferred over the textbook p ± z sqrt(p (1 - p) / n) because it stays inside [0, 1] and does not collapse to a
    point at 0 or n successes, which is where robot evaluations often are.
    """
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} episodes")
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 or n successes one end is exactly the rate; rounding would put it 1e-17 on the wrong side.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def seed_everything(seed):
    """Seed the global generators of Python, NumPy and torch. Code here prefers generators that are passed in."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------------
# System libraries and a quiet terminal
# --------------------------------------------------------------------------------------------------------------------

# The wheels bring everything but these: EGL and OpenGL (Mesa's software renderer will do) and what OpenCV, which
# robosuite imports, links to. Names of Debian 12; Ubuntu has the same.
SYSTEM_LIBRARIES = ("libEGL.so.1", "libGL.so.1", "libOpenGL.so.0", "libgthread-2.0.so.0")
DEBIAN_PACKAGES = "libegl1 libgl1 libopengl0 libgl1-mesa-dri libglib2.0-0"


def require_system_libraries():
    """Raise UserError, naming the Debian packages, unless the libraries that rendering needs can be loaded."""
    missing = []
    for name in SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    if missing:
        raise UserError(f"no {', '.join(missing)} here; on Debian or Ubuntu: sudo apt-get install {DEBIAN_PACKAGES}")


def progress_bar(*args, **kwargs):
    """tqdm's bar: alive in a terminal; in a pipe or a log file, where it cannot redraw itself, a word every half minute.

    Bars inside bars (`leave=False`) are for terminals only.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        kwargs = {"mininterval": 30.0, "maxinterval": 30.0, "dynamic_ncols": False, **kwargs}
        kwargs["disable"] = kwargs.get("disable", False) or not kwargs.get("leave", True)
    return tqdm(*args, **kwargs)


def silence_third_party():
    """Import robosuite and LIBERO without their noise. Call once per process, instead of the first `import libero`.

    Sets MUJOCO_GL=egl unless the environment chose another one, because both packages read it at import. Takes a few
    seconds (robosuite compiles its helpers with numba) and does nothing the second time.
    Raises UserError where EGL or OpenGL is missing, which would otherwise be an AttributeError deep inside PyOpenGL.
    """
    if sys.platform == "linux":
        require_system_libraries()
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Mesa reports every GPU device file that it may not open, on machines where software rendering was wanted anyway.
    os.environ.setdefault("EGL_LOG_LEVEL", "fatal")

    # Source 1, robosuite/__init__.py: three warnings that recommend a private macro file. Only those are dropped.
    logger = logging.getLogger("robosuite_logs")
    if not any(isinstance(f, _NoMacroWarning) for f in logger.filters):
        logger.addFilter(_NoMacroWarning())
    import mujoco
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


def die_with_parent():
    """Let the kernel end this process when its parent ends, however that happens. Linux; elsewhere it does nothing.

    A process that is stopped (SIGSTOP) or waits for work from a pool could not notice by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
    _say_once(message.split(". Time")[0])  # without the simulated time, which would make each message a new one
