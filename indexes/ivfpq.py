"""Inverted lists of product-quantised vectors (Jegou et al. 2011): the smallest index, for corpora that fit no other way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from indexes._lists import InvertedLists
from indexes.kind import Refine

__all__ = ["IvfPq"]

FEWEST = 1_000
"""Vectors below which coarse codes save nothing, and 256 centroids per piece cannot be learned: a byte per component then."""
POINTS_PER_CODE = 64 * 256


class IvfPq(InvertedLists):
    """Each vector in `pieces` bytes; what it loses, comparing the best candidates once more with fp16 vectors wins back."""

    kind: str = "ivfpq"
    pieces: PositiveInt | Literal["auto"] = Field(
        default="auto", description="bytes per vector, a divisor of its length; auto = the largest below an eighth of the length"
    )
    refine: Refine | None = Field(
        default="fp16", description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,PQ<pieces>np`, or a byte per component where there is too little to learn from."""
        return f"{self.list_factory(count)},{'SQ8' if count < FEWEST else f'PQ{self._pieces(dim)}np'}"

    def bytes_per_vector(self, dim: int) -> float:
        """Codes and an 8-byte row number."""
        return self._pieces(dim) + 8

    def reading_bytes(self, count: int, dim: int) -> int:
        """A table of distances between lists and pieces, though it is not made for inner products."""
        return 4 * 256 * self.list_count(count) * self._pieces(dim)

    def training_points(self, count: int) -> int:
        """Enough for the lists and for 256 centroids per piece."""
        return min(count, max(super().training_points(count), POINTS_PER_CODE))

    def _pieces(self, dim: int) -> int:
        if self.pieces != "auto":
            return self.pieces
        return next(pieces for pieces in range(max(1, dim // 8), 0, -1) if dim % pieces == 0)
