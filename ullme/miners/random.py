"""Negatives drawn from the whole pool: easy ones, and the measure of what hard ones bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from ullme.miner import Miner, Selection
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["RandomMiner"]


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
        """Walk through the pool in an order of each query's own."""
        chosen: list[list[tuple[int, float]]] = []
        for query, used in enumerate(taken):
            seen = used | {int(context.keys[row]) for row in context.forbidden_rows(query)}
            rows: list[tuple[int, float]] = []
            for row in context.random(query).permutation(len(context.documents)).tolist():
                if len(rows) == self.num_negatives:
                    break
                if (key := int(context.keys[row])) not in seen:
                    seen.add(key)
                    rows.append((row, 0.0))
            chosen.append(rows)
        return Selection(chosen, Counter())
