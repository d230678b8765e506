"""What a kind of index is: a frozen value of its fields, read as a faiss factory string and named parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ullme.components import Component

__all__ = ["CODE_BYTES", "CODE_NAMES", "GPU_K_LIMIT", "Codes", "IndexKind", "Refine", "range_training_points"]

GPU_K_LIMIT = 2_048
"""What faiss finds at most on a GPU, and how many lists it reads."""
RANGE_POINTS = 16_384

Codes = Literal["fp32", "fp16", "int8"]
"""How the components of a vector are stored; int8 learns a range per component from a sample."""
CODE_NAMES: dict[Codes, str] = {"fp32": "Flat", "fp16": "SQfp16", "int8": "SQ8"}
CODE_BYTES: dict[Codes, int] = {"fp32": 4, "fp16": 2, "int8": 1}


Refine = Literal["fp32", "fp16"]
"""How vectors are kept beside a coarser index, to compare the best candidates once more."""


def range_training_points(codes: Codes, count: int) -> int:
    """Vectors that int8 codes learn the range of each component from; the other codes learn nothing."""
    return min(count, RANGE_POINTS) if codes == "int8" else 0


class IndexKind(Component):
    """A kind of index: its fields, and how they read as a faiss factory string and named parameters.

    A kind is one file beside this one with one subclass; nothing here has to change for it. Parameters are set by the
    names that `faiss.ParameterSpace` knows (`efConstruction`, `efSearch`, `nprobe`, `k_factor_rf`, ...).
    """

    refine: Refine | None = Field(
        default=None, description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )
    k_factor: int = Field(
        default=4,
        ge=2,
        description="candidates compared once more, for each result that is wanted; with refine. More where min_recall takes more",
    )
    min_recall: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the true 10 nearest that a search must find: how much is searched follows from it",
    )
    max_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="memory that building takes at most, in 10^9 bytes: several files are made where one is too large",
    )
    max_stale: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="share of deleted and later added vectors up to which an earlier index is gone on with; 0 = always built anew",
    )

    def chosen(self, count: int, dim: int) -> IndexKind:
        """What is built of so many vectors: this kind, unless it stands for others."""
        del count, dim
        return self

    @property
    def knob(self) -> str:
        """The field that a better recall is bought with by searching more; empty = there is none."""
        return ""

    @abstractmethod
    def factory(self, count: int, dim: int) -> str:
        """The faiss factory string for `count` vectors of `dim` components; valid for every count >= 1."""

    @abstractmethod
    def bytes_per_vector(self, dim: int) -> float:
        """Expected bytes of one vector in the file and in memory, without `refine` and what does not grow with the corpus."""

    def training_points(self, count: int) -> int:
        """How many of `count` vectors to learn from, drawn uniformly; 0 = this kind learns nothing."""
        del count
        return 0

    def build_parameters(self) -> Mapping[str, float]:
        """Parameters by name that are set before vectors are added."""
        return {}

    def search_parameters(self) -> Mapping[str, float]:
        """Parameters by name that are set when the index is opened."""
        return {}

    @property
    def from_disk(self) -> bool:
        """Whether a search reads a small part of the index only, so that it may be larger than memory."""
        return False

    @property
    def gpu_search(self) -> bool:
        """Whether faiss can search a copy of this index on a GPU."""
        return False

    def reading_bytes(self, count: int, dim: int) -> int:
        """What faiss reckons with, beside the file, when it reads an index of this kind."""
        del count, dim
        return 0

    def all_bytes_per_vector(self, dim: int) -> float:
        """Expected bytes of one vector, `refine` included."""
        return self.bytes_per_vector(dim) + (CODE_BYTES[self.refine] * dim if self.refine else 0)
