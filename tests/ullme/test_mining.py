from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_runs import DOCUMENTS, QRELS, QUERIES, beir_data, encoded, tiny_model, write_beir

from benchmarks.mine_memory import MOST_SHARE, QUICK_COUNTS, measure
from ullme import mining_context
from ullme.artifacts import ArtifactRef, Store
from ullme.components import kinds
from ullme.data import PREPARE, DataConfig, Dataset, Document, read_examples
from ullme.encoder import Encoder
from ullme.errors import ConfigError, ContractError, DataError
from ullme.mining import MINE, MiningConfig
from ullme.shards import Shard, open_embeddings, shard_name


def mined(store: Store, refs: dict[str, ArtifactRef], *, seed: int = 0, **fields: Any) -> ArtifactRef:
    return store.produce(MINE, MiningConfig.model_validate(fields), refs, seed=seed)


def rows_of(ref: ArtifactRef) -> dict[str, list[str]]:
    return {row["query_id"]: row["doc_ids"] for row in pq.read_table(ref.path / "negatives.parquet").to_pylist()}


def report_of(ref: ArtifactRef) -> dict[str, Any]:
    return json.loads((ref.path / "report.json").read_text(encoding="utf-8"))


def test_every_train_query_gets_negatives_that_training_can_read(store: Store, dates: ArtifactRef) -> None:
    ref = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 2})
    rows = rows_of(ref)
    assert set(rows) == set(QRELS["train"])
    assert rows == {"q1": ["free"], "q2": ["mean"], "q3": ["free"]}
    examples = {example.query_id: example for example in read_examples(dates.path, ref.path)}
    for name, example in examples.items():
        assert list(example.negative_ids) == rows[name]
        assert example.scores is not None
        assert example.scores == tuple(sorted(example.scores, reverse=True))


def test_what_answers_dev_and_test_queries_is_never_a_negative(store: Store, dates: ArtifactRef) -> None:
    held = {"close", "held", "json", "sort"}
    ref = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 11, "depth": 11})
    assert not held & {doc for docs in rows_of(ref).values() for doc in docs}
    assert report_of(ref)["pool"] == {"rule": "train_only", "documents": 7, "left_out": 4}
    everything = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 11, "depth": 11}, pool="all")
    assert held & {doc for docs in rows_of(everything).values() for doc in docs}


def test_a_copy_of_a_held_out_document_is_held_out_too(store: Store, tmp_path: Path) -> None:
    documents = DOCUMENTS | {"held-copy": DOCUMENTS["held"].upper()}
    data = beir_data(store, write_beir(tmp_path / "copies", documents=documents))
    ref = mined(store, {"data": data}, miner={"kind": "bm25", "num_negatives": 12, "depth": 12})
    assert "held-copy" not in {doc for docs in rows_of(ref).values() for doc in docs}


def test_positives_and_their_copies_are_left_out(store: Store, dates: ArtifactRef) -> None:
    rows = rows_of(mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 11, "depth": 11}))
    assert not {"parse", "parse-copy", "format"} & set(rows["q1"])
    assert "free" in rows["q1"]


def test_the_sources_own_negatives_come_first(store: Store, tmp_path: Path) -> None:
    pairs = [
        {
            "query": "parse a date",
            "pos": ["parse a date string"],
            "neg": ["unrelated words", "PARSE a date string", "format a date"],
        },
        {"query": "sum a list", "pos": ["sum of a list"], "neg": []},
        {"query": "read a file", "pos": ["read lines of a file"], "neg": []},
        {"query": "parse json", "pos": ["parse a json document"], "neg": []},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = DataConfig.model_validate({"source": {"kind": "jsonl", "path": str(file)}, "dev_share": 0, "test_share": 0})
    ref = store.produce(PREPARE, config.resolved(), {}, seed=0)
    data = Dataset.open(ref.path)
    negatives = mined(store, {"data": ref}, miner={"kind": "bm25", "num_negatives": 1})
    query = next(query for query in data.queries("train") if query.text == "parse a date")
    texts = [data.document(name).content for name in rows_of(negatives)[query.id]]
    assert texts == ["unrelated words", "format a date", "parse a json document"]
    report = report_of(negatives)["negatives"]
    assert report["from_source"] == 2
    assert report["source_dropped"] == {"same text as a positive": 1}


def test_shortfalls_are_counted_and_said(store: Store, dates: ArtifactRef, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ref = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 10, "depth": 10})
    got = sum(len(docs) for docs in rows_of(ref).values())
    assert report_of(ref)["shortfall"] == {"queries": 3, "negatives": 30 - got, "wanted": 10}
    assert f"3 of 3 queries got fewer than 10 negatives ({30 - got} missing in all); they stay short" in caplog.text
    assert ref.meta["short_queries"] == 3


