"""What building refuses, what opening refuses, and the contract of search."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from corpora import clustered, in_shards, kind_of, names, unit

from indexes import _corpus
from indexes.build import build
from indexes.index import Index
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.neighbours import ExactSearcher

DIM = 16


@pytest.fixture
def vectors():
    return clustered(200, DIM)


@pytest.fixture
def path(built, vectors):
    return built("flat", in_shards(vectors, 120))


def refuses_to_build(out, *shards, message):
    with pytest.raises(ContractError, match=message) as caught:
        build(kind_of("flat"), lambda: iter(shards), out=out, fingerprint="a" * 64, seed=7)
    assert "\n" not in str(caught.value)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("value", "fault"),
    [(np.nan, "holds NaN or infinity"), (np.inf, "holds NaN or infinity"), (0.0, "is zero"), (3.0, "has norm 12")],
)
def test_a_bad_vector_is_refused_by_name(value, fault, vectors, tmp_path):
    vectors[131] = value
    refuses_to_build(
        tmp_path,
        (names(100), vectors[:100]),
        (names(200)[100:], vectors[100:]),
        message=f"shard 1: the vector of 'doc-131' {fault}",
    )


def test_a_repeated_id_is_refused(vectors, tmp_path):
    refuses_to_build(
        tmp_path, (names(100), vectors[:100]), (["x", "doc-5"], vectors[:2]), message="shard 1: id 'doc-5' was seen before"
    )


def test_shards_of_different_dims_are_refused(tmp_path):
    refuses_to_build(
        tmp_path, (["a"], clustered(1, 16)), (["b"], clustered(1, 8)), message="shard 1: expected vectors of dim 16.*got dim 8"
    )


def test_a_shard_with_too_few_ids_is_refused(vectors, tmp_path):
    refuses_to_build(tmp_path, (names(3), vectors[:4]), message=r"shard 0: expected \[n D\].*got \[4, 16\] of float32 and 3 ids")


def test_an_empty_corpus_is_refused(tmp_path):
    refuses_to_build(tmp_path, message="at least one vector")
    refuses_to_build(tmp_path, ([], np.empty((0, DIM), dtype=np.float16)), message="at least one vector")


def test_shards_that_can_be_walked_only_once_are_refused(vectors, tmp_path):
    once = iter([(names(200), vectors)])
    with pytest.raises(ContractError, match="expected 200 vectors on every walk, got 0"):
        build(kind_of("flat"), lambda: once, out=tmp_path, fingerprint="a" * 64, seed=7)


def test_blocks_cross_the_borders_of_shards(vectors, monkeypatch):
    monkeypatch.setattr(_corpus, "BLOCK_ROWS", 64)
    corpus = _corpus.Corpus(in_shards(vectors, 10, 0, 130))
    blocks = list(corpus.blocks())
    assert [len(block) for block in blocks] == [64, 64, 64, 8]
    np.testing.assert_array_equal(np.concatenate(blocks), vectors.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(corpus.gather(np.array([0, 9, 10, 199])), np.concatenate(blocks)[[0, 9, 10, 199]])


def test_recall_is_measured_over_all_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(_corpus, "BLOCK_ROWS", 64)
    meta = build(kind_of("flat"), in_shards(clustered(500, DIM)), out=tmp_path, fingerprint="a" * 64, seed=7)
    assert meta["recall_at_10"] == 1


def test_another_seed_trains_on_another_sample(built):
    vectors = clustered(3_000, DIM)
    spec = {"kind": "ivf", "lists": 4}
    one, other = built(spec, vectors, seed=1), built(spec, vectors, seed=2)
    assert (one / "index.faiss").read_bytes() != (other / "index.faiss").read_bytes()


def test_the_size_is_logged_before_building(built, vectors, caplog):
    caplog.set_level("INFO")
    built("flat", vectors)
    assert "index flat (Flat): 200 x 16, about 64 bytes per vector" in caplog.messages[0]


def test_no_partial_file_is_left(path):
    assert sorted(file.name for file in path.iterdir()) == ["ids.arrow", "index.faiss", "index.json"]


def test_building_again_replaces_what_an_earlier_attempt_left(path, vectors):
    (path / "index.faiss.partial").write_bytes(b"half")
    build(kind_of("flat"), in_shards(vectors[:50]), out=path, fingerprint="b" * 64, seed=7)
    assert Index.open(path, fingerprint="b" * 64).count == 50
    assert not (path / "index.faiss.partial").exists()


def test_queries_of_another_model_are_refused(path):
    with pytest.raises(
        ContractError, match="built with model aaaaaaaaaaaa, queries come from model bbbbbbbbbbbb: encode and build again"
    ):
        Index.open(path, fingerprint="b" * 64)


def refuses_to_open(path, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        Index.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow"])
def test_a_flipped_byte_is_refused(path, name):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    refuses_to_open(path, f"{name} is damaged")


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow"])
def test_a_truncated_file_is_refused(path, name):
    (path / name).write_bytes((path / name).read_bytes()[:-100])
    refuses_to_open(path, f"{name} is damaged")


@pytest.mark.parametrize(
    ("name", "message"), [("index.faiss", "is missing"), ("ids.arrow", "is missing"), ("index.json", "not an index")]
)
def test_a_missing_file_is_refused(path, name, message):
    (path / name).unlink()
    refuses_to_open(path, f"{name}.* {message}")


def test_the_vectors_of_refine_are_checked_like_every_file(built, vectors):
    path = built({"kind": "flat", "codes": "int8", "refine": "fp16"}, vectors)
    names = ["ids.arrow", "index.faiss", "index.json", "trained.faiss", "vectors.npy"]
    assert sorted(file.name for file in path.iterdir()) == names
    content = bytearray((path / "vectors.npy").read_bytes())
    content[-1] ^= 1
    (path / "vectors.npy").write_bytes(content)
    refuses_to_open(path, "vectors.npy is damaged")
    (path / "vectors.npy").unlink()
    refuses_to_open(path, "vectors.npy is missing")


def test_a_table_of_another_shape_is_refused_even_when_its_digest_fits(built, vectors):
    path = built({"kind": "flat", "codes": "int8", "refine": "fp16"}, vectors)
    np.save(path / "vectors.npy", vectors[:50].astype(np.float16))
    card = json.loads((path / "index.json").read_text())
    card["files"]["vectors.npy"] = _sha256(path / "vectors.npy")
    (path / "index.json").write_text(json.dumps(card))
    refuses_to_open(path, "vectors.npy is not of this index")


def test_comparing_once_more_gives_exact_scores_in_order(built):
    vectors = clustered(600, DIM)
    index = Index.open(built({"kind": "flat", "codes": "int8", "refine": "fp32", "k_factor": 10}, vectors))
    queries = clustered(640, DIM)[600:]
    found, exact = (
        index.search(queries, 10),
        ExactSearcher(vectors.astype(np.float16).astype(np.float32), index.ids).search(queries, 10),
    )
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-6)


def test_comparing_once_more_in_parts_gives_the_same(built, vectors, monkeypatch):
    path = built({"kind": "rabitq", "refine": "fp16"}, vectors)
    whole = Index.open(path).search(vectors[:40], 7)
    monkeypatch.setattr(_corpus, "GATHERED_BYTES", 1)
    np.testing.assert_array_equal(Index.open(path).search(vectors[:40], 7).rows, whole.rows)


def test_the_card_of_another_index_is_refused(path, built):
    shutil.copy(built("flat", clustered(200, DIM, seed=3)) / "index.json", path)
    refuses_to_open(path, "ids.arrow is damaged or belongs to another index")


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"format": 1, "metric": "inner_product", "files": {}}'])
def test_a_foreign_card_is_refused(path, text):
    (path / "index.json").write_text(text)
    refuses_to_open(path, "index.json is not one that this version wrote")


@pytest.mark.parametrize(
    "change",
    [{"format": 99}, {"metric": "l2"}, {"kind": {"kind": "gone"}}, {"kind": {"kind": "flat", "new": 1, "newer": 2}}, {"files": {}}],
)
def test_a_card_of_another_version_is_refused(path, change):
    card = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(card | change))
    refuses_to_open(path, "index.json is not one that this version wrote")


def test_a_card_that_counts_otherwise_is_refused(path):
    card = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(card | {"count": 199}))
    refuses_to_open(path, "says 199 vectors in 200 rows, its faiss files hold 200 and ids.arrow 200, of which 200 are alive")


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow"])
def test_a_file_of_another_format_is_refused_even_when_its_digest_fits(path, name):
    card = json.loads((path / "index.json").read_text())
    (path / name).write_bytes(b"something else entirely")
    card["files"][name] = _sha256(path / name)
    (path / "index.json").write_text(json.dumps(card))
    refuses_to_open(path, "cannot read it|not a table of ids")


def test_a_forged_length_cannot_exhaust_the_memory(path):
    card = json.loads((path / "index.json").read_text())
    content = bytearray((path / "index.faiss").read_bytes())
    place = content.index((200 * DIM).to_bytes(8, "little"))  # the length of the array of codes, in floats
    content[place : place + 8] = (2**36).to_bytes(8, "little")
    (path / "index.faiss").write_bytes(content)
    card["files"]["index.faiss"] = _sha256(path / "index.faiss")
    (path / "index.json").write_text(json.dumps(card))
    refuses_to_open(path, "faiss cannot read it")


def _sha256(file):
    from ullme.artifacts import sha256_file

    return sha256_file(file)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros(DIM, dtype=np.float32), r"expected \[Q 16\] numbers, got \[16\]"),
        (np.zeros((2, 8), dtype=np.float32), r"expected \[Q 16\] numbers, got \[2, 8\]"),
        (np.array([["a"] * DIM]), "numbers, got"),
        (np.array([[0.0] * DIM, [np.nan] * DIM]), "query 1 holds NaN"),
    ],
)
def test_queries_of_another_shape_or_not_finite_are_refused(path, queries, message):
    with pytest.raises(ContractError, match=message):
        Index.open(path).search(queries, 3)


def test_k_below_one_is_refused(path, vectors):
    with pytest.raises(ContractError, match="k >= 1, got 0"):
        Index.open(path).search(vectors[:1], 0)


def test_k_beyond_the_corpus_is_padded(path, vectors):
    found = Index.open(path).search(vectors[:2], 300)
    assert found.rows.shape == (2, 300)
    assert sorted(found.rows[0, :200]) == list(range(200))
    assert (found.rows[:, 200:] == -1).all()


def test_a_gpu_that_is_not_there_is_refused_and_auto_uses_the_cpu(path, vectors):
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("this machine has a GPU that faiss can use")
    with pytest.raises(ConfigError, match="device: gpu was asked for, but faiss sees no GPU"):
        Index.open(path, device="gpu")
    assert Index.open(path, device="auto").search(vectors[:1], 1).rows[0, 0] == 0


def test_a_gpu_copy_answers_like_the_cpu(path, vectors):
    import faiss

    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        pytest.skip("faiss sees no GPU")
    cpu, gpu = (Index.open(path, device=device).search(vectors, 10) for device in ("cpu", "gpu"))
    np.testing.assert_array_equal(cpu.rows, gpu.rows)
    np.testing.assert_allclose(cpu.scores, gpu.scores, atol=1e-4)


def test_without_faiss_the_message_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"install ullme\[cpu\] or ullme\[gpu\]"):
        Index.open(path)


def test_two_faiss_packages_are_refused(path, tmp_path, monkeypatch):
    for name in ("faiss_cpu", "faiss_gpu"):
        info = tmp_path / "site" / f"{name}-1.15.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ConfigError, match="faiss-cpu and faiss-gpu are both installed"):
        Index.open(path)


def away_from(vectors, count, *, seed=5):
    """Queries unlike the documents: between two of them, with noise."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, len(vectors), (count, 2))
    return unit(vectors[pairs[:, 0]] + vectors[pairs[:, 1]] + 0.3 * rng.normal(size=(count, vectors.shape[1])))


