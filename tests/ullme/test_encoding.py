from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import ToyData, toy_data

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.batches import Batch
from ullme.data import PREPARE, DataConfig, Dataset
from ullme.encoder import Encoder
from ullme.encoding import ENCODE, EncodeConfig, EncodeJob, encode, encode_part, open_embeddings
from ullme.errors import ArtifactError, DataError, NotFinite
from ullme.shards import Shard

SHARDS = EncodeConfig.model_validate({"runtime": {"shard_rows": 10}})  # 24 documents: 10, 10 and 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def refs(store: Store) -> dict[str, ArtifactRef]:
    base = BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=24)
    return {"data": toy_data(store), "model": store.produce(BACKBONE, base, {}, seed=0)}


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    made = Draft(tmp_path / "artifact", tmp_path / "scratch", 0)
    made.restart()
    return made


@pytest.fixture
def rows_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of every batch that really went through the model, of the corpus alone."""
    monkeypatch.setattr("ullme.encoding.EXAM_QUERIES", 0)
    plain, calls = Encoder.embed, []

    def counted(self: Encoder, batch: Batch) -> Any:
        calls.append(len(batch.input_ids))
        return plain(self, batch)

    monkeypatch.setattr(Encoder, "embed", counted)
    return calls


def run(store: Store, refs: dict[str, ArtifactRef], draft: Draft, section: EncodeConfig = SHARDS) -> np.ndarray:
    """Encode into the draft; nothing can be taken from a store that is empty."""
    encode(section, Inputs(Store(draft.path.parent / "empty"), refs), draft)
    return open_embeddings(draft.path).vectors()


def test_vectors_are_those_of_the_encoder_in_the_order_of_the_documents(store: Store, refs: dict[str, ArtifactRef]) -> None:
    found = open_embeddings(store.open(store.produce(ENCODE, SHARDS, refs, seed=0), "embeddings"))
    corpus = Dataset.open(refs["data"].path).corpus()
    expected = Encoder.load(refs["model"].path).encode([document.content for document in corpus], prompt="document")
    assert found.ids == [document.id for document in corpus]
    assert np.abs(found.vectors() - expected).max() <= 1e-3
    assert np.allclose(np.linalg.norm(found.vectors(), axis=1), 1, atol=1e-3)
    assert (found.count, found.dim, found.fingerprint) == (24, 64, refs["model"].digest)
    blocks = list(found.shards())
    assert [len(ids) for ids, _ in blocks] == [10, 10, 4]
    assert all(isinstance(block, np.memmap) and block.dtype == np.float16 for _, block in blocks)


@pytest.mark.parametrize("runtime", [{"shard_rows": 1}, {"shard_rows": 7, "batch_tokens": 30}, {"batch_tokens": 1}, {}])
def test_shard_rows_and_batch_tokens_do_not_change_the_vectors(
    runtime: dict[str, int], store: Store, refs: dict[str, ArtifactRef], draft: Draft
) -> None:
    section = EncodeConfig.model_validate({"runtime": runtime})
    assert store.key(ENCODE, section, refs, seed=0) == store.key(ENCODE, SHARDS, refs, seed=0)
    expected = open_embeddings(store.produce(ENCODE, SHARDS, refs, seed=0).path)
    assert np.abs(run(store, refs, draft, section) - expected.vectors()).max() <= 1e-3
    assert open_embeddings(draft.path).ids == expected.ids


def damage(folder: Path, how: str) -> None:
    """Break the second of three shards."""
    victim = folder / "shard-00001.npy"
    if how == "flipped byte":
        content = bytearray(victim.read_bytes())
        content[-3] ^= 1
        victim.write_bytes(bytes(content))
    elif how == "no sidecar":
        (folder / "shard-00001.json").unlink()
    elif how == "no vectors":
        victim.unlink()
    elif how == "no ids":
        (folder / "shard-00001.arrow").unlink()
    else:
        sidecar = json.loads((folder / "shard-00001.json").read_text())
        (folder / "shard-00001.json").write_text(json.dumps({**sidecar, "fingerprint": "0" * 64}))


@pytest.mark.parametrize("how", ["flipped byte", "no sidecar", "no vectors", "no ids", "another model"])
def test_only_the_shard_that_is_missing_or_damaged_is_encoded_again(
    how: str, store: Store, refs: dict[str, ArtifactRef], draft: Draft, rows_encoded: list[int]
) -> None:
    expected = run(store, refs, draft)
    assert sum(rows_encoded) == 24
    rows_encoded.clear()
    damage(draft.path, how)
    assert np.array_equal(run(store, refs, draft), expected)
    assert sum(rows_encoded) == 10


def test_an_interrupted_stage_goes_on_with_the_next_shard(
    refs: dict[str, ArtifactRef], tmp_path: Path, rows_encoded: list[int]
) -> None:
    class Killed(BaseException):
        pass

    fresh = Store(tmp_path)
    plain = Shard.write

    def write(self: Shard, folder: Path, name: str, described: Any) -> None:
        if name == "shard-00002":
            raise Killed
        plain(self, folder, name, described)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "write", write)
        with pytest.raises(Killed):
            fresh.produce(ENCODE, SHARDS, refs, seed=0)
    rows_encoded.clear()
    ref = fresh.produce(ENCODE, SHARDS, refs, seed=0)
    assert sum(rows_encoded) == 4
    assert ref.digest == Store(tmp_path / "other").produce(ENCODE, SHARDS, refs, seed=0).digest


def test_an_attempt_with_smaller_shards_leaves_nothing_behind(store: Store, refs: dict[str, ArtifactRef], draft: Draft) -> None:
    run(store, refs, draft, EncodeConfig.model_validate({"runtime": {"shard_rows": 3}}))
    run(store, refs, draft)
    found = open_embeddings(draft.path)
    assert found.count == 24
    assert len(set(found.ids)) == 24


def test_vectors_of_another_model_are_never_kept(
    store: Store, refs: dict[str, ArtifactRef], draft: Draft, rows_encoded: list[int]
) -> None:
    first = run(store, refs, draft)
    other = BackboneConfig(model="tiny:qwen2", dtype="float32", max_tokens=24)
    second = run(store, {**refs, "model": store.produce(BACKBONE, other, {}, seed=0)}, draft)
    assert sum(rows_encoded) == 2 * 24
    assert np.abs(first - second).max() > 0.01


def test_equal_texts_are_encoded_once_and_keep_their_places(
    store: Store, refs: dict[str, ArtifactRef], draft: Draft, rows_encoded: list[int]
) -> None:
    data = toy_data(store, ToyData(texts=("same", "other", "same", "third", "other"), train_queries=2))
    vectors = run(store, {**refs, "data": data}, draft)
    assert sum(rows_encoded) == 3
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[1], vectors[4])
    assert open_embeddings(draft.path).ids == ["d0", "d1", "d2", "d3", "d4"]
    expected = Encoder.load(refs["model"].path).encode(["same", "other", "same", "third", "other"], prompt="document")
    assert np.abs(vectors - expected).max() <= 1e-3


def test_the_share_that_is_cut_is_counted_also_after_a_restart(store: Store, refs: dict[str, ArtifactRef], draft: Draft) -> None:
    data = toy_data(store, ToyData(texts=("short", "x" * 100, "brief", "y" * 25), train_queries=2))
    for _ in range(2):
        run(store, {**refs, "data": data}, draft)
        draft.meta.pop("texts_encoded")
        assert draft.meta == {
            "count": 4,
            "dim": 64,
            "share_truncated": 0.5,
            "share_text_lost": round((100 - 24 + 25 - 24) / (5 + 100 + 5 + 25), 4),
            "fingerprint": refs["model"].digest,
        }


def test_a_vector_that_is_not_finite_names_its_document(store: Store, refs: dict[str, ArtifactRef], draft: Draft) -> None:
    def poison(section: Any, inputs: Inputs, made: Draft) -> None:
        shutil.copytree(inputs["model"], made.path, dirs_exist_ok=True)
        (made.path / "manifest.json").unlink()
        weights = load_file(made.path / "model.safetensors")
        token = Encoder.load(inputs["model"]).tokenizer("z")["input_ids"][0]
        weights["model.embed_tokens.weight"][token] = torch.nan
        save_file(weights, made.path / "model.safetensors", metadata={"format": "pt"})

    broken = store.produce(Stage("poison", "model", 1, poison), EncodeConfig(), {"model": refs["model"]}, seed=0)
    data = toy_data(store, ToyData(texts=("fine", "good", "a zebra", "well"), train_queries=2))
    with pytest.raises(NotFinite, match="embedding is not finite") as caught:
        run(store, {"data": data, "model": broken}, draft)
    assert caught.value.ids == ("d2",)
    assert not list(draft.path.glob("*.json"))


def test_an_empty_corpus_is_refused(
    store: Store, refs: dict[str, ArtifactRef], draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dataset, "corpus", lambda self: [])
    with pytest.raises(DataError, match="no searchable document"):
        run(store, refs, draft)


def test_opening_something_incomplete_or_mixed_is_refused(
    store: Store, refs: dict[str, ArtifactRef], draft: Draft, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"expected shard-\*\.json files, found none"):
        open_embeddings(tmp_path)
    run(store, refs, draft)
    damage(draft.path, "another model")
    with pytest.raises(ArtifactError, match=r"shard 1 was made by another model .* \(its model differs\)"):
        open_embeddings(draft.path)
    run(store, refs, draft)
    damage(draft.path, "no vectors")
    with pytest.raises(ArtifactError, match=r"shard-00001\.npy is missing"):
        open_embeddings(draft.path)
    damage(draft.path, "no sidecar")
    with pytest.raises(ArtifactError, match=r"1 of 3 shards missing \(number 1\)"):
        open_embeddings(draft.path)
    run(store, refs, draft)
    for suffix in ("npy", "arrow", "json"):
        (draft.path / f"shard-00002.{suffix}").unlink()
    with pytest.raises(ArtifactError, match=r"1 of 3 shards missing \(number 2\)"):
        open_embeddings(draft.path)


# A corpus that changed

TEXTS = tuple(f"document number {number} about {word}" for number, word in enumerate(["rain", "snow", "wind", "fog"] * 6))


def changed(store: Store, refs: dict[str, ArtifactRef], texts: tuple[str, ...]) -> dict[str, ArtifactRef]:
    return {**refs, "data": toy_data(store, ToyData(texts=texts, train_queries=2))}


def test_only_new_and_changed_texts_are_encoded(refs: dict[str, ArtifactRef], tmp_path: Path, rows_encoded: list[int]) -> None:
    store = Store(tmp_path)
    store.produce(ENCODE, SHARDS, changed(store, refs, TEXTS), seed=0)
    rows_encoded.clear()
    texts = ("quite new", *TEXTS[3:10], "edited", *TEXTS[11:], TEXTS[5])
    ref = store.produce(ENCODE, SHARDS, changed(store, refs, texts), seed=0)
    assert sum(rows_encoded) == 2
    assert ref.meta["texts_encoded"] == 2
    expected = Encoder.load(refs["model"].path).encode(list(texts), prompt="document")
    assert np.abs(open_embeddings(ref.path).vectors() - expected).max() <= 1e-3


def test_a_text_that_comes_back_is_found_in_an_older_artifact(
    refs: dict[str, ArtifactRef], tmp_path: Path, rows_encoded: list[int]
) -> None:
    store = Store(tmp_path)
    for texts in (TEXTS, TEXTS[:4]):
        store.produce(ENCODE, SHARDS, changed(store, refs, texts), seed=0)
    rows_encoded.clear()
    ref = store.produce(ENCODE, SHARDS, changed(store, refs, TEXTS[2:20]), seed=0)
    assert sum(rows_encoded) == 0
    assert ref.meta["texts_encoded"] == 0


def test_the_share_that_is_cut_counts_vectors_that_were_taken_over(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.produce(ENCODE, SHARDS, changed(store, refs, ("short", "x" * 100, "brief", "y" * 99)), seed=0)
    second = store.produce(ENCODE, SHARDS, changed(store, refs, ("short", "x" * 100, "brief", "new")), seed=0)
    assert (first.meta["share_truncated"], second.meta["share_truncated"]) == (0.5, 0.25)


def test_nothing_is_taken_from_another_model_or_a_damaged_artifact(
    store: Store, refs: dict[str, ArtifactRef], tmp_path: Path, rows_encoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Store(tmp_path)
    first = fresh.produce(ENCODE, SHARDS, changed(fresh, refs, TEXTS), seed=0)
    rows_encoded.clear()
    other = store.produce(BACKBONE, BackboneConfig(model="tiny:qwen2", dtype="float32", max_tokens=24), {}, seed=0)
    fresh.produce(ENCODE, SHARDS, {**changed(fresh, refs, TEXTS), "model": other}, seed=0)
    assert sum(rows_encoded) == len(TEXTS)
    rows_encoded.clear()
    damage(first.path, "flipped byte")
    Store(tmp_path).produce(ENCODE, SHARDS, changed(fresh, refs, TEXTS[1:]), seed=0)
    assert sum(rows_encoded) == len(TEXTS) - 1
    assert "nothing is taken over from a damaged artifact" in caplog.text


# Windows


def test_the_window_decides_which_equal_texts_are_encoded_once(store: Store, refs: dict[str, ArtifactRef], draft: Draft) -> None:
    data = changed(store, refs, ("same", "other", "same", "third", "same", "same"))
    vectors = []
    for window, count in ((6, 3), (3, 2 + 2), (1, 6)):
        draft.restart()
        vectors.append(run(store, data, draft, EncodeConfig.model_validate({"runtime": {"window": window}})))
        assert draft.meta["texts_encoded"] == count
    assert all(np.abs(found - vectors[0]).max() <= 1e-3 for found in vectors)


def test_vectors_made_with_another_prompt_are_not_taken_over(
    refs: dict[str, ArtifactRef], tmp_path: Path, rows_encoded: list[int]
) -> None:
    store = Store(tmp_path)
    first = store.produce(ENCODE, SHARDS, changed(store, refs, TEXTS), seed=0)
    for sidecar in first.path.glob("*.json"):
        if sidecar.name.startswith("shard-"):
            assert json.loads(sidecar.read_text())["prompt"] == "{text}"
    job = EncodeJob(
        model=refs["model"].path,
        fingerprint=refs["model"].digest,
        corpus=changed(store, refs, TEXTS)["data"].path,
        count=len(TEXTS),
        out=tmp_path / "queries",
        role="query",
        store=store.root,
    )
    job.out.mkdir()
    rows_encoded.clear()
    assert encode_part(job, lambda count: None).taken == 0
    assert sum(rows_encoded) == len(TEXTS)
    expected = Encoder.load(refs["model"].path).encode(list(TEXTS), prompt="query")
    assert np.abs(open_embeddings(job.out).vectors() - expected).max() <= 1e-3


def test_progress_reaches_every_document_encoded_taken_over_or_there_already(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for texts in (TEXTS[:12], TEXTS):
        data = changed(store, refs, texts)
        heard: list[int] = []
        job = EncodeJob(
            model=refs["model"].path,
            fingerprint=refs["model"].digest,
            corpus=data["data"].path,
            count=len(texts),
            out=tmp_path / f"{len(texts)}",
            runtime=SHARDS.runtime,
            store=store.root,
        )
        job.out.mkdir()
        encode_part(job, heard.append)
        assert sum(heard) == len(texts)
        heard.clear()
        encode_part(job, heard.append)
        assert sum(heard) == len(texts)
        store.produce(ENCODE, SHARDS, data, seed=0)


def test_some_queries_that_no_test_asks_are_encoded_beside_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullme.encoding.EXAM_QUERIES", 4)
    rows = [{"query": f"question {number}", "positive": f"answer {number}"} for number in range(12)]
    rows = [{**row, "split": ("train", "dev", "test")[number % 3]} for number, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "instruction": "Find it."}) + "\n" for row in rows))
    store = Store(tmp_path / "store")
    section = DataConfig.model_validate({"source": {"kind": "jsonl", "path": str(tmp_path / "pairs.jsonl")}})
    base = BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=24)
    refs = {"data": store.produce(PREPARE, section, {}, seed=0), "model": store.produce(BACKBONE, base, {}, seed=0)}
    found = open_embeddings(store.produce(ENCODE, SHARDS, refs, seed=0).path).queries()
    data, encoder = Dataset.open(refs["data"].path), Encoder.load(refs["model"].path)
    asked = [query for split in ("dev", "train", "test") for query in data.queries(split)]  # type: ignore[arg-type]
    vectors = encoder.encode(
        [query.text for query in asked],
        prompt="query",
        dataset=data.name,
        instructions=[query.instruction for query in asked],
    )
    assert found is not None
    assert found.shape == (4, encoder.dim)
    nearest = (found @ vectors.T).argmax(1)
    assert {asked[place].split for place in nearest} == {"dev"}
    np.testing.assert_allclose(found, vectors[nearest], atol=1e-3)


def test_documents_alone_have_no_queries_to_encode(store: Store, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "a", "text": "one text"}) + "\n")
    source = {"kind": "jsonl", "corpus": str(tmp_path / "corpus.jsonl")}
    data = store.produce(PREPARE, DataConfig.model_validate({"source": source, "held_out": "none"}), {}, seed=0)
    assert open_embeddings(store.produce(ENCODE, SHARDS, {**refs, "data": data}, seed=0).path).queries() is None
