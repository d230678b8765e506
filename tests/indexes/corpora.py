"""Clustered unit vectors cut into shards, as encoding a corpus leaves them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from indexes.index import Shards
from indexes.kind import IndexKind
from ullme.components import resolve


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, dim: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    return unit(centres[rng.integers(0, 20, count)] + rng.normal(size=(count, dim)))


def names(count: int) -> list[str]:
    return [f"doc-{row}" for row in range(count)]


def in_shards(vectors: np.ndarray, *sizes: int) -> Shards:
    """Float16 shards of the given sizes; what is left over makes the last."""
    ids, borders = names(len(vectors)), np.cumsum([0, *sizes, max(0, len(vectors) - sum(sizes))])
    parts = [(ids[a:b], vectors[a:b].astype(np.float16)) for a, b in itertools.pairwise(borders)]
    return lambda: iter(parts)


def kind_of(spec: Any) -> IndexKind:
    kind = resolve("indexes", spec)
    assert isinstance(kind, IndexKind)
    return kind
