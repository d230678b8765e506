"""The kind that fits: chosen by the number of vectors and the memory there is, then tuned to a recall that is measured."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from indexes.flat import Flat
from indexes.hnsw import Hnsw
from indexes.ivf import Ivf
from indexes.ivfpq import IvfPq
from indexes.kind import IndexKind
from indexes.rabitq import RaBitQ
from ullme.errors import ConfigError

__all__ = ["Auto"]

EXHAUSTIVE_BELOW, GRAPH_BELOW = 50_000, 1_000_000
GB = 1e9


class Auto(IndexKind):
    """Below 50,000 vectors all of them are compared; below a million a graph; above, lists; each in fewer bytes as memory runs out.

    The vectors that `refine` compares with are mapped from disk and do not count as memory.
    """

    kind: str = "auto"
    max_memory_gb: float | None = Field(
        default=8.0, gt=0, description="memory that building and searching may take, in 10^9 bytes; none = whatever there is"
    )
    min_recall: float | None = Field(default=0.95, gt=0, le=1, description="share of the true 10 nearest that a search must find")

    def chosen(self, count: int, dim: int) -> IndexKind:
        """The first that fits, of those that are good at this size, from the best to the smallest.

        Raises:
            ConfigError: none fits; says what the smallest takes.
        """
        limit = float("inf") if self.max_memory_gb is None else self.max_memory_gb * GB
        common: dict[str, Any] = {name: getattr(self, name) for name in ("min_recall", "max_memory_gb", "max_stale")}
        exhaustive = [Flat(codes=codes, **common) for codes in ("fp32", "fp16", "int8")]
        small = [Ivf(codes="int8", **common), RaBitQ(**common), IvfPq(**common)]
        if count < EXHAUSTIVE_BELOW:
            fitting = [*exhaustive, *small]
        elif count < GRAPH_BELOW:
            fitting = [Hnsw(codes="int8", **common), *small]
        else:
            fitting = small
        taken = {kind.kind: count * kind.bytes_per_vector(dim) / GB for kind in fitting}
        for kind in fitting:
            if count * kind.bytes_per_vector(dim) <= limit:
                return kind
        kind, least = min(taken.items(), key=lambda entry: entry[1])
        raise ConfigError(
            f"index.max_memory_gb: {count:,} vectors of {dim} numbers take at least {least:.3g} GB ({kind}), and the limit is "
            f"{limit / GB:g} GB; raise it, or set backbone.dim lower"
        )

    def factory(self, count: int, dim: int) -> str:
        """That of the kind chosen."""
        return self.chosen(count, dim).factory(count, dim)

    def bytes_per_vector(self, dim: int) -> float:
        """Those of a small corpus; `chosen` knows better."""
        return self.chosen(1, dim).bytes_per_vector(dim)
