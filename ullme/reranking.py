"""The best answers of a search, in a better order; and several rankings made into one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import Field

from ullme.components import Component

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["FUSION_CONSTANT", "Reranker", "fused", "fused_depth"]

FUSION_CONSTANT = 60
"""k of reciprocal-rank fusion, as its authors set it."""
FUSED_DEPTH = 100
Item = TypeVar("Item", bound=Hashable)


class Reranker(Component):
    """Reads a query together with each of its best passages, which an embedding cannot."""

    depth: int = Field(default=30, ge=1)
    """The best answers that are read; those below keep their order."""

    @property
    def needs_model(self) -> bool:
        """Whether it reads with the model of the project, and so has to be given one."""
        return False

    @abstractmethod
    def scores(self, encoder: Encoder | None, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Float32[K] for each query: how well each of its K passages answers it; higher = better.

        encoder: the released model, or the one that mines; None where there is none.
        """


def fused_depth(k: int) -> int:
    """How many of each ranking are put together where the k best are wanted."""
    return max(FUSED_DEPTH, 2 * k)


def fused(rankings: Sequence[Sequence[Item]]) -> list[tuple[Item, float]]:
    """One ranking of several, best first: the sum over them of 1 / (60 + rank), ranks from 1.

    Reciprocal-rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009); it needs no scores that can be compared. Ties go to what was
    seen first.
    """
    scores: dict[Item, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (FUSION_CONSTANT + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])
