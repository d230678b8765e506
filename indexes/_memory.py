"""What memory this process holds, and pages of files given back that it has read."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["forget", "resident"]

MAPPED = (".npy", ".faiss")
DONT_NEED = 4  # MADV_DONTNEED of Linux


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def forget() -> None:
    """Give back the pages of vectors and indexes that are mapped for reading; they are read again when somebody needs them."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    system = ctypes.CDLL(None)
    for line in maps:
        if line.endswith(MAPPED):
            span, access = line.split(maxsplit=2)[:2]
            first, last = (int(place, 16) for place in span.split("-"))
            if access.startswith("r-"):
                system.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)