def test_the_teachers_ndcg_follows_the_formula(store: Store, tmp_path: Path) -> None:
    documents = {"a": "apple pear", "b": "apple apple apple", "c": "plum"}
    qrels = {"train": {"q": {"a": 1, "b": 3, "c": 2}}}
    data = beir_data(store, write_beir(tmp_path / "fruit", documents=documents, queries={"q": "apple"}, qrels=qrels))
    ref = mined(store, {"data": data}, miner={"kind": "bm25", "num_negatives": 1})
    # BM25 puts b (grade 3) first and a (grade 1) second, and does not find c (grade 2).
    expected = (3 + 1 / math.log2(3)) / (3 + 2 / math.log2(3) + 1 / 2)
    assert report_of(ref)["teachers"] == {"bm25": {"ndcg_at_10": pytest.approx(expected, abs=1e-5), "queries": 1}}
    assert ref.meta["teacher_ndcg_at_10_bm25"] == pytest.approx(expected, abs=1e-5)


def test_the_teacher_is_measured_on_as_many_queries_as_asked(store: Store, dates: ArtifactRef) -> None:
    assert report_of(mined(store, {"data": dates}, teacher_queries=2))["teachers"]["bm25"]["queries"] == 2


def test_an_untrained_teacher_below_bm25_is_called_so(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("bcdfghjkl"), 5)) for _ in range(200)]
    documents = {f"d{n}": " ".join(random.choice(words, 9)) for n in range(60)}
    queries = {f"q{n}": " ".join(documents[f"d{n}"].split()[:2]) for n in range(20)}
    qrels = {"train": {f"q{n}": {f"d{n}": 1} for n in range(20)}}
    data = beir_data(store, write_beir(tmp_path / "random", documents=documents, queries=queries, qrels=qrels))
    with caplog.at_level(logging.WARNING):
        ref = mined(store, {"data": data, "model": tiny_model(store)}, miner={"kind": "topk", "num_negatives": 2})
    teachers = report_of(ref)["teachers"]
    assert teachers["model"]["ndcg_at_10"] < 0.5 < 0.9 < teachers["bm25"]["ndcg_at_10"]
    assert "the teacher 'model' ranks worse than BM25" in caplog.text


