from __future__ import annotations

import os
import resource
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

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


def measured() -> tuple[int, int, int, int]:
    """Page faults with kept memory and without, and what is held within the block and after it."""
    with kept_memory():
        faults()
        with kept_memory():  # the outer one still holds after the inner one
            pass
        kept, held = faults(), resident()
    after = resident()
    return kept, faults(), held, after


@glibc
def test_memory_is_kept_within_the_block_and_given_back_after_it() -> None:
    """In a process of its own: what other tests have left in the heap decides what can be given back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        kept, plain, held, after = pool.submit(measured).result()
    assert after < held - 4 * LARGE // 2
    assert kept * 4 < plain


@glibc
def test_where_large_blocks_are_kept_already_nothing_is_changed() -> None:
    code = "from ullme import heap; print(heap._glibc() is None)"
    told = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    for settings, expected in (({}, "False"), (told, "True")):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")} | settings
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]
