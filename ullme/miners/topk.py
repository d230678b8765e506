"""Negatives that the model itself places nearest to the query, without a filter."""

from __future__ import annotations

from ullme.miners._vectors import VectorMiner

__all__ = ["TopKMiner"]


class TopKMiner(VectorMiner):
    """Exact nearest vectors. Unlabelled positives are among them: `skip_top`, `sampling: random` or `perc_pos` avoid some."""
