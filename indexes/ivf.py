"""Inverted lists: vectors are grouped around k-means centroids, and a search reads the lists nearest to the query."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveInt

from indexes.kind import CODE_BYTES, CODE_NAMES, GPU_K_LIMIT, Codes, IndexKind

__all__ = ["Ivf"]

log = logging.getLogger(__name__)

MIN_POINTS_PER_LIST = 39  # below, faiss holds the centroids for unreliable
TRAINING_POINTS_PER_LIST = 64  # between that minimum and 256, above which k-means gains nothing


class Ivf(IndexKind):
    """Partitioned search; smaller and faster to build than a graph, and it runs on GPUs."""

    kind: str = "ivf"
    lists: PositiveInt | Literal["auto"] = Field(
        default="auto", description="number of lists; auto = 4 x sqrt(documents). Never more than one per 39 documents"
    )
    nprobe: PositiveInt = Field(default=32, description="lists read per query; higher = better recall, slower search")
    codes: Codes = Field(default="int8", description="how vectors are stored: fp32, fp16 or int8")

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,<codes>`; says so in the log when the corpus is too small for the lists that were asked for."""
        del dim
        wanted, lists = self._wanted(count), self._lists(count)
        if lists < wanted:
            log.info(
                "index ivf: %d lists instead of %d, so that each has %d of %s documents", lists, wanted, MIN_POINTS_PER_LIST, count
            )
        return f"IVF{lists},{CODE_NAMES[self.codes]}"

    def bytes_per_vector(self, dim: int) -> float:
        """Codes and an 8-byte row number."""
        return dim * CODE_BYTES[self.codes] + 8

    def training_points(self, count: int) -> int:
        """Enough for k-means; int8 learns its ranges from the same sample."""
        return TRAINING_POINTS_PER_LIST * self._lists(count)

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

    @property
    def gpu_search(self) -> bool:
        """GPUs read at most 2,048 lists per query."""
        return self.nprobe <= GPU_K_LIMIT

    def _wanted(self, count: int) -> int:
        return round(4 * math.sqrt(count)) if self.lists == "auto" else self.lists

    def _lists(self, count: int) -> int:
        return max(1, min(self._wanted(count), count // MIN_POINTS_PER_LIST))