def test_stored_embeddings_are_used_and_give_the_same_negatives(
    store: Store, dates: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(store)
    refs = {"data": dates, "model": model}
    plain = mined(store, refs, miner={"kind": "topk"})
    embeddings = encoded(store, dates, model)
    asked, encode = [], Encoder.encode

    def counted(self: Encoder, texts: Any, **options: Any) -> np.ndarray:
        asked.append((options["prompt"], len(texts)))
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    stored = mined(store, {**refs, "embeddings": embeddings}, miner={"kind": "topk"})
    assert rows_of(stored) == rows_of(plain)
    assert asked == [("query", 3)]


def test_embeddings_of_another_model_are_refused(store: Store, dates: ArtifactRef) -> None:
    embeddings = encoded(store, dates, tiny_model(store, pooling="last"))
    with pytest.raises(ContractError, match="encode the corpus with it first"):
        mined(store, {"data": dates, "model": tiny_model(store), "embeddings": embeddings}, miner={"kind": "topk"})


def test_vectors_without_a_model_are_a_configuration_error(store: Store, dates: ArtifactRef) -> None:
    with pytest.raises(ConfigError, match="needs a model's vectors"):
        mined(store, {"data": dates}, miner={"kind": "perc_pos"})


def test_data_without_train_queries_are_refused(store: Store, tmp_path: Path) -> None:
    data = beir_data(store, write_beir(tmp_path / "test_only", qrels={"test": QRELS["test"]}))
    with pytest.raises(DataError, match="no train query"):
        mined(store, {"data": data})


def test_the_report_shows_rows_with_their_texts(store: Store, dates: ArtifactRef) -> None:
    ref = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 2})
    report = report_of(ref)
    assert {sample["query_id"] for sample in report["samples"]} == set(QRELS["train"])
    sample = next(sample for sample in report["samples"] if sample["query_id"] == "q1")
    assert sample["query"] == QUERIES["q1"]
    assert {positive["id"]: positive["text"] for positive in sample["positives"]}["parse"] == DOCUMENTS["parse"]
    assert sample["negatives"][0]["text"] == DOCUMENTS[sample["negatives"][0]["id"]]
    assert sum(report["scores"]["counts"]) == report["negatives"]["mined"] == ref.meta["mined"]
    assert report["suspected_false_negatives"] == ref.meta["suspected_false_negatives"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir")
    digests = set()
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        digests.add(mined(store, {"data": beir_data(store, folder)}, miner={"kind": "bm25", "sampling": "random"}).digest)
    assert len(digests) == 1


def test_the_seed_changes_random_sampling_only(store: Store, tmp_path: Path) -> None:
    documents = {f"d{n}": f"list {word}" for n, word in enumerate(["red", "green", "blue", "black", "white", "grey"])}
    qrels = {"train": {"q": {"d0": 1}}}
    data = beir_data(store, write_beir(tmp_path / "colours", documents=documents, queries={"q": "red list"}, qrels=qrels))
    drawn, best = (
        {tuple(rows_of(mined(store, {"data": data}, miner=miner, seed=seed))["q"]) for seed in range(6)}
        for miner in ({"kind": "bm25", "num_negatives": 2, "sampling": "random"}, {"kind": "bm25", "num_negatives": 2})
    )
    assert len(drawn) > 1
    assert best == {("d1", "d2")}


def test_the_section_knows_whether_it_needs_a_model() -> None:
    assert not MiningConfig().miner.needs_model
    assert MiningConfig.model_validate({"miner": "topk"}).miner.needs_model


# A pool that lies on the disk


@pytest.mark.parametrize("kind", kinds("ullme.miners"))
def test_every_kind_takes_what_the_source_gave(kind: str, store: Store, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]
    pairs = [{"query": f"the {word} one", "pos": [f"one that is {word}"], "neg": [f"a {word} thing"]} for word in words]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = DataConfig.model_validate({"source": {"kind": "jsonl", "path": str(file)}, "dev_share": 0, "test_share": 0})
    refs = {"data": store.produce(PREPARE, config.resolved(), {}, seed=0), "model": tiny_model(store)}
    fields: dict[str, Any] = {
        "mixed": {"miners": [{"kind": "bm25", "num_negatives": 2}, {"kind": "random", "num_negatives": 1}]},
        "rank_window": {"skip_top": 1, "depth": 9, "num_negatives": 3},
        "margin_pos": {"margin": 0.0},
    }
    negatives = mined(store, refs, miner={"kind": kind, **fields.get(kind, {})})
    report = report_of(negatives)["negatives"]
    assert report["from_source"] == len(words)
    assert report["mined"] > 0
    texts = {document.id: document.content for document in Dataset.open(refs["data"].path).documents()}
    assert {texts[names[0]] for names in rows_of(negatives).values()} == {f"a {word} thing" for word in words}


@pytest.mark.parametrize("torn", [0, 3])
def test_an_interrupted_run_does_not_encode_again_what_it_has(
    torn: int, store: Store, dates: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(store)
    refs = {"data": dates, "model": model}
    monkeypatch.setattr(mining_context, "ENCODED_AT_ONCE", 2)
    other = Store(tmp_path / "other")
    expected = rows_of(mined(other, refs, miner={"kind": "topk"}))
    encode, asked = Encoder.encode, []

    def killed(self: Encoder, texts: Any, **options: Any) -> np.ndarray:
        if len(asked) == torn:
            raise KeyboardInterrupt
        asked.append((options["prompt"], list(texts)))
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        mined(store, refs, miner={"kind": "topk"})
    first = list(asked)
    torn = -1
    again = mined(store, refs, miner={"kind": "topk"})
    assert rows_of(again) == expected
    texts = [text for _, some in asked for text in some]
    assert len(texts) == len(set(texts)) == 7 + 3  # the pool and the queries, each once in both attempts together
    assert asked[: len(first)] == first


def test_vectors_are_found_whatever_their_order(tmp_path: Path) -> None:
    documents = [Document(f"d{number}", "") for number in range(300)]
    stored = np.random.default_rng(0).permutation(400)[:250]
    vectors = np.arange(250, dtype=np.float16)[:, None] * np.ones((1, 4), np.float16)
    for number, part in enumerate(np.array_split(np.arange(250), 3)):
        shard = Shard.of([Document(f"d{stored[row]}", "") for row in part], 4)
        shard.vectors[:] = vectors[part]
        common = {"fingerprint": "m", "dim": 4, "prompt": "", "input": "", "shards": 3, "rows": len(part)}
        shard.write(tmp_path, shard_name(number), common)
    found = open_embeddings(tmp_path)
    at = mining_context.stored_rows(documents, found)
    expected = {int(name): row for row, name in enumerate(stored)}
    assert at.tolist() == [expected.get(number, -1) for number in range(300)]
    there = np.flatnonzero(at >= 0)
    np.testing.assert_array_equal(found[at[there]][:, 0], at[there].astype(np.float16))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pool() -> None:
    result = measure(QUICK_COUNTS)
    assert result["cached"]["share_of_vectors"] <= MOST_SHARE
    assert result["scratch"]["share_of_vectors"] <= MOST_SHARE
