"""Errors that a person can fix end as one line on stderr; everything else is a bug and keeps its traceback."""

import contextlib
import errno
import functools
import os
import sys


class UserError(Exception):
    """A problem that the person at the keyboard can fix. The message says what is wrong, where, and what would work."""


# Operating-system errors that say something about the machine rather than about this code.
_MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
}
_MACHINE_ERRORS |= {errno.ENOMEM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def _say(line):
    """In one write: `print` makes two, and another thread's line may come between."""
    sys.stderr.write(line + "\n")


def _one_line(text):
    """One line that any terminal can print: bytes of a flag that are no UTF-8 arrive here as lone surrogates."""
    return " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()


def _show_uncaught(kind, exc, traceback):
    if issubclass(kind, UserError):
        _say(f"error: {_one_line(exc)}")
    elif issubclass(kind, KeyboardInterrupt):
        _say("interrupted")
    else:
        sys.__excepthook__(kind, exc, traceback)


# For what fails before `main` is entered: without EGL, importing the simulator is already an error of this kind.
sys.excepthook = _show_uncaught


def main_guard(main):
    """Decorator for a script's `main()`: UserError ends as one line on stderr and exit 1, Ctrl-C as exit 130."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that are no text: show them too
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as exc:
            _say(f"error: {_one_line(exc)}")
            sys.exit(1)
        except KeyboardInterrupt:
            _say("interrupted")
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
            _say(f"error: {exc.strerror}{where}")
            sys.exit(1)

    return guarded


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turn an out-of-memory error (of CUDA, a page long, or of the CPU's allocator) into one line that names the flag
    to lower."""
    try:
        yield
    except RuntimeError as error:
        # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own.
        on_cpu = "DefaultCPUAllocator" in str(error)
        # cuBLAS etc.
        library = any(words in str(error) for words in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED"))
        if not (on_cpu or library or type(error).__name__ == "OutOfMemoryError"):
            raise
        raise UserError(f"the {'machine' if on_cpu else 'GPU'} is out of memory: {advice}") from error
