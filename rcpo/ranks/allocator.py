"""The C library's allocator on CPU ranks: memory that one micro-batch frees is kept for the next.

By default glibc maps every block above 32 MiB afresh and unmaps it when it is freed, so that each chunk of
logits and each embedding gradient costs a page fault per 4 KiB and a zeroing by the kernel. Called by
`rcpo.launch.worker`; on GPUs torch's own caching allocator does the same.
"""

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's malloc.h; see mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocations; whether that could be set. Results stay
    bit for bit; memory peaks up to a third higher where micro-batches differ much in length.

    Only glibc has it: musl, macOS and Windows go on as they are.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Give the system what is free now: after a whole model has gone. malloc_trim(3)."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
