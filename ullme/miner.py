"""What every kind of miner is: it chooses rows of the pool for each train query.

A kind is one file in `ullme/miners/`: usually a `RankingMiner` that says which ranker it uses and which candidates it keeps;
anything else implements `Miner.select`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ullme.components import Component
from ullme.errors import ContractError
from ullme.mining_context import MiningContext
from ullme.neighbours import MISSING_ROW
from ullme.progress import Progress
from ullme.rankers import Ranker

__all__ = ["ABOVE_POSITIVE", "BLOCK_QUERIES", "Miner", "RankingMiner", "Selection"]

logger = logging.getLogger(__name__)

BLOCK_QUERIES, BLOCK_FOUND = 4096, 2**22
MAX_REFUSED_SHARE = 0.1
ABOVE_POSITIVE = "scores no less than a positive, kept"


@dataclass(frozen=True)
class Selection:
    """What a miner chose: per query (pool row, score), best first; and what it passed over, by reason."""

    chosen: list[list[tuple[int, float]]]
    passed_over: Counter[str] = field(default_factory=Counter)


class Miner(Component):
    """Base of every kind of miner."""

    @property
    @abstractmethod
    def wanted(self) -> int:
        """Negatives per query that it aims at."""

    @property
    def needs_model(self) -> bool:
        """Whether the stage must be given an input called `model`."""
        return False

    @abstractmethod
    def rankers(self, context: MiningContext) -> list[Ranker]:
        """The teachers whose ranking it relies on; their nDCG is reported."""

    @abstractmethod
    def select(self, context: MiningContext, taken: Sequence[set[int]]) -> Selection:
        """At most `wanted` pool rows per query, never one whose text key is in `taken[query]` (see `MiningContext.keys`)."""


class RankingMiner(Miner):
    """A miner that walks down one ranking.

    The query's positives, and documents that read the same, are taken out first, and so do not count as ranks.

    num_negatives: mined per query. depth: how many ranks are looked at. skip_top: ranks left out at the top, where
    unlabelled positives gather. sampling: the `top` of what is left, or `random` among it (seeded per query).
    """

    num_negatives: int = Field(default=4, ge=1)
    depth: int = Field(default=100, ge=1)
    skip_top: int = Field(default=0, ge=0)
    sampling: Literal["top", "random"] = "top"

    @model_validator(mode="after")
    def _window(self) -> RankingMiner:
        if self.skip_top + self.num_negatives > self.depth:
            raise ValueError(
                f"depth {self.depth} has no room for skip_top {self.skip_top} and num_negatives {self.num_negatives}; raise depth"
            )
        return self

    @property
    def wanted(self) -> int:
        """Negatives per query that it aims at."""
        return self.num_negatives

    @abstractmethod
    def ranker(self, context: MiningContext) -> Ranker:
        """What ranks the pool."""

    def rankers(self, context: MiningContext) -> list[Ranker]:
        """The one it walks down."""
        return [self.ranker(context)]

    def keep(self, scores: np.ndarray, positives: np.ndarray) -> np.ndarray:  # noqa: ARG002 - for kinds to override
        """Bool[K]: which candidates of Float32[K] may be negatives, given the scores Float32[P] of the positives."""
        return np.ones(len(scores), dtype=bool)

    def refusal(self, positives: np.ndarray) -> str:  # noqa: ARG002 - for kinds to override
        """Why nothing can be mined for a query whose positives score so; empty = it can."""
        return ""

    def select(self, context: MiningContext, taken: Sequence[set[int]]) -> Selection:
        """Walk down the ranking of every query.

        Raises:
            ContractError: more than a tenth of the queries are refused.
        """
        ranker = self.ranker(context)
        selection = Selection([[] for _ in context.queries])
        refusals: Counter[str] = Counter()
        with Progress(len(context.queries), f"mine {self.kind}", unit="query") as progress:
            for block, reach in self._blocks(context):
                found = ranker.search(block, min(reach, len(context.documents)))
                answers = ranker.score(block, [context.positive_rows(query) for query in block])
                for query, rows, scores, positives in zip(block, found.rows, found.scores, answers, strict=True):
                    reason = self.refusal(positives)
                    if reason:
                        refusals[reason] += 1
                        continue
                    real = rows != MISSING_ROW
                    candidates = (rows[real], scores[real])
                    selection.chosen[query] = self._pick(context, query, candidates, positives, taken[query], selection.passed_over)
                progress.advance(len(block))
        for reason, count in refusals.items():
            line = f"mine {self.kind}: {count} of {len(context.queries)} queries refused: {reason}"
            if count > MAX_REFUSED_SHARE * len(context.queries):
                raise ContractError(f"{line}; this model is no teacher yet: mine with bm25, or train it first")
            logger.warning("%s", line)
            selection.passed_over[f"queries refused: {reason}"] += count
        return selection

    def _blocks(self, context: MiningContext) -> Iterator[tuple[range, int]]:
        """Queries that are searched for together, and how many ranks are needed; what is found of a block stays within bounds."""
        start, reach = 0, 0
        for query in range(len(context.queries)):
            needed = max(reach, self.depth + len(context.forbidden_rows(query)))
            if query > start and (query - start == BLOCK_QUERIES or (query - start + 1) * needed > BLOCK_FOUND):
                yield range(start, query), reach
                start, needed = query, self.depth + len(context.forbidden_rows(query))
            reach = needed
        if context.queries:
            yield range(start, len(context.queries)), reach

    def _pick(
        self,
        context: MiningContext,
        query: int,
        candidates: tuple[np.ndarray, np.ndarray],
        positives: np.ndarray,
        taken: set[int],
        passed_over: Counter[str],
    ) -> list[tuple[int, float]]:
        forbidden = context.forbidden_rows(query)
        allowed = np.array([row not in forbidden for row in candidates[0]], dtype=bool)
        rows, scores = (part[allowed][self.skip_top : self.depth] for part in candidates)
        kept = self.keep(scores, positives)
        seen, free = set(taken), []
        for position, row in enumerate(rows):
            key = int(context.keys[row])
            if key in seen:
                passed_over["same text as one before"] += 1
                continue
            seen.add(key)  # also when it is not kept: it must not come back through a copy
            if kept[position]:
                free.append(position)
            else:
                passed_over["too close to the positive"] += 1
        if self.sampling == "random" and len(free) > self.num_negatives:
            drawn = context.random(query).choice(len(free), self.num_negatives, replace=False)
            free = [free[number] for number in sorted(drawn)]
        free = free[: self.num_negatives]
        if len(positives):
            passed_over[ABOVE_POSITIVE] += int((scores[free] >= positives.min()).sum())
        return [(int(rows[position]), float(scores[position])) for position in free]
