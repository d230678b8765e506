"""TopK-MarginPos of NV-Retriever (arXiv 2407.15831): negatives stay a margin below the positive's score."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ullme.miners._vectors import VectorMiner

__all__ = ["MarginPosMiner"]


class MarginPosMiner(VectorMiner):
    """Nearest vectors with s(q, n) < s(q, p) - margin; with several positives p is the one that scores lowest.

    Where no positive is in the pool there is nothing to compare with, and the query is refused.
    """

    margin: float = Field(default=0.05, ge=0, le=2)

    def refusal(self, positives: np.ndarray) -> str:
        """A margin needs a positive to keep from."""
        return "" if len(positives) else "margin_pos compares with the positive's score, and no positive is in the pool"

    def keep(self, scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """s(q, n) < s(q, p) - margin."""
        return scores < positives.min() - self.margin
