"""The vectors to index, walked shard by shard, and those that are kept beside an index; numpy, no faiss."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from indexes._memory import forget
from ullme.errors import ArtifactError, ContractError
from ullme.neighbours import MISSING_ROW

__all__ = [
    "BLOCK_ROWS",
    "DIGEST_BYTES",
    "GATHERED_BYTES",
    "Corpus",
    "RowReader",
    "Shards",
    "VectorFile",
    "block_rows",
    "read_vectors",
    "rescored",
    "settle",
]

BLOCK_ROWS, BLOCK_BYTES = 16_384, 2**24
DIGEST_BYTES = 16
GATHERED_BYTES = 2**25  # of candidates that are compared at once
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


class VectorFile:
    """A `.npy` file [N D] that is written block by block, as plain writes: a mapped one would fill the memory.

    dtype: float16 or float32.
    """

    def __init__(self, file: Path, shape: tuple[int, int], dtype: type[np.floating]) -> None:
        self._file, self._dtype = file, dtype
        self._partial = file.with_name(file.name + ".partial")
        self._out = self._partial.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._out, header)

    def append(self, block: np.ndarray) -> None:
        """Add Float[n D]."""
        self._out.write(np.ascontiguousarray(block, dtype=self._dtype).data)

    def close(self) -> None:
        """Give the file its name, in one piece or not at all."""
        self._out.close()
        settle(self._partial, self._file)


def read_vectors(file: Path) -> np.ndarray:
    """What a `VectorFile` wrote, mapped into memory.

    Raises:
        ArtifactError: not such a file.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a table of vectors ({error}); build the index again") from error


class RowReader:
    """Rows of a `.npy` file [N D], read one by one: of a mapped file, Linux keeps up to a megabyte around each that is used."""

    def __init__(self, file: Path) -> None:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
        self.shape, self._dtype, self._offset = table.shape, table.dtype, table.offset
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Float[*n D]: the rows at Int64[*n]."""
        wanted, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(wanted), self.shape[1]), dtype=self._dtype)
        for row, target in zip(wanted.tolist(), found, strict=True):
            os.preadv(self._file, [target.data], self._offset + row * target.nbytes)
        return found[places.reshape(rows.shape)]


def rescored(vectors: np.ndarray | RowReader, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
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
