"""The kind that chooses, and the recall that is asked for: what is chosen, how it is tuned, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import clustered, in_shards, kind_of

from indexes import _exam
from indexes._corpus import Corpus
from indexes._exam import Exam
from indexes.auto import Auto
from indexes.build import build
from indexes.index import Index
from ullme.errors import ConfigError
from ullme.neighbours import ExactSearcher, Neighbours


@pytest.mark.parametrize(
    ("count", "memory", "expected"),
    [
        (1_000, 8, "flat fp32"),
        (49_999, 0.08, "flat fp16"),
        (49_999, 0.03, "flat int8"),
        (50_000, 8, "hnsw int8"),
        (900_000, 0.6, "ivf int8"),
        (1_000_000, 8, "ivf int8"),
        (10_000_000, 2, "rabitq"),
        (10_000_000, 0.85, "ivfpq"),
    ],
)
def test_the_best_that_fits_is_chosen(count: int, memory: float, expected: str) -> None:
    kind = Auto(max_memory_gb=memory).chosen(count, 576)
    assert f"{kind.kind} {getattr(kind, 'codes', '')}".strip() == expected
    assert count * kind.bytes_per_vector(576) <= memory * 1e9


def test_where_nothing_fits_the_smallest_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"10,000,000 vectors of 576 numbers take at least 0\.8 GB \(ivfpq\), and the limit is 0\.1 GB"
    ):
        Auto(max_memory_gb=0.1).chosen(10_000_000, 576)


@pytest.mark.parametrize(("name", "field"), [("ivf", "nprobe"), ("hnsw", "ef_search"), ("rabitq", "nprobe")])
def test_as_little_is_searched_as_the_recall_takes(name: str, field: str, tmp_path: Path) -> None:
    vectors = clustered(3_000, 32)
    found = {}
    for goal in (0.5, 0.9, 0.99):
        out = tmp_path / str(goal)
        out.mkdir()
        spec = {"kind": name, "min_recall": goal, **({"k_factor": 20} if name == "rabitq" else {})}
        meta = build(kind_of(spec), in_shards(vectors), out=out, fingerprint="a" * 64, seed=7)
        index = Index.open(out)
        found[goal] = getattr(index.kind, field)
        assert meta["recall_at_10"] >= goal - 0.05  # on queries that did not decide
        true = ExactSearcher(vectors, index.ids).search(vectors[:200], 10).rows
        rows = index.search(vectors[:200], 10).rows
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, rows, strict=True)]) >= goal - 0.05
    assert found[0.5] <= found[0.9] <= found[0.99]
    assert found[0.5] < found[0.99]


def test_as_many_are_compared_once_more_as_the_recall_takes(tmp_path: Path) -> None:
    vectors = clustered(3_000, 32)
    found = []
    for goal in (0.5, 0.9):
        out = tmp_path / str(goal)
        out.mkdir()
        spec = {"kind": "rabitq", "min_recall": goal, "k_factor": 2}
        meta = build(kind_of(spec), in_shards(vectors), out=out, fingerprint="a" * 64, seed=7)
        assert meta["recall_at_10"] >= goal - 0.02
        found.append(Index.open(out).kind.k_factor)
    assert found[0] == 2
    assert 2 < found[1] <= 64
    again = tmp_path / "again"
    again.mkdir()
    meta = build(kind_of(spec), in_shards(vectors[:-10]), out=again, fingerprint="a" * 64, seed=7, earlier=[tmp_path / "0.9"])
    assert meta["taken_over"] == 2_990


def test_a_recall_that_is_not_reached_is_said(built, caplog: pytest.LogCaptureFixture) -> None:
    built({"kind": "ivfpq", "refine": None, "pieces": 1, "min_recall": 0.99}, clustered(3_000, 32))
    assert "and min_recall 0.99 was asked for" in caplog.text


class Forgetful:
    """Finds what is exact but for every other place."""

    def __init__(self, exact: ExactSearcher) -> None:
        self._exact = exact
        self.ids = exact.ids

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        found = self._exact.search(vectors, k)
        rows, scores = found.rows.copy(), found.scores.copy()
        keep = k // 2
        rows[:, keep:], scores[:, keep:] = -1, -np.inf
        return Neighbours(rows, scores)


def test_the_exam_counts_what_is_found() -> None:
    vectors = clustered(500, 16).astype(np.float16).astype(np.float32)
    exam = Exam.of(Corpus(in_shards(vectors, 120, 300)), seed=3)
    exact = ExactSearcher(vectors, [f"doc-{row}" for row in range(500)])
    perfect, half = exam.measure(exact), exam.measure(Forgetful(exact))
    assert (perfect["recall_at_10"], perfect["recall_at_100"]) == (1, 1)
    assert (half["recall_at_10"], half["recall_at_100"]) == (0.5, 0.5)
    assert exam.sure_recall(Forgetful(exact)) == pytest.approx(0.5)  # every query loses as much, so there is no doubt
    assert exam.sure_recall(exact) == 1
    assert perfect["p50_ms"] > 0
    assert perfect["p99_ms_of_32"] >= perfect["p50_ms_of_32"]


def test_both_halves_of_the_exam_are_other_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exam, "QUERIES", 20)
    vectors = clustered(100, 16)
    exam = Exam.of(Corpus(in_shards(vectors)), seed=3)
    asked: list[np.ndarray] = []
    exact = ExactSearcher(vectors, [f"doc-{row}" for row in range(100)])

    class Listening(Forgetful):
        def search(self, vectors: np.ndarray, k: int) -> Neighbours:
            asked.append(vectors)
            return exact.search(vectors, k)

    exam.sure_recall(Listening(exact))
    exam.measure(Listening(exact))
    assert not {row.tobytes() for row in asked[0]} & {row.tobytes() for row in asked[1]}
