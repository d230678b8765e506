"""The vectors to index, walked shard by shard, and the table of their ids; numpy and Arrow, no faiss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ullme.errors import ArtifactError, ContractError
from ullme.neighbours import ExactSearcher, Searcher

__all__ = ["BLOCK_ROWS", "SELF_CHECK_K", "Corpus", "Shards", "read_ids", "recall_of", "settle", "write_ids"]

BLOCK_ROWS = 16_384
SELF_CHECK_QUERIES, SELF_CHECK_K = 200, 10
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


def recall_of(index: Searcher, corpus: Corpus, seed: int) -> float:
    """Share of the true nearest documents that an index finds for a sample of the corpus's own vectors; ties count as found."""
    sample = np.random.default_rng([seed, 1]).choice(corpus.count, size=min(SELF_CHECK_QUERIES, corpus.count), replace=False)
    queries = corpus.gather(np.sort(sample))
    reach = min(SELF_CHECK_K, corpus.count)
    rows = index.search(queries, reach).rows
    achieved = np.full(rows.shape, -np.inf, dtype=np.float32)
    best = np.full(rows.shape, -np.inf, dtype=np.float32)
    start = 0
    for block in corpus.blocks():
        exact = ExactSearcher(block, corpus.ids[start : start + len(block)]).search(queries, reach).scores
        best = -np.sort(-np.concatenate([best, exact], axis=1), axis=1)[:, :reach]
        query, place = np.nonzero((rows >= start) & (rows < start + len(block)))
        achieved[query, place] = np.einsum("nd,nd->n", queries[query], block[rows[query, place] - start])
        start += len(block)
    return round(float((achieved >= best[:, -1:] - 1e-5).mean()), 4)


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


def settle(partial: Path, final: Path) -> None:
    """Make a written file durable, then give it its name."""
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(final)
