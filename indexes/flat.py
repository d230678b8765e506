"""Every vector is compared: exact with fp32, no build time, search time grows with the corpus."""

from __future__ import annotations

from pydantic import Field

from indexes.kind import CODE_BYTES, CODE_NAMES, Codes, IndexKind, range_training_points

__all__ = ["Flat"]


class Flat(IndexKind):
    """Exhaustive search; the choice below some 50,000 documents."""

    kind: str = "flat"
    codes: Codes = Field(
        default="fp32", description="how vectors are stored: fp32 (exact), fp16 (half the size) or int8 (a quarter)"
    )

    def factory(self, count: int, dim: int) -> str:
        """`Flat`, `SQfp16` or `SQ8`."""
        del count, dim
        return CODE_NAMES[self.codes]

    def bytes_per_vector(self, dim: int) -> float:
        """The codes alone."""
        return dim * CODE_BYTES[self.codes]

    def training_points(self, count: int) -> int:
        """int8 learns a range for each component."""
        return range_training_points(self.codes, count)

    @property
    def gpu_search(self) -> bool:
        """faiss has no exhaustive int8 search on GPUs."""
        return self.codes != "int8"
