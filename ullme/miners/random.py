"""Negatives drawn from the whole pool: easy ones, and the measure of what hard ones bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ullme.miner import Miner, Selection
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["RandomMiner"]

DRAWN_PER_NEGATIVE = 8
"""Rows that are drawn for each, so that a query costs the same whatever the pool's size."""


class RandomMiner(Miner):
    """Documents drawn evenly, by seed and query. Nothing rates them, so their score is 0."""

    num_negatives: int = Field(default=4, ge=1)

    @property
    def wanted(self) -> int:
        """Negatives per query that it aims at."""
        return self.num_negatives

    def rankers(self, context: MiningContext) -> list[Ranker]:
        """None: there is no teacher."""
        del context
        return []

    def select(self, context: MiningContext, taken: Sequence[set[int]]) -> Selection:
        """Draw a few rows for each query, and all of them where these do not suffice."""
        chosen: list[list[tuple[int, float]]] = []
        for query, used in enumerate(taken):
            seen = used | {int(context.keys[row]) for row in context.forbidden_rows(query)}
            size, random = len(context.documents), context.random(query)
            few = min(size, len(seen) + DRAWN_PER_NEGATIVE * self.num_negatives)
            rows = self._unlike(context, seen, random.choice(size, few, replace=False))
            if len(rows) < self.num_negatives and few < size:  # many copies: look at everything
                rows = self._unlike(context, seen, random.permutation(size))
            chosen.append(rows)
        return Selection(chosen, Counter())

    def _unlike(self, context: MiningContext, taken: set[int], order: np.ndarray) -> list[tuple[int, float]]:
        """The first rows in this order whose texts are neither taken nor there twice."""
        seen, rows = set(taken), []
        for row, key in zip(order.tolist(), context.keys[order].tolist(), strict=True):
            if len(rows) == self.num_negatives:
                break
            if key not in seen:
                seen.add(key)
                rows.append((row, 0.0))
        return rows
