"""Inverted lists of one bit per component (RaBitQ, arXiv 2405.12497): small, fast to build, and its error is bounded."""

from __future__ import annotations

from pydantic import Field

from indexes._lists import InvertedLists
from indexes.ivfpq import FEWEST
from indexes.kind import Refine

__all__ = ["RaBitQ"]


class RaBitQ(InvertedLists):
    """A bit per component; the best candidates are compared once more with fp16 vectors."""

    kind: str = "rabitq"
    refine: Refine | None = Field(
        default="fp16", description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,RaBitQ`, or a byte per component where there are few vectors."""
        del dim
        return f"{self.list_factory(count)},{'SQ8' if count < FEWEST else 'RaBitQ'}"

    def bytes_per_vector(self, dim: int) -> float:
        """Bits, two numbers that correct them, and an 8-byte row number."""
        return -(-dim // 8) + 8 + 8
