"""Several miners in one: each adds its own number of negatives, and none repeats another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ullme.components import component
from ullme.miner import Miner, Selection
from ullme.mining_context import MiningContext
from ullme.rankers import Ranker

__all__ = ["MixedMiner"]


class MixedMiner(Miner):
    """`miners` in order; the shares are their `num_negatives`. What one falls short of, the others do not fill up.

    Scores of different teachers are not on one scale: do not distil from the scores of a mixed artifact.
    """

    miners: tuple[Annotated[Miner, component("ullme.miners")], ...] = Field(min_length=1)

    @property
    def wanted(self) -> int:
        """Negatives per query that all of them aim at together."""
        return sum(miner.wanted for miner in self.miners)

    @property
    def needs_model(self) -> bool:
        """True if one of them does."""
        return any(miner.needs_model for miner in self.miners)

    def rankers(self, context: MiningContext) -> list[Ranker]:
        """The teachers of all of them."""
        return [ranker for miner in self.miners for ranker in miner.rankers(context)]

    def select(self, context: MiningContext, taken: Sequence[set[int]]) -> Selection:
        """Let each choose among what the ones before it left."""
        used = [set(keys) for keys in taken]
        chosen: list[list[tuple[int, float]]] = [[] for _ in context.queries]
        passed_over: Counter[str] = Counter()
        for miner in self.miners:
            selection = miner.select(context, used)
            passed_over.update(selection.passed_over)
            for query, rows in enumerate(selection.chosen):
                chosen[query] += rows
                used[query].update(int(context.keys[row]) for row, _ in rows)
        return Selection(chosen, passed_over)
