"""The vectors to index, walked shard by shard, and the table of their ids; numpy and Arrow, no faiss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ullme.errors import ArtifactError, ContractError
from ullme.neighbours import MISSING_ROW

__all__ = [
    "BLOCK_ROWS",
    "Corpus",
    "Shards",
    "read_ids",
    "read_vectors",
    "rescored",
    "settle",
    "write_ids",
    "write_vectors",
]

BLOCK_ROWS = 16_384
GATHERED_BYTES = 2**25  # of candidates that are compared at once
NORM_TOLERANCE = 0.02  # unit vectors stored as float16 stay within 0.001

Shards = Callable[[], Iterable[tuple[Sequence[str], np.ndarray]]]
"""Called for each walk over the corpus: yields (ids, Float16/32[n D]) shard by shard, every time in the same order."""


class Corpus:
    """Unit vectors that are checked once and then read in blocks, so that memory does not grow with their number.

    Attributes: ids (all of them, in row order), count, dim.
    """

    def __init__(self, shards: Shards) -> None:
        """Walk over the shards and check every vector and id.

        Raises:
            ContractError: no vectors; not finite, zero or not of unit norm; dims differ; ids repeat or do not match.
        """
        self._shards = shards
        self.ids: list[str] = []
        self.dim = 0
        seen: set[str] = set()
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
            for start in range(0, len(vectors), BLOCK_ROWS):
                _check_norms(vectors[start : start + BLOCK_ROWS], ids[start : start + BLOCK_ROWS], number)
        self.count = len(self.ids)
        if not self.count:
            raise ContractError("shards: expected at least one vector, got none; is the corpus empty?")

    def blocks(self) -> Iterator[np.ndarray]:
        """Float32[n D] with n = BLOCK_ROWS except in the last, whatever the borders of the shards.

        Raises:
            ContractError: this walk saw another number of vectors than the first.
        """
        parts: list[np.ndarray] = []
        held = total = 0
        for _, vectors in self._shards():
            start = 0
            while start < len(vectors):
                part = np.asarray(vectors[start : start + BLOCK_ROWS - held], dtype=np.float32)
                parts.append(part)
                start, held = start + len(part), held + len(part)
                if held == BLOCK_ROWS:
                    yield np.concatenate(parts)
                    parts, held = [], 0
            total += len(vectors)
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
            inside = rows[done : np.searchsorted(rows, total + len(vectors))]
            gathered[done : done + len(inside)] = vectors[inside - total]
            total, done = total + len(vectors), done + len(inside)
        self._check_total(total)
        return gathered

    def _check_total(self, total: int) -> None:
        if total != self.count:
            raise ContractError(
                f"shards: expected {self.count} vectors on every walk, got {total} on a later one; each call must start over"
            )


def _check_norms(vectors: np.ndarray, ids: Sequence[str], number: int) -> None:
    norms = np.linalg.norm(np.asarray(vectors, dtype=np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(bad):
        norm = norms[bad[0]]
        fault = "holds NaN or infinity" if not np.isfinite(norm) else "is zero" if norm == 0 else f"has norm {norm:.3g}"
        raise ContractError(f"shard {number}: the vector of '{ids[bad[0]]}' {fault}; expected unit norm, encode the corpus again")


def write_ids(ids: Sequence[str], file: Path) -> None:
    """Write an Arrow IPC file with the column `id`, in one piece or not at all."""
    import pyarrow as pa

    schema = pa.schema([pa.field("id", pa.string(), nullable=False)])
    partial = file.with_name(file.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(ids), BLOCK_ROWS):
            writer.write_batch(pa.record_batch([pa.array(ids[start : start + BLOCK_ROWS], type=pa.string())], schema=schema))
    settle(partial, file)


def read_ids(file: Path) -> list[str]:
    """The ids in row order.

    Raises:
        ArtifactError: not such a file.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).read_all().column("id").to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ArtifactError(f"{file}: not a table of ids ({error}); build the index again") from error


def write_vectors(corpus: Corpus, file: Path, *, bytes_each: int) -> None:
    """Write every vector to a `.npy` file [N D], in one piece or not at all. bytes_each: 4 or 2 for each component."""
    partial = file.with_name(file.name + ".partial")
    shape = (corpus.count, corpus.dim)
    table = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32 if bytes_each == 4 else np.float16, shape=shape)
    start = 0
    for block in corpus.blocks():
        table[start : start + len(block)] = block
        start += len(block)
        table.flush()
    del table
    settle(partial, file)


def read_vectors(file: Path) -> np.ndarray:
    """What `write_vectors` wrote, mapped into memory.

    Raises:
        ArtifactError: not such a file.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a table of vectors ({error}); build the index again") from error


def rescored(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
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


def settle(partial: Path, final: Path) -> None:
    """Make a written file durable, then give it its name."""
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(final)