def test_an_index_is_examined_and_tuned_with_the_queries_that_it_is_given(tmp_path):
    vectors = clustered(6_000, 32)
    asked, unseen = away_from(vectors, 200), away_from(vectors, 400, seed=6)
    true = ExactSearcher(vectors, range(len(vectors))).search(unseen, 10).rows
    reached, searched = {}, {}
    for name, queries in (("documents", None), ("queries", asked)):
        (out := tmp_path / name).mkdir()
        spec = kind_of({"kind": "ivf", "min_recall": 0.9, "codes": "fp32"})
        meta = build(spec, in_shards(vectors), out=out, fingerprint="a" * 64, seed=7, queries=queries)
        assert meta["exam"] == name
        index = Index.open(out)
        found = index.search(unseen, 10).rows
        reached[name] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true, found, strict=True)])
        searched[name] = index.kind.nprobe
    assert reached["queries"] >= 0.9 > reached["documents"]
    assert searched["queries"] > searched["documents"]


def test_too_few_queries_are_no_exam_and_wrong_ones_are_refused(vectors, tmp_path):
    spec = kind_of("flat")
    assert build(spec, in_shards(vectors), out=tmp_path, fingerprint="a", seed=1, queries=vectors[:10])["exam"] == "documents"
    for wrong in (clustered(50, 8), np.full((50, DIM), np.nan, np.float32)):
        with pytest.raises(ContractError, match="expected finite queries of dim 16 to examine it with"):
            build(spec, in_shards(vectors), out=tmp_path, fingerprint="a", seed=1, queries=wrong)
