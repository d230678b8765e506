"""The heap of this process while a model runs on the CPU: memory that is freed is kept for the next layer.

glibc gives large blocks back to the system as soon as they are free, so every layer's activations are page faults again: a tenth
of the time of an encode in bfloat16 (350,000 faults per pass of 4,096 tokens, against none). Other allocators are left alone, and
so is glibc where it has been told to keep large blocks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["HEAP", "kept_memory"]

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment of a process that trains: it keeps the memory of activations, in huge pages, from its start to its end."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_MMAP, KEPT_TRIM = 2**30, 2**31 - 1  # the most that mallopt takes
USUAL_MMAP, USUAL_TRIM = 2**25, 2**26  # what glibc works its way up to by itself
PROBE_BYTES = 2**26  # larger than what glibc keeps by itself
_lock = threading.Lock()
_inside = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Freed memory stays with the process as long as any such block is open, then goes back to the system."""
    libc = _glibc()
    if libc is None:
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def _count(libc: Any, change: int) -> None:
    global _inside
    with _lock:
        _inside += change
        if change > 0 and _inside == 1:
            _set(libc, KEPT_MMAP, KEPT_TRIM)
        if not _inside:
            _set(libc, USUAL_MMAP, USUAL_TRIM)
            libc.malloc_trim(0)


def _set(libc: Any, mmap_threshold: int, trim_threshold: int) -> None:
    libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)


@lru_cache(maxsize=1)
def _glibc() -> Any:
    """The C library, or None where it is another one or large blocks are kept already."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    known = all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version"))
    return libc if known and _gives_back() else None


def _gives_back() -> bool:
    """Whether a large block that is freed and asked for again consists of new pages."""
    import resource

    faults = [0, 0]
    for turn in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(PROBE_BYTES, dtype=np.uint8).fill(1)
        faults[turn] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults[1] > 4
