"""How good and how fast a built index is, on queries whose true answers are known; numpy, no faiss."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from indexes._corpus import GATHERED_BYTES, Corpus
from ullme.errors import ContractError
from ullme.neighbours import MISSING_ROW, Searcher, nearest

__all__ = ["Exam"]

QUERIES, DEEPEST = 200, 100
FEWEST_QUERIES = 40
CUTS = (10, 100)
BATCH, TIMED = 32, 10
TIE = 1e-5


@dataclass(frozen=True)
class Exam:
    """What is searched for, and the scores of what is truly nearest to it.

    queries: Float32[Q D]; best: Float32[Q K], the K highest scores of each, K = 100 or all documents. of_what: `queries`, or
    `documents` where they are vectors of the corpus itself, drawn by seed.
    """

    corpus: Corpus
    queries: np.ndarray
    best: np.ndarray
    of_what: Literal["queries", "documents"]

    @classmethod
    def of(cls, corpus: Corpus, seed: int, queries: np.ndarray | None = None, *, device: str = "cpu") -> Exam:
        """Walk over the corpus once, or twice. device: as of `nearest`.

        Raises:
            ContractError: queries of another dim, or not finite.
        """
        of_what: Literal["queries", "documents"] = "queries"
        if queries is None or len(queries) < FEWEST_QUERIES:
            sample = np.random.default_rng([seed, 1]).choice(corpus.count, size=min(QUERIES, corpus.count), replace=False)
            queries, of_what = corpus.gather(np.sort(sample)), "documents"
        elif queries.ndim != 2 or queries.shape[1] != corpus.dim or not np.isfinite(queries).all():
            raise ContractError(f"index: expected finite queries of dim {corpus.dim} to examine it with, got {list(queries.shape)}")
        queries, reach = np.ascontiguousarray(queries, dtype=np.float32), min(DEEPEST, corpus.count)
        best = np.full((len(queries), reach), -np.inf, dtype=np.float32)
        for block in corpus.blocks():
            exact = nearest(queries, block, min(reach, len(block)), device=device).scores
            best = -np.sort(-np.concatenate([best, exact], axis=1), axis=1)[:, :reach]
        return cls(corpus, queries, best, of_what)

    def sure_recall(self, index: Searcher) -> float:
        """Share of the 10 nearest that are found, less its standard error: of every other query, so that the rest can confirm what
        it decided.
        """
        each = self._recall(index, 10, slice(0, None, 2))
        return float(each.mean() - each.std() / len(each) ** 0.5)

    def measure(self, index: Searcher) -> dict[str, float]:
        """recall_at_10 and recall_at_100 of the queries that `sure_recall` leaves out, and milliseconds of a search for 10."""
        rest = slice(1, None, 2) if len(self.queries) > 1 else slice(None)
        found = {f"recall_at_{cut}": round(float(self._recall(index, cut, rest).mean()), 4) for cut in CUTS}
        for name, size in (("", 1), (f"_of_{BATCH}", BATCH)):
            times = self._milliseconds(index, size)
            found |= {f"p50_ms{name}": round(float(np.median(times)), 3)}
            found |= {f"p99_ms{name}": round(float(np.percentile(times, 99)), 3)}
        return found

    def _recall(self, index: Searcher, cut: int, which: slice) -> np.ndarray:
        """Float[Q]: of each query."""
        queries, best, reach = self.queries[which], self.best[which], min(cut, self.best.shape[1])
        found = index.search(queries, reach).rows
        at_once = max(1, GATHERED_BYTES // (4 * reach * self.corpus.dim))
        shares = [np.zeros(0)]
        for start in range(0, len(queries), at_once):
            rows = found[start : start + at_once]
            there = rows != MISSING_ROW
            wanted = np.unique(rows[there])
            if not len(wanted):
                shares.append(np.zeros(len(rows)))
                continue
            place = np.searchsorted(wanted, np.where(there, rows, wanted[0]))
            scores = np.einsum("qd,qkd->qk", queries[start : start + at_once], self.corpus.gather(wanted)[place])
            shares.append((there & (scores >= best[start : start + at_once, reach - 1 : reach] - TIE)).mean(1))
        return np.concatenate(shares)

    def _milliseconds(self, index: Searcher, size: int) -> list[float]:
        """Of each search for `size` queries at once."""
        times = []
        for start in range(0, max(TIMED * size, len(self.queries)), size):
            batch = self.queries[np.arange(start, start + size) % len(self.queries)]
            started = time.perf_counter()
            index.search(batch, 10)
            times.append(1000 * (time.perf_counter() - started))
        return times
