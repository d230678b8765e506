"""Inverted lists of vectors as they are: smaller and faster to build than a graph, and they run on GPUs."""

from __future__ import annotations

from pydantic import Field

from indexes._lists import InvertedLists
from indexes.kind import CODE_BYTES, CODE_NAMES, GPU_K_LIMIT, Codes

__all__ = ["Ivf"]


class Ivf(InvertedLists):
    """Vectors in lists, each component by itself."""

    kind: str = "ivf"
    codes: Codes = Field(default="int8", description="how vectors are stored: fp32, fp16 or int8")

    def factory(self, count: int, dim: int) -> str:
        """`IVF<lists>,<codes>`."""
        del dim
        return f"{self.list_factory(count)},{CODE_NAMES[self.codes]}"

    def bytes_per_vector(self, dim: int) -> float:
        """Codes and an 8-byte row number."""
        return dim * CODE_BYTES[self.codes] + 8

    @property
    def gpu_search(self) -> bool:
        """GPUs read at most 2,048 lists per query."""
        return self.nprobe <= GPU_K_LIMIT
