from __future__ import annotations

import itertools

import numpy as np
import pytest

from ullme import statistics
from ullme.errors import ContractError
from ullme.statistics import bootstrap_interval, paired_randomisation


def test_equal_scores_are_a_tie() -> None:
    scores = np.random.default_rng(0).random(50)
    found = paired_randomisation(scores, scores, samples=500)
    assert (found.difference, found.low, found.high, found.p, found.queries) == (0.0, 0.0, 0.0, 1.0, 50)


def test_p_equals_the_enumeration_of_all_signs() -> None:
    a, b = np.array([0.9, 0.5, 0.8, 0.4, 0.7, 0.6, 0.3]), np.array([0.5, 0.55, 0.3, 0.2, 0.65, 0.2, 0.35])
    differences = a - b
    means = [abs(np.dot(signs, differences)) / 7 for signs in itertools.product((-1, 1), repeat=7)]
    exact = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    found = paired_randomisation(a, b, samples=40_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(differences.mean())


def test_p_is_two_sided_and_never_zero() -> None:
    a, b = np.full(200, 0.9), np.full(200, 0.1)
    better, worse = paired_randomisation(a, b, samples=999), paired_randomisation(b, a, samples=999)
    assert better.p == worse.p == pytest.approx(1 / 1000)
    assert better.difference == -worse.difference == pytest.approx(0.8)


def test_under_the_null_p_is_below_five_percent_about_five_times_in_a_hundred() -> None:
    random = np.random.default_rng(3)
    p = [paired_randomisation(random.random(30), random.random(30), samples=300, seed=n).p for n in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.4, 0.2, 400)
    found = bootstrap_interval(values, samples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.003)
    assert found.high == pytest.approx(values.mean() + half, abs=0.003)


def test_a_wider_level_gives_a_wider_interval() -> None:
    values = np.random.default_rng(2).random(60)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_seed_alone_decides_the_samples() -> None:
    a, b = np.random.default_rng(4).random((2, 40))
    assert paired_randomisation(a, b, samples=500, seed=1) == paired_randomisation(a, b, samples=500, seed=1)
    assert paired_randomisation(a, b, samples=500, seed=1) != paired_randomisation(a, b, samples=500, seed=2)


def test_blocks_cover_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 64)
    a, b = np.full(20, 0.9), np.full(20, 0.1)
    assert paired_randomisation(a, b, samples=999).p == pytest.approx(1 / 1000, abs=2e-3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one score"),
        ([1.0], [1.0, 2.0], "got 1 and 2"),
        ([np.nan], [1.0], "got nan at position 0"),
        ([[1.0]], [1.0], "shape"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(a: list, b: list, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        paired_randomisation(a, b)
