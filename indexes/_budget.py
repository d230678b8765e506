"""How large the files of an index may be, and how much it may learn from, within a limit of memory."""

from __future__ import annotations

from dataclasses import dataclass

from indexes._corpus import block_rows
from indexes._memory import resident
from indexes.kind import IndexKind
from ullme.errors import ConfigError

__all__ = ["Budget"]

GB = 1e9
BLOCKS_HELD = 3
"""Blocks of rows in memory at a time, as they are read, joined and turned into codes."""
SHARE, LEARNING_SHARE = 4, 6
"""Of what there is, codes of a file take a quarter: they grow by doubling. A sample takes less: what learns from it copies it."""
LEAST = 32 * 2**20


@dataclass(frozen=True)
class Budget:
    """points: vectors to learn from at most; rows: of a file at most, whole blocks; frugal: not all files fit at once."""

    points: int
    rows: int
    frugal: bool

    @classmethod
    def of(cls, kind: IndexKind, count: int, dim: int) -> Budget:
        """What `max_memory_gb` leaves beside what this process holds already.

        Raises:
            ConfigError: too little, or searching this kind would take more; with figures.
        """
        if kind.max_memory_gb is None:
            return cls(count, count, frugal=False)
        limit, whole = kind.max_memory_gb * GB, count * kind.bytes_per_vector(dim)
        if whole > limit and not kind.from_disk:
            raise ConfigError(
                f"index.max_memory_gb: {kind.kind} of {count:,} vectors of {dim} numbers takes {whole / GB:.3g} GB, all of which a "
                f"search reads, and the limit is {kind.max_memory_gb:g} GB; take ivfpq or rabitq, or raise it"
            )
        block = block_rows(dim)
        held = resident() + BLOCKS_HELD * block * dim * 4
        left = limit - held
        if left < LEAST:
            raise ConfigError(
                f"index.max_memory_gb: expected at least {(held + LEAST) / GB:.2g} GB to read {count:,} vectors of {dim} numbers, "
                f"got {kind.max_memory_gb:g}; raise it"
            )
        files = count * kind.all_bytes_per_vector(dim)
        rows = int(left / SHARE / max(1.0, kind.bytes_per_vector(dim)))
        return cls(max(1, int(left / LEARNING_SHARE / (4 * dim))), max(block, rows // block * block), frugal=files > left / 2)

    @staticmethod
    def most_files(kind: IndexKind, count: int, dim: int) -> int:
        """About how many files there will be, beside the first."""
        limit = float("inf") if kind.max_memory_gb is None else kind.max_memory_gb * GB
        return int(2 * SHARE * count * kind.bytes_per_vector(dim) / limit)
