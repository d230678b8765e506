"""What the miners share that walk down the model's own ranking."""

from __future__ import annotations

from ullme.miner import RankingMiner
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["VectorMiner"]


class VectorMiner(RankingMiner):
    """Base of the kinds that compare queries and documents by their vectors."""

    @property
    def needs_model(self) -> bool:
        """True."""
        return True

    def ranker(self, context: MiningContext) -> Ranker:
        """The model's vectors."""
        return context.model
