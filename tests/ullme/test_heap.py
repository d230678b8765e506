from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from ullme import heap
from ullme.heap import kept_memory

LARGE = 2**24  # numbers: 64 MB
glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc")


def faults() -> int:
    """Page faults of five large arrays, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.empty(LARGE, dtype=np.float32).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@glibc
def test_memory_is_kept_within_the_block_and_given_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    heap._glibc.cache_clear()
    with kept_memory():
        faults()
        with kept_memory():  # the outer one still holds after the inner one
            pass
        kept, held = faults(), resident()
    assert resident() < held - 4 * LARGE // 2
    assert kept * 4 < faults()


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    heap._glibc.cache_clear()
    try:
        assert heap._glibc() is None
        with kept_memory():
            pass
    finally:
        heap._glibc.cache_clear()
