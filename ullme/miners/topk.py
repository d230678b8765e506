"""Negatives that the model itself places nearest to the query, without a filter."""

from __future__ import annotations

from ullme.mining import RankingMiner
from ullme.rankers import MiningContext, Ranker

__all__ = ["TopKMiner"]


class TopKMiner(RankingMiner):
    """Exact nearest vectors. Unlabelled positives are among them: `skip_top`, `sampling: random` or `perc_pos` avoid some."""

    @property
    def needs_model(self) -> bool:
        """True: queries and documents are compared by their vectors."""
        return True

    def ranker(self, context: MiningContext) -> Ranker:
        """The model's vectors."""
        return context.model
