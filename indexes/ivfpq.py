"""Inverted lists of product-quantised vectors (Jegou et al. 2011): the smallest index, for corpora that fit no other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveInt

from indexes.ivf import Ivf
from indexes.kind import IndexKind, Refine

__all__ = ["IvfPq"]

FEWEST = 1_000
"""Vectors below which coarse codes save nothing, and 256 centroids per piece cannot be learned: a byte per component then."""
POINTS_PER_CODE = 64 * 256


class IvfPq(IndexKind):
    """Each vector in `pieces` bytes; what it loses, comparing the best candidates once more with fp16 vectors wins back."""

    kind: str = "ivfpq"
    lists: PositiveInt | Literal["auto"] = Field(default="auto", description="number of lists; auto = 4 x sqrt(documents)")
    nprobe: PositiveInt = Field(default=32, description="lists read per query; higher = better recall, slower search")
    pieces: PositiveInt | Literal["auto"] = Field(
        default="auto", description="bytes per vector, a divisor of its length; auto = the largest below an eighth of the length"
    )
    refine: Refine | None = Field(
        default="fp16", description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,PQ<pieces>np`, or a byte per component where there is too little to learn from."""
        lists = Ivf(lists=self.lists).factory(count, dim).partition(",")[0]
        return f"{lists},SQ8" if count < FEWEST else f"{lists},PQ{self._pieces(dim)}np"

    def bytes_per_vector(self, dim: int) -> float:
        """Codes and an 8-byte row number."""
        return self._pieces(dim) + 8

    def reading_bytes(self, count: int, dim: int) -> int:
        """A table of distances between lists and pieces, though it is not made for inner products."""
        lists = int(Ivf(lists=self.lists).factory(count, dim).partition(",")[0].removeprefix("IVF"))
        return 4 * 256 * lists * self._pieces(dim)

    def training_points(self, count: int) -> int:
        """Enough for the lists and for 256 centroids per piece."""
        return min(count, max(Ivf(lists=self.lists).training_points(count), POINTS_PER_CODE))

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

    def _pieces(self, dim: int) -> int:
        if self.pieces != "auto":
            return self.pieces
        return next(pieces for pieces in range(max(1, dim // 8), 0, -1) if dim % pieces == 0)
