"""Inverted lists of one bit per component (RaBitQ, arXiv 2405.12497): small, fast to build, and its error is bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveInt

from indexes.ivf import Ivf
from indexes.ivfpq import FEWEST
from indexes.kind import IndexKind, Refine

__all__ = ["RaBitQ"]


class RaBitQ(IndexKind):
    """A bit per component; the best candidates are compared once more with fp16 vectors."""

    kind: str = "rabitq"
    lists: PositiveInt | Literal["auto"] = Field(default="auto", description="number of lists; auto = 4 x sqrt(documents)")
    nprobe: PositiveInt = Field(default=32, description="lists read per query; higher = better recall, slower search")
    refine: Refine | None = Field(
        default="fp16", description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,RaBitQ`, or a byte per component where there are few vectors."""
        return f"{Ivf(lists=self.lists).factory(count, dim).partition(',')[0]},{'SQ8' if count < FEWEST else 'RaBitQ'}"

    def bytes_per_vector(self, dim: int) -> float:
        """Bits, two numbers that correct them, and an 8-byte row number."""
        return -(-dim // 8) + 8 + 8

    def training_points(self, count: int) -> int:
        """Enough for the lists."""
        return Ivf(lists=self.lists).training_points(count)

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
