"""TopK-PercPos of NV-Retriever (arXiv 2407.15831): the positive's score bounds that of its negatives."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ullme.miners._vectors import VectorMiner

__all__ = ["PercPosMiner"]


class PercPosMiner(VectorMiner):
    """Nearest vectors with s(q, n) < max_ratio * s(q, p); with several positives p is the one that scores lowest.

    A ratio means nothing where s(q, p) <= 0: such a query is refused, and when more than a tenth are, so is the model.
    """

    max_ratio: float = Field(default=0.95, gt=0, le=1)

    def refusal(self, positives: np.ndarray) -> str:
        """A ratio needs positives that score above zero."""
        if not len(positives):
            return "perc_pos compares with the positive's score, and no positive is in the pool"
        return "" if positives.min() > 0 else "perc_pos needs s(query, positive) > 0, got a score of 0 or less"

    def keep(self, scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """s(q, n) < max_ratio * s(q, p)."""
        return scores < self.max_ratio * positives.min()
