"""Exact search against a plain sort, ties included."""

from __future__ import annotations

import numpy as np
import pytest

from ullme import neighbours
from ullme.errors import ContractError
from ullme.neighbours import MISSING_ROW, ExactSearcher, Neighbours, best_places, nearest


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize("k", [1, 3, 17, 60, 80])
def test_the_best_places_are_those_of_a_stable_sort(values: int, k: int) -> None:
    """With few values nearly everything is a tie."""
    scores = np.random.default_rng(values).integers(0, values, size=(40, 60)).astype(np.float32)
    np.testing.assert_array_equal(best_places(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_exact_search_equals_a_sort_whatever_the_blocks(block: int, k: int) -> None:
    random = np.random.default_rng(0)
    vectors, queries = (random.integers(-2, 3, size=(count, 6)).astype(np.float32) for count in (100, 9))
    found = ExactSearcher(vectors, [str(row) for row in range(100)], block=block).search(queries, k)
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.rows[:, :100], order)
    np.testing.assert_array_equal(found.scores[:, :100], np.take_along_axis(scores, order, axis=1))
    assert (found.rows[:, 100:] == MISSING_ROW).all()


def test_torch_finds_the_same_but_for_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "DEVICE_BLOCK_ROWS", 30)
    monkeypatch.setattr(neighbours, "DEVICE_QUERIES", 4)
    random = np.random.default_rng(0)
    vectors, queries = (random.normal(size=(count, 6)).astype(np.float16) for count in (100, 9))
    for k in (1, 10, 130):
        found, plain = nearest(queries, vectors, k, device="cpu:0"), nearest(queries.astype(np.float32), vectors, k)
        np.testing.assert_array_equal(found.rows, plain.rows)
        np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-6)


@pytest.mark.gpu
def test_the_gpu_finds_what_the_cpu_finds_but_for_ties() -> None:
    random = np.random.default_rng(0)
    vectors, queries = (random.normal(size=(count, 64)).astype(np.float16) for count in (200_000, 300))
    found, plain = nearest(queries, vectors, 100, device="cuda"), nearest(queries.astype(np.float32), vectors, 100)
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-4)
    differ = found.rows != plain.rows
    assert differ.mean() < 0.001
    np.testing.assert_allclose(found.scores[differ], plain.scores[differ], rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "scores", "message"),
    [
        ([[0]], [[1.0, 2.0]], "two equal"),
        ([[0]], [[np.nan]], "NaN"),
        ([[-1]], [[1.0]], "same places"),
        ([[0, 1]], [[1.0, 2.0]], "must not increase"),
    ],
)
def test_what_breaks_the_rules_is_refused(rows: list[list[int]], scores: list[list[float]], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Neighbours(np.array(rows), np.array(scores, dtype=np.float32))


def test_vectors_and_ids_belong_together() -> None:
    with pytest.raises(ContractError, match=r"\[N D\] vectors and N ids"):
        ExactSearcher(np.zeros((2, 3), np.float32), ["a"])
    with pytest.raises(ContractError, match=r"expected \[Q 3\] queries"):
        ExactSearcher(np.zeros((2, 3), np.float32), ["a", "b"]).search(np.zeros((1, 4), np.float32), 1)
