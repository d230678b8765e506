"""Negatives that share words with the query: needs no model, and is the first round's default."""

from __future__ import annotations

from ullme.lexical import LexicalConfig
from ullme.miner import RankingMiner
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["BM25Miner"]


class BM25Miner(RankingMiner):
    """The highest BM25 scores. Documents that share no word with the query are never taken: they would not be hard."""

    lexical: LexicalConfig = LexicalConfig()

    def ranker(self, context: MiningContext) -> Ranker:
        """BM25 over the pool."""
        return context.bm25(self.lexical)
