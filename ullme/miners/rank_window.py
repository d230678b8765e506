"""Negatives drawn from a window of ranks: below the unlabelled positives at the top, above what is easy (as ULLME and DPR draw)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ullme.lexical import LexicalConfig
from ullme.miner import RankingMiner
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["RankWindowMiner"]


class RankWindowMiner(RankingMiner):
    """Ranks skip_top + 1 to depth, by the model's vectors or by BM25; drawn by seed unless `sampling` is top.

    The defaults are the window of ULLME's released settings, 30 to 256 (arXiv 2408.03402).
    """

    by: Literal["model", "bm25"] = "model"
    depth: int = Field(default=256, ge=1)
    skip_top: int = Field(default=30, ge=0)
    sampling: Literal["top", "random"] = "random"
    lexical: LexicalConfig = LexicalConfig()

    @property
    def needs_model(self) -> bool:
        """True where vectors rank."""
        return self.by == "model"

    def ranker(self, context: MiningContext) -> Ranker:
        """What ranks the pool."""
        return context.model if self.by == "model" else context.bm25(self.lexical)
