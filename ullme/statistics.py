"""Is a difference more than chance? Paired randomisation and bootstrap intervals over per-query scores.

Two systems answer the same queries, so their scores are compared pair by pair. Under the null hypothesis the sign of
each difference is arbitrary; the test flips signs at random (Smucker, Allan and Carterette, CIKM 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ullme.errors import ContractError

__all__ = ["Comparison", "Interval", "bootstrap_interval", "paired_randomisation"]

BLOCK_VALUES = 1 << 22
"""Random values held in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much better `a` is than `b` on the same queries.

    difference: mean(a) - mean(b). low, high: bootstrap interval of it. p: two-sided, by paired randomisation.
    """

    difference: float
    low: float
    high: float
    p: float
    queries: int


def bootstrap_interval(values: ArrayLike, *, samples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of Float[Q] with its percentile bootstrap interval over queries.

    Raises:
        ContractError: not a vector of at least one finite value.
    """
    scores = _vector("bootstrap_interval", values)
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [scores[random.integers(0, len(scores), (rows, len(scores)))].mean(axis=1) for rows in _blocks(samples, len(scores))]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(scores.mean()), float(low), float(high))


def paired_randomisation(a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, seed: int = 0, level: float = 0.95) -> Comparison:
    """Compare per-query scores a, b: Float[Q] of the same queries in the same order.

    p = (1 + number of sign flips at least as extreme) / (samples + 1): never 0, and 1 when the scores are equal.

    Raises:
        ContractError: different lengths, or not vectors of at least one finite value.
    """
    first, second = _vector("paired_randomisation", a), _vector("paired_randomisation", b)
    if len(first) != len(second):
        raise ContractError(f"paired_randomisation: expected scores of the same queries, got {len(first)} and {len(second)}")
    differences = first - second
    observed = abs(differences.mean())
    tolerance = 1e-12 * max(float(np.abs(differences).max()), 1.0)
    random = np.random.default_rng([seed, 1])
    extreme = 0
    for rows in _blocks(samples, len(differences)):
        signs = random.integers(0, 2, (rows, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) / len(differences) >= observed - tolerance).sum())
    interval = bootstrap_interval(differences, samples=samples, seed=seed, level=level)
    return Comparison(interval.mean, interval.low, interval.high, (1 + extreme) / (samples + 1), len(differences))


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ContractError(f"{name}: expected a vector of at least one score, got shape {array.shape}")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ContractError(f"{name}: expected finite scores, got {array[where]} at position {where}")
    return array


def _blocks(samples: int, width: int) -> Iterator[int]:
    """Rows per block so that a block holds about `BLOCK_VALUES` values."""
    step = max(1, BLOCK_VALUES // width)
    for start in range(0, samples, step):
        yield min(step, samples - start)
