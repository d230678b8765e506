"""Centroids from torch: as good as faiss's own, and every vector in the list of the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import clustered, in_shards, kind_of, unit

from indexes import _centroids
from indexes._centroids import learned, nearest_centroids
from indexes.build import build
from indexes.index import Index

DIM = 24


def closeness(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """What spherical k-means raises: the mean inner product of a vector and its centroid."""
    return float((vectors @ centroids.T).max(1).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lists_are_as_tight_as_those_of_faiss(seed: int) -> None:
    faiss = pytest.importorskip("faiss")
    vectors = clustered(6_000, DIM, seed=seed)
    theirs = faiss.Kmeans(DIM, 100, niter=10, seed=seed + 1, spherical=True)
    theirs.train(vectors)
    ours = learned(vectors, 100, seed=seed, device="cpu")
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert closeness(vectors, ours) > closeness(vectors, theirs.centroids) - 0.005
    assert closeness(vectors, ours) > closeness(vectors, vectors[:100]) + 0.02


def test_the_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(3_000, DIM)
    ours = learned(vectors, 40, seed=5, device="cpu")
    monkeypatch.setattr(_centroids, "POINTS_AT_ONCE", 700)
    monkeypatch.setattr(_centroids, "SCORES_AT_ONCE", 40 * 300)
    np.testing.assert_allclose(learned(vectors, 40, seed=5, device="cpu"), ours, atol=1e-6)
    assert not np.allclose(learned(vectors, 40, seed=6, device="cpu"), ours, atol=1e-3)


def test_no_list_stays_empty_while_another_can_be_split() -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(4, DIM)))
    vectors = unit(np.repeat(centres, [2_000, 10, 10, 10], axis=0) + 0.05 * rng.normal(size=(2_030, DIM)))
    lists = np.bincount(nearest_centroids(vectors, learned(vectors, 50, seed=1, device="cpu"), device="cpu"), minlength=50)
    assert lists.min() > 0


def test_fewer_different_vectors_than_lists_give_finite_centroids() -> None:
    vectors = np.repeat(unit(np.eye(3, DIM)), 20, axis=0)
    ours = learned(vectors, 10, seed=1, device="cpu")
    assert np.isfinite(ours).all()
    assert closeness(vectors, ours) > 0.99


@pytest.mark.parametrize("spec", ["ivf", {"kind": "ivf", "codes": "fp32"}, {"kind": "ivfpq", "pieces": 6}, "rabitq"], ids=str)
def test_an_index_of_such_lists_finds_what_one_of_faiss_finds(spec: object, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    vectors = clustered(20_000, DIM)
    made = {}
    for name, device in (("faiss", None), ("torch", "cpu")):
        (tmp_path / name).mkdir()
        shards = in_shards(vectors, 7_000)
        made[name] = build(kind_of(spec), shards, out=tmp_path / name, fingerprint="a" * 64, seed=3, device=device)
    assert made["torch"]["factory"] == made["faiss"]["factory"]
    assert made["torch"]["recall_at_10"] > made["faiss"]["recall_at_10"] - 0.03
    assert Index.open(tmp_path / "torch").search(vectors[:5], 1).rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    written = faiss.read_index(str(tmp_path / "torch" / "index.faiss"))
    inverted = faiss.extract_index_ivf(written)
    _, nearest = inverted.quantizer.search(vectors.astype(np.float16).astype(np.float32), 1)
    rows_of = [faiss.rev_swig_ptr(inverted.invlists.get_ids(number), inverted.invlists.list_size(number))
               for number in range(inverted.nlist)]  # fmt: skip
    for number, rows in enumerate(rows_of):
        assert (nearest[rows, 0] == number).all()
    assert sorted(np.concatenate(rows_of)) == list(range(20_000))


@pytest.mark.gpu
def test_the_gpu_finds_the_lists_that_the_cpu_finds() -> None:
    vectors = clustered(200_000, 64)
    centroids = learned(vectors, 1_000, seed=1, device="cuda")
    assert closeness(vectors, centroids) == pytest.approx(
        closeness(vectors, learned(vectors, 1_000, seed=1, device="cpu")), abs=1e-3
    )
    gpu, cpu = (nearest_centroids(vectors, centroids, device=device) for device in ("cuda", "cpu"))
    differ = gpu != cpu
    assert differ.mean() < 0.001
    scores = [np.einsum("nd,nd->n", vectors[differ], centroids[rows[differ]]) for rows in (gpu, cpu)]
    np.testing.assert_allclose(*scores, atol=1e-5)
