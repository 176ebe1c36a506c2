"""Files that are whole or absent: atomic writes, safe names, fingerprints of checkpoints."""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from support.errors import UserError


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
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp"
        )
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
        raise UserError(
            f"cannot write {path}: {exc.strerror or exc}; check the path and the free space"
        ) from exc
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
    """Tells apart two checkpoints that had the same name. Cheap at 15 GB: sizes, and up to 64 MiB of each file."""
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*")):
        if path.suffix in (".safetensors", ".json") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            # All of it, or 64 pieces: reinforcement learning changes only some tensors.
            with open(path, "rb") as file:
                for start in range(0, size, max(2**20, size // 64)):
                    file.seek(start)
                    digest.update(file.read(2**20))
    return digest.hexdigest()[:16] if Path(checkpoint).is_dir() else str(checkpoint)


def write_film(path, frames, fps):
    """Write frames (each (H, W, 3) uint8) as an mp4, atomically. One that cannot be written (full disk; Ctrl-C reaches
    ffmpeg as well; no ffmpeg at all) costs a warning, not the run."""
    import imageio

    temporary = path.with_suffix(".tmp.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(temporary, frames, fps=fps, macro_block_size=None)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as exc:
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
