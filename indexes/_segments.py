"""A file of an index: what faiss finds in it, deleted rows left out, compared once more with the vectors kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from indexes._corpus import rescored
from indexes._faiss import selecting, stored_vectors
from indexes._memory import forget
from indexes.kind import GPU_K_LIMIT
from ullme.neighbours import MISSING_ROW
from ullme.vector_file import VectorReader

__all__ = ["Found", "Segment", "file_names", "merged"]

Found = tuple[np.ndarray, np.ndarray]
"""(Float32[Q k] scores, Int64[Q k] rows), -inf and -1 where there is none; best first."""
UNIT = 1e-3
SPARE = 16
FRUGAL_QUERIES = 32


def file_names(number: int) -> tuple[str, str]:
    """Of a segment: what faiss writes, and the vectors of `refine`."""
    mark = f"-{number}" if number else ""
    return f"index{mark}.faiss", f"vectors{mark}.npy"


@dataclass
class Segment:
    """index: a faiss index of n rows on the CPU; vectors: Float16/32[n D] of `refine`; gpu: a copy of the index, on GPUs.

    frugal: few queries are searched at a time, and the pages that they read are given back.
    """

    index: Any
    vectors: np.ndarray | VectorReader | None = None
    gpu: Any = None
    frugal: bool = False

    def __len__(self) -> int:
        return self.index.ntotal

    def nearest(self, queries: np.ndarray, k: int, k_factor: int, alive: np.ndarray | None) -> Found:
        """The k nearest rows of each of Float32[Q D]. alive: Bool[n], the rows that may be found; None = all.

        Fewer columns than k where fewer rows are alive.
        """
        if alive is None or alive.all():
            return self._searched(queries, k, k_factor)
        living = int(alive.sum())
        k, dead = min(k, living), len(alive) - living
        if not k:
            return np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
        wide = k + min(dead, k + SPARE)
        scores, rows = self._searched(queries, wide, k_factor)
        there = rows != MISSING_ROW
        kept = there & alive[rows]
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        short = np.flatnonzero(there.all(1) & (kept.sum(1) < k))
        kept, scores, rows = (np.take_along_axis(values, order, axis=1) for values in (kept, scores, rows))
        scores, rows = np.where(kept, scores, -np.inf), np.where(kept, rows, MISSING_ROW)
        if len(short):  # around these, more was deleted than was looked for in excess
            scores[short], rows[short] = self._searched(queries[short], k, k_factor, np.flatnonzero(alive))
        return scores, rows

    def among(self, queries: np.ndarray, k: int, k_factor: int, rows: np.ndarray) -> Found:
        """The k nearest of some rows, as the index searches. rows: Int64[n], ascending and distinct, at least k."""
        return self._searched(queries, k, k_factor, rows)

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Float[n D]: the vectors of rows, as well as they are kept."""
        return stored_vectors(self.index, rows) if self.vectors is None else self.vectors[rows]

    def _searched(self, queries: np.ndarray, k: int, k_factor: int, only: np.ndarray | None = None) -> Found:
        if not self.frugal:
            return self._found(queries, k, k_factor, only)
        parts = []
        for start in range(0, len(queries), FRUGAL_QUERIES):
            parts.append(self._found(queries[start : start + FRUGAL_QUERIES], k, k_factor, only))
            forget()
        scores, rows = (np.concatenate(values) for values in zip(*parts, strict=True))
        return scores, rows

    def _found(self, queries: np.ndarray, k: int, k_factor: int, only: np.ndarray | None) -> Found:
        most = len(self) if only is None else len(only)
        wide = k if self.vectors is None else min(most, k * k_factor)
        index = self.index if self.gpu is None or wide > GPU_K_LIMIT or only is not None else self.gpu
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        scale = np.where((norms == 0) | (np.abs(norms - 1) < UNIT), 1, norms)  # some codes rank by more than the direction
        options = {} if only is None else {"params": selecting(index, only)}
        scores, rows = index.search(queries / scale, wide, **options)
        if self.vectors is not None:
            return rescored(self.vectors, queries, rows, k)
        return np.where(rows == MISSING_ROW, -np.inf, scores * scale), rows


def merged(found: Sequence[Found], k: int) -> Found:
    """The k best of several segments, whose rows are those of the whole index; of equal scores the lower row."""
    if len(found) == 1:
        return found[0]
    scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
