"""The teachers of mining: what ranks the pool of candidates for the train queries, by words, by vectors, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ullme.lexical import BM25Searcher
from ullme.neighbours import BLOCK_ROWS, MISSING_ROW, Neighbours, nearest
from ullme.reranking import FUSION_CONSTANT

if TYPE_CHECKING:
    from ullme.vector_file import VectorReader

__all__ = ["FusedRanker", "LexicalRanker", "Ranker", "RatedRanker", "VectorRanker"]

Rows = Sequence[Sequence[int]]
"""Of each query some rows of the pool."""


class Ranker(Protocol):
    """Ranks the pool for train queries, both by position in `MiningContext`."""

    @property
    def name(self) -> str:
        """What the reports call it."""
        ...

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        ...

    def score(self, queries: Sequence[int], rows: Rows) -> list[np.ndarray]:
        """Float32[len(rows)] for each query: its score of these pool rows."""
        ...


class RatedRanker(Ranker, Protocol):
    """One that knows how its scores spread."""

    def moments(self, queries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(Float64[Q], Float64[Q]): mean and standard deviation of each query's scores over the pool."""
        ...


@dataclass(frozen=True)
class LexicalRanker:
    """BM25 over the pool. texts: of the queries."""

    texts: Sequence[str]
    searcher: BM25Searcher
    name: str = "bm25"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        return self.searcher.search([self.texts[query] for query in queries], k)

    def score(self, queries: Sequence[int], rows: Rows) -> list[np.ndarray]:
        """BM25 of these pool rows."""
        empty = np.empty(0, np.float32)
        return [
            self.searcher.scores(self.texts[query])[np.asarray(of)] if len(of) else empty
            for query, of in zip(queries, rows, strict=True)
        ]

    def moments(self, queries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over the pool."""
        means, deviations = np.empty(len(queries)), np.empty(len(queries))
        for place, query in enumerate(queries):
            scores = self.searcher.scores(self.texts[query])
            means[place], deviations[place] = scores.mean(dtype=np.float64), scores.std(dtype=np.float64)
        return means, deviations


@dataclass(frozen=True)
class VectorRanker:
    """Exact inner product. queries: Float32[Q D]; documents: Float[N D], in memory or in a file. device: where it multiplies."""

    queries: np.ndarray
    documents: np.ndarray | VectorReader
    name: str = "model"
    device: str = "cpu"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        return nearest(self.queries[list(queries)], self.documents, k, device=self.device)

    def score(self, queries: Sequence[int], rows: Rows) -> list[np.ndarray]:
        """Inner product with these pool rows."""
        return [
            self.documents[np.asarray(of, dtype=np.int64)].astype(np.float32) @ self.queries[query]
            for query, of in zip(queries, rows, strict=True)
        ]

    def moments(self, queries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over the pool, from the documents' own first and second moments."""
        mean, second = self._of_documents
        asked = self.queries[list(queries)].astype(np.float64)
        means = asked @ mean
        squares = np.einsum("qd,de,qe->q", asked, second, asked, optimize=True)
        return means, np.sqrt(np.maximum(squares - means**2, 0))

    @cached_property
    def _of_documents(self) -> tuple[np.ndarray, np.ndarray]:
        count, dim = len(self.documents), self.queries.shape[1]
        mean, second = np.zeros(dim), np.zeros((dim, dim))
        for start in range(0, count, BLOCK_ROWS):
            block = np.asarray(self.documents[start : start + BLOCK_ROWS], dtype=np.float32)
            mean += block.sum(0, dtype=np.float64) / count
            second += (block.T @ block) / count
        return mean, second


@dataclass(frozen=True)
class FusedRanker:
    """Several rankings as one.

    by: `ranks`, 1 / (60 + rank) summed (reciprocal-rank fusion), or `scores`, their mean as standard deviations over the pool.
    depth: of each ranking, so many are put together; by ranks, what is in none of them scores 0.
    """

    rankers: Sequence[RatedRanker]
    by: Literal["ranks", "scores"]
    depth: int
    name: str = "fused"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query, of those that one of the rankings has among its `depth` best."""
        rankings = self._rankings(queries)
        candidates = [list(dict.fromkeys(row for ranking in of for row in ranking)) for of in zip(*rankings, strict=True)]
        rows = np.full((len(queries), k), MISSING_ROW, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for number, (of, found) in enumerate(zip(candidates, self._fused(queries, candidates, rankings), strict=True)):
            best = np.lexsort((of, -found))[:k]
            rows[number, : len(best)], scores[number, : len(best)] = np.array(of, dtype=np.int64)[best], found[best]
        return Neighbours(rows, scores)

    def score(self, queries: Sequence[int], rows: Rows) -> list[np.ndarray]:
        """The fused score of these pool rows."""
        return self._fused(queries, rows, self._rankings(queries) if self.by == "ranks" else [])

    def _rankings(self, queries: Sequence[int]) -> list[list[list[int]]]:
        """Of each ranker, of each query: its best rows, best first."""
        found = [ranker.search(queries, self.depth).rows for ranker in self.rankers]
        return [[[row for row in of if row != MISSING_ROW] for of in rows.tolist()] for rows in found]

    def _fused(self, queries: Sequence[int], rows: Rows, rankings: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        if self.by == "scores":
            parts = []
            for ranker in self.rankers:
                means, deviations = ranker.moments(queries)
                scores = ranker.score(queries, rows)
                spans = np.maximum(deviations, 1e-9)
                parts.append([(of - mean) / span for of, mean, span in zip(scores, means, spans, strict=True)])
            return [np.mean(of, axis=0).astype(np.float32) for of in zip(*parts, strict=True)]
        fused = []
        for of, ranked in zip(rows, zip(*rankings, strict=True), strict=True):
            places = [{row: 1 / (FUSION_CONSTANT + rank) for rank, row in enumerate(ranking, start=1)} for ranking in ranked]
            fused.append(np.array([sum(found.get(row, 0.0) for found in places) for row in of], dtype=np.float32))
        return fused
