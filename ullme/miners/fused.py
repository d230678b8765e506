"""Two teachers in one ranking: what BM25 and the model agree on is hardest, and as often an unlabelled answer as their nearest
(docs/results.md): give it a judge.
"""

from __future__ import annotations

from typing import Literal

from ullme.lexical import LexicalConfig
from ullme.miner import RankingMiner
from ullme.mining_context import MiningContext
from ullme.rankers import FusedRanker, Ranker
from ullme.reranking import fused_depth

__all__ = ["FusedMiner"]


class FusedMiner(RankingMiner):
    """The best of the rankings of BM25 and of the model's vectors, put together. It needs a model."""

    by: Literal["ranks", "scores"] = "ranks"
    """ranks: reciprocal-rank fusion; scores: the mean of the scores, each as standard deviations over the pool."""
    lexical: LexicalConfig = LexicalConfig()

    @property
    def needs_model(self) -> bool:
        """True."""
        return True

    def ranker(self, context: MiningContext) -> Ranker:
        """Both."""
        return FusedRanker([context.bm25(self.lexical), context.model], self.by, fused_depth(self.depth))

    def rankers(self, context: MiningContext) -> list[Ranker]:
        """The two together, and each."""
        return [self.ranker(context), context.model, context.bm25(self.lexical)]
