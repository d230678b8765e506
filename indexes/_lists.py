"""What every kind of inverted lists has: how many there are, how many a query reads, and what they are learned from."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveInt

from indexes.kind import IndexKind

__all__ = ["InvertedLists"]

log = logging.getLogger(__name__)

MIN_POINTS_PER_LIST = 39  # below, faiss holds the centroids for unreliable
TRAINING_POINTS_PER_LIST = 64  # between that minimum and 256, above which k-means gains nothing


class InvertedLists(IndexKind):
    """Vectors are grouped around k-means centroids, and a search reads the lists nearest to the query."""

    lists: PositiveInt | Literal["auto"] = Field(
        default="auto", description="number of lists; auto = 4 x sqrt(documents). Never more than one per 39 documents"
    )
    nprobe: PositiveInt = Field(default=32, description="lists read per query; higher = better recall, slower search")

    def training_points(self, count: int) -> int:
        """Enough for k-means; whatever else is learned is learned from the same sample."""
        return TRAINING_POINTS_PER_LIST * self.list_count(count)

    @property
    def knob(self) -> str:
        """nprobe."""
        return "nprobe"

    @property
    def from_disk(self) -> bool:
        """A search reads the lists nearest to the query."""
        return True

    def search_parameters(self) -> Mapping[str, float]:
        """nprobe."""
        return {"nprobe": self.nprobe}

    def list_count(self, count: int) -> int:
        """For so many vectors."""
        return max(1, min(self._wanted(count), count // MIN_POINTS_PER_LIST))

    def list_factory(self, count: int) -> str:
        """`IVF<lists>`; says so in the log when the corpus is too small for the lists that were asked for."""
        wanted, lists = self._wanted(count), self.list_count(count)
        if lists < wanted:
            log.info(
                "index %s: %d lists instead of %d, so that each has %d of %s documents",
                *(self.kind, lists, wanted, MIN_POINTS_PER_LIST, count),
            )
        return f"IVF{lists}"

    def _wanted(self, count: int) -> int:
        return round(4 * math.sqrt(count)) if self.lists == "auto" else self.lists
