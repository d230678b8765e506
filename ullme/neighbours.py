"""Nearest neighbours: the value every search returns, the seam `ullme` searches through, and the exact reference.

`Searcher` is how mining and evaluation use an index without knowing faiss; `ExactSearcher` is the plain numpy one, which
reads every vector for every search, and the ground truth that every index is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ullme.errors import ContractError

__all__ = ["ExactSearcher", "Neighbours", "Searcher", "Vectors", "best_places", "nearest"]

MISSING_ROW = -1
BLOCK_ROWS, QUERIES_AT_ONCE = 4096, 256
DEVICE_BLOCK_ROWS, DEVICE_QUERIES = 2**16, 1024


class Vectors(Protocol):
    """Float[N D], in memory or in files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any:
        """Float[n D]."""
        ...


@dataclass(frozen=True)
class Neighbours:
    """Rows of the K nearest documents of Q queries.

    rows: Int64[Q K], positions in the searcher's `ids`; -1 where there are fewer than K documents.
    scores: Float32[Q K], non-increasing, higher = closer; -inf exactly where rows is -1.

    Raises:
        ContractError: shapes differ, or an entry breaks one of the rules above.
    """

    rows: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        if self.rows.shape != self.scores.shape or self.rows.ndim != 2:
            raise ContractError(f"Neighbours: expected two equal [Q K] shapes, got {self.rows.shape} and {self.scores.shape}")
        if np.isnan(self.scores).any():
            raise ContractError("Neighbours: a score is NaN")
        if not np.array_equal(self.rows == MISSING_ROW, np.isneginf(self.scores)):
            raise ContractError("Neighbours: row -1 and score -inf must stand in the same places")
        with np.errstate(invalid="ignore"):
            if (np.diff(self.scores, axis=1) > 0).any():
                raise ContractError("Neighbours: scores must not increase along a row")


@runtime_checkable
class Searcher(Protocol):
    """Anything that finds the nearest of its documents: an index, or `ExactSearcher`."""

    @property
    def ids(self) -> Sequence[str]:
        """Document ids; `Neighbours.rows` are positions in it."""
        ...

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        """The k nearest documents of each of Float32[Q D]."""
        ...


class ExactSearcher:
    """Inner product against every vector, in blocks.

    vectors: Float[N D]; ids: N unique strings. Ties go to the lower row. device: where it multiplies.
    """

    def __init__(self, vectors: Vectors, ids: Sequence[str], *, block: int = BLOCK_ROWS, device: str = "cpu") -> None:
        if len(vectors.shape) != 2 or len(vectors) != len(ids):
            raise ContractError(f"ExactSearcher: expected [N D] vectors and N ids, got {vectors.shape} and {len(ids)} ids")
        self._vectors, self._ids, self._block, self._device = vectors, ids, block, device

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._ids

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        """The k nearest documents of each of Float32[Q D]."""
        queries = np.asarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._vectors.shape[1]:
            raise ContractError(f"search: expected [Q {self._vectors.shape[1]}] queries, got {queries.shape}")
        return nearest(queries, self._vectors, k, block=self._block, device=self._device)


def nearest(queries: np.ndarray, vectors: Vectors, k: int, *, block: int = BLOCK_ROWS, device: str = "cpu") -> Neighbours:
    """The k of Float[N D] `vectors` with the highest inner product with each of Float32[Q D]; ties go to the lower row.

    The vectors are read once, in blocks; memory is Q x k, and a block of rows with its scores of some queries. On another device
    torch multiplies, in float32; of what ties with the last of the k, any may be taken there.
    """
    if device != "cpu":
        return _nearest_on(device, queries, vectors, k)
    rows = np.full((len(queries), k), MISSING_ROW, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start in range(0, len(vectors), block):
        part = np.asarray(vectors[start : start + block], dtype=np.float32)
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            tile = slice(first, first + QUERIES_AT_ONCE)
            found = queries[tile] @ part.T
            places = best_places(found, min(k, found.shape[1]))
            all_scores = np.concatenate([scores[tile], np.take_along_axis(found, places, axis=1)], axis=1)
            all_rows = np.concatenate([rows[tile], start + places], axis=1)
            order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]  # what came first, and so the lower row, wins a tie
            scores[tile], rows[tile] = np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_rows, order, axis=1)
    return Neighbours(rows, scores)


def _nearest_on(device: str, queries: np.ndarray, vectors: Vectors, k: int) -> Neighbours:
    """The same with torch: rows and scores of the best stay on the device until all blocks have passed."""
    import torch

    asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)
    rows = torch.full((len(queries), k), MISSING_ROW, dtype=torch.int64, device=device)
    scores = torch.full((len(queries), k), -torch.inf, device=device)
    for start in range(0, len(vectors), DEVICE_BLOCK_ROWS):
        part = torch.from_numpy(np.ascontiguousarray(vectors[start : start + DEVICE_BLOCK_ROWS])).to(device).float()
        for first in range(0, len(queries), DEVICE_QUERIES):
            tile = slice(first, first + DEVICE_QUERIES)
            best = (asked[tile] @ part.T).topk(min(k, len(part)), dim=1)
            all_scores = torch.cat([scores[tile], best.values], dim=1)
            all_rows = torch.cat([rows[tile], start + best.indices], dim=1)
            by_row = all_rows.argsort(dim=1, stable=True)
            order = by_row.gather(1, all_scores.gather(1, by_row).argsort(dim=1, descending=True, stable=True))[:, :k]
            scores[tile], rows[tile] = all_scores.gather(1, order), all_rows.gather(1, order)
    return Neighbours(rows.cpu().numpy(), scores.cpu().numpy())


def best_places(scores: np.ndarray, k: int) -> np.ndarray:
    """Int64[Q k]: where the k highest of Float[Q N] stand, best first; of equal ones the lower place. Without sorting all N."""
    if k >= scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    chosen = np.sort(np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:], axis=1)
    values = np.take_along_axis(scores, chosen, axis=1)
    lowest = values.min(axis=1, keepdims=True)
    # where more equal the last one than were taken, the partition may have taken a higher place
    doubtful = np.flatnonzero((scores == lowest).sum(1) > (values == lowest).sum(1))
    chosen[doubtful] = np.sort(np.argsort(-scores[doubtful], axis=1, kind="stable")[:, :k], axis=1)
    values[doubtful] = np.take_along_axis(scores[doubtful], chosen[doubtful], axis=1)
    return np.take_along_axis(chosen, np.argsort(-values, axis=1, kind="stable"), axis=1)
