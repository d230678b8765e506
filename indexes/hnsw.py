"""A navigable graph of neighbours (Malkov and Yashunin, 2016, arXiv:1603.09320): fast search on the CPU at high recall."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from indexes.kind import CODE_BYTES, CODE_NAMES, Codes, IndexKind, range_training_points

__all__ = ["Hnsw"]


class Hnsw(IndexKind):
    """Graph search; the choice up to some millions of documents when the memory for the links is there."""

    kind: str = "hnsw"
    m: int = Field(
        default=32, ge=4, le=256, description="links per vector and level; the lowest level has twice as many, 8 x m bytes"
    )
    ef_construction: int = Field(
        default=100, ge=1, description="candidates kept while linking a new vector; higher = better graph, slower build"
    )
    ef_search: int = Field(default=64, ge=1, description="candidates kept while searching; higher = better recall, slower search")
    codes: Codes = Field(default="int8", description="how vectors are stored: fp32, fp16 or int8")

    def factory(self, count: int, dim: int) -> str:
        """`HNSW<m>,<codes>`."""
        del count, dim
        return f"HNSW{self.m},{CODE_NAMES[self.codes]}"

    def bytes_per_vector(self, dim: int) -> float:
        """Codes, links of the lowest level, and 16 bytes of levels, offsets and links above."""
        return dim * CODE_BYTES[self.codes] + 8 * self.m + 16

    def training_points(self, count: int) -> int:
        """int8 learns a range for each component; the graph learns nothing."""
        return range_training_points(self.codes, count)

    def build_parameters(self) -> Mapping[str, float]:
        """efConstruction."""
        return {"efConstruction": self.ef_construction}

    @property
    def knob(self) -> str:
        """ef_search."""
        return "ef_search"

    def search_parameters(self) -> Mapping[str, float]:
        """efSearch."""
        return {"efSearch": self.ef_search}
