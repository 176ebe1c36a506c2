"""Memory and number formats."""

import contextlib

import torch

from support.errors import UserError


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turn an out-of-memory error (of CUDA, a page long, or of the CPU's allocator) into one line that names the flag to lower."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        on_cpu = "DefaultCPUAllocator" in str(error)
        library = any(
            words in str(error) for words in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")
        )  # cuBLAS etc.
        if not (on_cpu or library or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise UserError(f"the {'machine' if on_cpu else 'GPU'} is out of memory: {advice}") from error
