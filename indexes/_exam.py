"""How good and how fast a built index is, on queries whose true answers are known; numpy, no faiss."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from indexes._corpus import Corpus
from ullme.neighbours import MISSING_ROW, ExactSearcher, Searcher

__all__ = ["Exam"]

QUERIES, DEEPEST = 200, 100
CUTS = (10, 100)
BATCH, TIMED = 32, 10
TIE = 1e-5


@dataclass(frozen=True)
class Exam:
    """Some of the corpus's own vectors, drawn by seed, and the scores of what is truly nearest to them.

    queries: Float32[Q D]; best: Float32[Q K], the K highest scores of each, K = 100 or all documents.
    """

    corpus: Corpus
    queries: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, seed: int) -> Exam:
        """Walk over the corpus once."""
        sample = np.random.default_rng([seed, 1]).choice(corpus.count, size=min(QUERIES, corpus.count), replace=False)
        queries, reach = corpus.gather(np.sort(sample)), min(DEEPEST, corpus.count)
        best = np.full((len(queries), reach), -np.inf, dtype=np.float32)
        for block in corpus.blocks():
            exact = ExactSearcher(block, range(len(block))).search(queries, min(reach, len(block))).scores  # type: ignore[arg-type]
            best = -np.sort(-np.concatenate([best, exact], axis=1), axis=1)[:, :reach]
        return cls(corpus, queries, best)

    def recall(self, index: Searcher, *, half: bool = False) -> float:
        """Share of the 10 nearest that are found. half: on every other query, so that the rest can confirm what it decided."""
        return self._recall(index, 10, slice(0, None, 2) if half and len(self.queries) > 1 else slice(None))

    def measure(self, index: Searcher) -> dict[str, float]:
        """recall_at_10 and recall_at_100 (of the queries that `half` leaves out), and milliseconds of a search for 10."""
        rest = slice(1, None, 2) if len(self.queries) > 1 else slice(None)
        found = {f"recall_at_{cut}": self._recall(index, cut, rest) for cut in CUTS}
        for name, size in (("", 1), (f"_of_{BATCH}", BATCH)):
            times = self._milliseconds(index, size)
            found |= {f"p50_ms{name}": round(float(np.median(times)), 3)}
            found |= {f"p99_ms{name}": round(float(np.percentile(times, 99)), 3)}
        return found

    def _recall(self, index: Searcher, cut: int, which: slice) -> float:
        queries, best, reach = self.queries[which], self.best[which], min(cut, self.best.shape[1])
        rows = index.search(queries, reach).rows
        there = rows != MISSING_ROW
        wanted = np.unique(rows[there])
        if not len(wanted):
            return 0.0
        place = np.searchsorted(wanted, np.where(there, rows, wanted[0]))
        scores = np.einsum("qd,qkd->qk", queries, self.corpus.gather(wanted)[place])
        return round(float((there & (scores >= best[:, reach - 1 : reach] - TIE)).mean()), 4)

    def _milliseconds(self, index: Searcher, size: int) -> list[float]:
        """Of each search for `size` queries at once."""
        times = []
        for start in range(0, max(TIMED * size, len(self.queries)), size):
            batch = self.queries[np.arange(start, start + size) % len(self.queries)]
            started = time.perf_counter()
            index.search(batch, 10)
            times.append(1000 * (time.perf_counter() - started))
        return times
