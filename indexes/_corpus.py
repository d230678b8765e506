"""The vectors to index, walked shard by shard, and candidates scored by their own vectors; numpy, no faiss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from indexes._memory import forget
from ullme.errors import ContractError
from ullme.neighbours import MISSING_ROW
from ullme.vector_file import VectorReader

__all__ = [
    "BLOCK_ROWS",
    "DIGEST_BYTES",
    "GATHERED_BYTES",
    "Corpus",
    "Shards",
    "block_rows",
    "rescored",
]

BLOCK_ROWS, BLOCK_BYTES = 16_384, 2**24
DIGEST_BYTES = 16
GATHERED_BYTES = 2**24  # of candidates that are compared at once
NORM_TOLERANCE = 0.02  # unit vectors stored as float16 stay within 0.001

Shards = Callable[[], Iterable[tuple[Sequence[str], np.ndarray]]]
"""Called for each walk over the corpus: yields (ids, Float16/32[n D]) shard by shard, every time in the same order."""


class Corpus:
    """Unit vectors that are checked once and then read in blocks, so that memory does not grow with their number.

    Attributes: ids (all of them, in row order), digests (Bytes16[N] of the vectors as they lie in the shards), count, dim.
    """

    def __init__(self, shards: Shards, *, frugal: bool = False) -> None:
        """Walk over the shards and check every vector and id.

        frugal: pages of mapped shards are given back block by block.

        Raises:
            ContractError: no vectors; not finite, zero or not of unit norm; dims differ; ids repeat or do not match.
        """
        self._shards, self._frugal = shards, frugal
        self.ids: list[str] = []
        self.dim = 0
        seen: set[str] = set()
        digests: list[bytes] = []
        for number, (ids, vectors) in enumerate(shards()):
            if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != len(ids):
                raise ContractError(
                    f"shard {number}: expected [n D] floating-point vectors and n ids, "
                    f"got {list(vectors.shape)} of {vectors.dtype} and {len(ids)} ids"
                )
            if not len(vectors):
                continue
            self.dim = self.dim or vectors.shape[1]
            if vectors.shape[1] != self.dim:
                raise ContractError(f"shard {number}: expected vectors of dim {self.dim} as before, got dim {vectors.shape[1]}")
            for name in ids:
                if name in seen:
                    raise ContractError(f"shard {number}: id '{name}' was seen before; ids must be unique, encode the corpus again")
                seen.add(name)
            self.ids.extend(ids)
            rows = block_rows(self.dim)
            for start in range(0, len(vectors), rows):
                part = np.ascontiguousarray(vectors[start : start + rows])
                _check_norms(part, ids[start : start + rows], number)
                digests.extend(hashlib.blake2b(vector, digest_size=DIGEST_BYTES).digest() for vector in part)
                self._read()
        self.count = len(self.ids)
        self.digests = np.frombuffer(b"".join(digests), dtype=f"S{DIGEST_BYTES}")
        if not self.count:
            raise ContractError("shards: expected at least one vector, got none; is the corpus empty?")

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Float32[n D] with n = block_rows(D) except in the last, whatever the borders of the shards.

        wanted: Bool[N], the rows to read; None = all.

        Raises:
            ContractError: this walk saw another number of vectors than the first.
        """
        parts: list[np.ndarray] = []
        held, total, rows_of_block = 0, 0, block_rows(self.dim)
        for _, vectors in self._shards():
            start = 0
            if wanted is not None:
                total, rows = total + len(vectors), np.flatnonzero(wanted[total : total + len(vectors)])
                vectors = vectors[rows] if len(rows) < len(vectors) else vectors
            else:
                total += len(vectors)
            while start < len(vectors):
                part = np.asarray(vectors[start : start + rows_of_block - held], dtype=np.float32)
                parts.append(part)
                start, held = start + len(part), held + len(part)
                self._read()
                if held == rows_of_block:
                    yield np.concatenate(parts)
                    parts, held = [], 0
        if parts:
            yield np.concatenate(parts)
        self._check_total(total)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Float32[n D]: the vectors at `rows`, which are sorted and distinct.

        Raises:
            ContractError: this walk saw another number of vectors than the first.
        """
        gathered = np.empty((len(rows), self.dim), dtype=np.float32)
        total = done = 0
        for _, vectors in self._shards():
            step = block_rows(self.dim) if self._frugal else max(1, len(vectors))
            for start in range(0, len(vectors), step):
                inside = rows[done : np.searchsorted(rows, total + min(start + step, len(vectors)))]
                gathered[done : done + len(inside)] = vectors[inside - total]
                done += len(inside)
                self._read()
            total += len(vectors)
        self._check_total(total)
        return gathered

    def _read(self) -> None:
        if self._frugal:
            forget()

    def _check_total(self, total: int) -> None:
        if total != self.count:
            raise ContractError(
                f"shards: expected {self.count} vectors on every walk, got {total} on a later one; each call must start over"
            )


def block_rows(dim: int) -> int:
    """Vectors that are read, checked and added together: the same for a dim, whatever the machine."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * dim)))


def _check_norms(vectors: np.ndarray, ids: Sequence[str], number: int) -> None:
    norms = np.linalg.norm(np.asarray(vectors, dtype=np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(bad):
        norm = norms[bad[0]]
        fault = "holds NaN or infinity" if not np.isfinite(norm) else "is zero" if norm == 0 else f"has norm {norm:.3g}"
        raise ContractError(f"shard {number}: the vector of '{ids[bad[0]]}' {fault}; expected unit norm, encode the corpus again")


def rescored(vectors: np.ndarray | VectorReader, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates of each query that are nearest by their own vectors: (Float32[Q k] scores, Int64[Q k] rows).

    rows: Int64[Q K] candidates, -1 where there is none.
    """
    at_once = max(1, GATHERED_BYTES // (4 * rows.shape[1] * vectors.shape[1]))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    best = np.full((len(queries), k), MISSING_ROW, dtype=np.int64)
    for start in range(0, len(queries), at_once):
        part = rows[start : start + at_once]
        there = part != MISSING_ROW
        near = vectors[np.where(there, part, 0)].astype(np.float32)
        found = np.where(there, np.einsum("qd,qkd->qk", queries[start : start + at_once], near), -np.inf)
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        scores[start : start + at_once] = np.take_along_axis(found, order, axis=1)
        best[start : start + at_once] = np.take_along_axis(part, order, axis=1)
    return scores, best
