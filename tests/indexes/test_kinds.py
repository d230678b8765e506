"""The contract of every kind of index: this file walks the directory, so a new kind is tested the moment it exists."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from corpora import clustered, in_shards, kind_of, unit
from pydantic import ValidationError

from indexes.build import build
from indexes.index import Index
from ullme.components import kinds, resolve
from ullme.errors import ConfigError, ContractError
from ullme.neighbours import ExactSearcher, Searcher

KINDS = kinds("indexes")
HEAVY = {"faiss", "torch", "pyarrow", "transformers", "mteb", "mlflow", "prefect"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return kind_of(request.param)


@pytest.fixture(scope="module")
def vectors():
    return clustered(2_000, 32)


@pytest.fixture(scope="module")
def queries():
    return clustered(2_100, 32)[2_000:]


@pytest.fixture(scope="module")
def built_once(kind, vectors, tmp_path_factory):
    out = tmp_path_factory.mktemp(kind.kind)
    return out, build(kind, in_shards(vectors, 700, 700), out=out, fingerprint="a" * 64, seed=7)


def test_the_directory_holds_the_kinds_that_the_configuration_offers():
    assert {"auto", "flat", "hnsw", "ivf", "ivfpq", "rabitq"} <= set(KINDS)


def test_defaults_find_nine_of_ten_true_neighbours(built_once, vectors, queries):
    index = Index.open(built_once[0])
    true = ExactSearcher(vectors, index.ids).search(queries, 10).rows
    found = index.search(queries, 10).rows
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)]) >= 0.9


def test_the_self_check_agrees_with_exact_search(built_once):
    assert 0.9 <= built_once[1]["recall_at_10"] <= 1


def test_an_opened_index_describes_what_was_built(built_once, kind):
    out, meta = built_once
    index = Index.open(out, fingerprint="a" * 64)
    assert isinstance(index, Searcher)
    assert (index.kind, index.count, index.dim, index.metric) == (kind.chosen(2_000, 32), 2_000, 32, "inner_product")
    assert (len(index), index.ids[0], index.ids[-1]) == (2_000, "doc-0", "doc-1999")
    assert meta["count"] == 2_000
    assert meta["bytes"] == sum(len(content) for content in learned(out).values())


def test_bytes_per_vector_is_foretold(built_once, kind):
    codebooks = 256 * 32 * 4 if kind.kind == "ivfpq" else 0
    assert built_once[1]["bytes_per_vector"] == pytest.approx(
        kind.chosen(2_000, 32).all_bytes_per_vector(32), rel=0.1, abs=8 + codebooks / 2_000
    )


def test_opening_twice_gives_equal_answers(built_once, queries):
    first, second = (Index.open(built_once[0]).search(queries, 20) for _ in range(2))
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_the_same_seed_gives_the_same_bytes_for_any_shards_and_threads(built_once, kind, vectors, tmp_path):
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        build(kind, in_shards(vectors, 1, 1_500), out=tmp_path, fingerprint="a" * 64, seed=7)
    finally:
        faiss.omp_set_num_threads(threads)
    for name in ("index.faiss", "ids.arrow", "index.json"):
        assert (tmp_path / name).read_bytes() == (built_once[0] / name).read_bytes(), name


@pytest.mark.parametrize("count", [1, 3, 50])
def test_tiny_corpora_work(kind, count, tmp_path, capfd):
    vectors = clustered(count, 32)
    meta = build(kind, in_shards(vectors), out=tmp_path, fingerprint="a" * 64, seed=7)
    found = Index.open(tmp_path).search(vectors, 5)
    assert found.rows[:, 0].tolist() == list(range(count))
    assert (found.rows[:, count:] == -1).all()
    assert np.isneginf(found.scores[:, count:]).all()
    assert meta["recall_at_10"] == 1
    assert capfd.readouterr().out == ""


def test_equal_documents_count_as_found(kind, tmp_path):
    vectors = np.repeat(clustered(5, 32), 30, axis=0)
    assert build(kind, in_shards(vectors), out=tmp_path, fingerprint="a" * 64, seed=7)["recall_at_10"] >= 0.9


def test_no_queries_give_no_rows(built_once):
    assert Index.open(built_once[0]).search(np.empty((0, 32), dtype=np.float32), 3).rows.shape == (0, 3)


def test_queries_of_any_float_width_and_norm_rank_alike(built_once, queries):
    index = Index.open(built_once[0])
    rows = index.search(queries, 5).rows
    np.testing.assert_array_equal(index.search(queries.astype(np.float64), 5).rows, rows)
    np.testing.assert_array_equal(index.search(2 * queries, 5).rows, rows)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_imports_nothing_heavy(name):
    code = f"import sys, indexes.{name}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_field_is_an_error_that_names_it(name):
    with pytest.raises(ValidationError, match="no_such_field"):
        resolve("indexes", {"kind": name, "no_such_field": 1})


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown kind 'hnws'; allowed: .*did you mean 'hnsw'"):
        resolve("indexes", {"kind": "hnws"})


def learned(path):
    """The bytes of everything but the card, which names the fields themselves."""
    return {name: (path / name).read_bytes() for name in ("index.faiss", "vectors.npy") if (path / name).is_file()}


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        ({"kind": "flat"}, {"codes": "fp16"}),
        ({"kind": "flat"}, {"codes": "int8"}),
        ({"kind": "hnsw"}, {"codes": "fp32"}),
        ({"kind": "hnsw"}, {"m": 8}),
        ({"kind": "hnsw"}, {"ef_construction": 10}),
        ({"kind": "hnsw"}, {"ef_search": 4}),
        ({"kind": "ivf"}, {"lists": 10}),
        ({"kind": "ivf"}, {"nprobe": 1}),
        ({"kind": "ivf"}, {"codes": "fp16"}),
        ({"kind": "ivf"}, {"refine": "fp32"}),
        ({"kind": "rabitq"}, {"lists": 10}),
        ({"kind": "rabitq"}, {"nprobe": 1}),
        ({"kind": "rabitq"}, {"refine": None}),
        ({"kind": "rabitq"}, {"refine": "fp32"}),
    ],
)
def test_every_field_changes_the_index(spec, changed, vectors, built):
    plain, other = built(spec, vectors[:600]), built(spec | changed, vectors[:600])
    assert learned(plain) != learned(other)


@pytest.mark.parametrize("changed", [{"lists": 10}, {"nprobe": 1}, {"pieces": 8}, {"refine": None}, {"refine": "fp32"}])
def test_every_field_of_product_quantisation_changes_the_index(changed, vectors, built):
    plain, other = built("ivfpq", vectors), built({"kind": "ivfpq"} | changed, vectors)
    assert learned(plain) != learned(other)


def test_pieces_of_product_quantisation_divide_the_vector():
    kind = kind_of("ivfpq")
    assert [kind.factory(50_000, dim).partition(",")[2] for dim in (576, 100, 7)] == ["PQ72np", "PQ10np", "PQ1np"]
    assert kind.factory(900, 576) == "IVF23,SQ8"


@pytest.mark.parametrize("name", KINDS)
def test_vectors_as_long_as_those_of_an_llm_are_read_back(name, built):
    """faiss refuses to read what it reckons to be larger than its limit, which follows from the file."""
    vectors = clustered(4_000, 576)
    index = Index.open(built(name, vectors))
    assert (index.search(vectors[:50], 10).rows[:, 0] == np.arange(50)).mean() > 0.8


@pytest.mark.parametrize("name", ["ivfpq", "rabitq"])
def test_comparing_once_more_wins_back_what_small_codes_lose(name, vectors, queries, built):
    true = ExactSearcher(vectors, range(2_000)).search(queries, 10).rows

    def recall(refine):
        found = Index.open(built({"kind": name, "refine": refine, "nprobe": 64, "k_factor": 8}, vectors)).search(queries, 10).rows
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)]))

    assert recall(None) < 0.9 < recall("fp16")


def test_more_candidates_find_more(vectors, queries, built):
    true = ExactSearcher(vectors, range(2_000)).search(queries, 10).rows

    def recall(k_factor):
        found = Index.open(built({"kind": "rabitq", "nprobe": 64, "k_factor": k_factor}, vectors)).search(queries, 10).rows
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)]))

    assert recall(2) < recall(20)


@pytest.mark.parametrize(("spec", "field"), [("hnsw", "ef_search"), ("ivf", "nprobe"), ("ivfpq", "nprobe"), ("rabitq", "nprobe")])
def test_search_parameters_travel_with_the_saved_index(spec, field, vectors, queries, built):
    true = ExactSearcher(vectors, range(2_000)).search(queries, 10).rows

    def recall(value: int) -> float:
        found = Index.open(built({"kind": spec, field: value}, vectors)).search(queries, 10).rows
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)]))

    assert recall(1) < recall(200)


def test_flat_with_fp32_is_exact(queries, built):
    vectors = unit(clustered(2_000, 32).astype(np.float16))
    index = Index.open(built("flat", lambda: [([f"doc-{row}" for row in range(2_000)], vectors)]))
    true, found = ExactSearcher(vectors, index.ids).search(queries, 10), index.search(queries, 10)
    np.testing.assert_array_equal(found.rows, true.rows)
    np.testing.assert_allclose(found.scores, true.scores, atol=1e-5)


def test_ivf_on_few_documents_says_how_many_lists_it_makes(built, caplog):
    caplog.set_level("INFO")
    built({"kind": "ivf", "lists": 64}, clustered(3, 8))
    assert "1 lists instead of 64" in caplog.text


def test_ivf_lists_grow_with_the_corpus_and_keep_39_documents_each():
    ivf = kind_of("ivf")
    assert [ivf.factory(count, 8) for count in (3, 2_000, 1_000_000)] == ["IVF1,SQ8", "IVF51,SQ8", "IVF4000,SQ8"]
    assert kind_of({"kind": "ivf", "lists": 100, "codes": "fp32"}).factory(1_000_000, 8) == "IVF100,Flat"
    assert ivf.training_points(1_000_000) == 64 * 4_000


def test_gpu_search_is_offered_only_where_faiss_has_it():
    offered = ["flat", {"kind": "flat", "codes": "fp16"}, "ivf"]
    refused = [{"kind": "flat", "codes": "int8"}, "hnsw", {"kind": "ivf", "nprobe": 4_000}]
    assert all(kind_of(spec).gpu_search for spec in offered)
    assert not any(kind_of(spec).gpu_search for spec in refused)


@pytest.mark.parametrize("exact", [True, False], ids=["compared", "searched"])
@pytest.mark.parametrize("share", [0.002, 0.05, 0.5])
def test_a_search_among_some_rows_finds_the_nearest_of_them(built_once, vectors, queries, share, exact, monkeypatch):
    monkeypatch.setattr("indexes.index.EXACT_AMONG", 10_000 if exact else 0)
    index = Index.open(built_once[0])
    among = np.sort(np.random.default_rng(3).choice(2_000, round(2_000 * share), replace=False))
    found = index.search(queries, 10, among=among)
    true = among[ExactSearcher(vectors[among], range(len(among))).search(queries, min(10, len(among))).rows]
    assert np.isin(found.rows[found.rows >= 0], among).all()
    assert np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.rows, true, strict=True)]) >= 0.85
    assert (found.rows[:, len(among) :] == -1).all()


def test_a_search_among_nothing_finds_nothing_and_wrong_rows_are_refused(built_once, queries):
    index = Index.open(built_once[0])
    assert (index.search(queries, 3, among=np.array([], dtype=np.int64)).rows == -1).all()
    for wrong in ([-1, 2], [5, 2], [3, 3], [1, 2_000]):
        with pytest.raises(ContractError, match="expected ascending rows from 0 to 1999"):
            index.search(queries, 3, among=np.array(wrong))
