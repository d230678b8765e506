from __future__ import annotations

import json
import logging
import math
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from small_runs import DOCUMENTS, QRELS, QUERIES, beir_data, encoded, tiny_model, write_beir

from ullme.artifacts import ArtifactRef, Store
from ullme.data import Dataset
from ullme.encoder import Encoder
from ullme.encoding import open_embeddings
from ullme.errors import ArtifactError, ContractError, DataError
from ullme.evaluation import EVALUATE, EvalConfig, compare, evaluate
from ullme.lexical import BM25Searcher
from ullme.neighbours import ExactSearcher, Neighbours, Searcher
from ullme.reranking import fused
from ullme.statistics import bootstrap_interval

ALL_METRICS = (
    "ndcg_at_10",
    "ndcg_at_3",
    "mrr_at_10",
    "recall_at_1",
    "recall_at_10",
    "map_at_10",
    "precision_at_3",
    "hit_rate_at_3",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def data(store: Store, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return beir_data(store, write_beir(tmp_path_factory.mktemp("data") / "beir"))


@pytest.fixture(scope="module")
def refs(store: Store, data: ArtifactRef) -> dict[str, ArtifactRef]:
    model = tiny_model(store)
    return {"data": data, "model": model, "embeddings": encoded(store, data, model)}


def report(store: Store, refs: dict[str, ArtifactRef], *, open_index: Any = None, seed: int = 0, **fields: Any) -> ArtifactRef:
    stage = EVALUATE if open_index is None else replace(EVALUATE, run=partial(evaluate, open_index=open_index))
    section = EvalConfig.model_validate({"bootstrap_samples": 200, **fields}).resolved()
    return store.produce(stage, section, refs, seed=seed)


def read(ref: ArtifactRef) -> dict[str, Any]:
    return json.loads((ref.path / "report.json").read_text(encoding="utf-8"))


def per_query(ref: ArtifactRef, column: str = "exact") -> dict[tuple[str, str], float]:
    rows = pq.read_table(ref.path / "per_query.parquet").to_pylist()
    return {(row["metric"], row["query_id"]): row[column] for row in rows}


def exact_index(path: Path, fingerprint: str) -> Searcher:
    stored = open_embeddings(path)
    assert stored.fingerprint == fingerprint
    return ExactSearcher(stored.vectors(), stored.ids)


class Reversed:
    """A broken index: the farthest documents first."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._searcher = exact_index(path, fingerprint)

    @property
    def ids(self) -> Any:
        return self._searcher.ids

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        return self._searcher.search(-vectors, k)


def test_graded_scores_equal_those_computed_by_hand(store: Store, tmp_path: Path) -> None:
    documents = {"a": "apple apple apple", "b": "apple apple pear", "c": "apple pear plum", "d": "plum", "e": "cherry"}
    queries, judged = {"q": "apple", "miss": "zebra"}, {"a": 1, "c": 3, "d": 2}
    qrels = {"test": {"q": judged, "miss": {"e": 1}}}
    data = beir_data(store, write_beir(tmp_path / "graded", documents=documents, queries=queries, qrels=qrels))
    ref = report(store, {"data": data}, metrics=ALL_METRICS)
    # BM25 ranks a, b, c (grades 1, 0, 3); d (grade 2) shares no word; the query "miss" finds nothing at all.
    ndcg = (1 + 3 / math.log2(4)) / (3 + 2 / math.log2(3) + 1 / math.log2(4))
    expected = {
        "ndcg_at_10": ndcg,
        "ndcg_at_3": ndcg,
        "mrr_at_10": 1.0,
        "recall_at_1": 1 / 3,
        "recall_at_10": 2 / 3,
        "map_at_10": (1 + 2 / 3) / 3,
        "precision_at_3": 2 / 3,
        "hit_rate_at_3": 1.0,
    }
    found = per_query(ref)
    assert {metric: found[metric, "q"] for metric in expected} == pytest.approx(expected, abs=1e-6)
    assert all(found[metric, "miss"] == 0 for metric in expected)
    assert read(ref)["scores"]["retrieval"] == pytest.approx({metric: value / 2 for metric, value in expected.items()}, abs=1e-5)


@pytest.mark.parametrize("system", ["bm25", "model"])
def test_the_mean_over_queries_is_what_mteb_reports(store: Store, refs: dict[str, ArtifactRef], system: str) -> None:
    ref = report(store, refs if system == "model" else {"data": refs["data"]}, metrics=ALL_METRICS)
    content = read(ref)
    assert content["system"] == system
    found = per_query(ref)
    for metric in ALL_METRICS:
        values = [value for (name, _), value in found.items() if name == metric]
        assert len(values) == content["queries"]["retrieval"] == 2
        assert np.mean(values) == pytest.approx(content["scores"]["retrieval"][metric], abs=1e-5)
        low, high = content["intervals"]["retrieval"][metric]
        interval = bootstrap_interval(values, samples=200, seed=0)
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-5)


def test_ties_are_ranked_as_mteb_ranks_them(store: Store, tmp_path: Path) -> None:
    documents = {f"d{n}": "same text" + " here" * (n == 9) for n in range(10)}
    qrels = {"test": {"q": {"d3": 1}, "p": {"d7": 2, "d1": 1}}}
    data = beir_data(store, write_beir(tmp_path / "ties", documents=documents, queries={"q": "same", "p": "text"}, qrels=qrels))
    ref = report(store, {"data": data}, metrics=["mrr_at_10", "mrr_at_5", "ndcg_at_10"])
    found = per_query(ref)
    for metric in ("mrr_at_10", "mrr_at_5"):
        assert (found[metric, "q"] + found[metric, "p"]) / 2 == pytest.approx(read(ref)["scores"]["retrieval"][metric], abs=1e-5)


def test_a_models_report_is_the_exact_search_of_its_stored_vectors(store: Store, refs: dict[str, ArtifactRef]) -> None:
    ref = report(store, refs, metrics=["mrr_at_10"], top_k=11)
    stored = open_embeddings(refs["embeddings"].path)
    vectors = Encoder.load(refs["model"].path).encode([QUERIES["t1"], QUERIES["t2"]])
    rows = ExactSearcher(stored.vectors(), stored.ids).search(vectors, 10).rows
    for name, found in zip(("t1", "t2"), rows, strict=True):
        ranks = [rank for rank, row in enumerate(found, start=1) if stored.ids[row] in QRELS["test"][name]]
        assert per_query(ref)["mrr_at_10", name] == pytest.approx(1 / ranks[0] if ranks else 0)


def test_only_queries_are_encoded_and_each_once(
    store: Store, refs: dict[str, ArtifactRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, encode = [], Encoder.encode

    def counted(self: Encoder, texts: Any, **options: Any) -> np.ndarray:
        asked.append((options["prompt"], sorted(texts)))
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    report(store, {**refs, "index": refs["embeddings"]}, open_index=exact_index, seed=71)
    assert asked == [("query", sorted([QUERIES["t1"], QUERIES["t2"]]))]


def test_an_exact_index_scores_as_exact_search_and_a_broken_one_does_not(store: Store, refs: dict[str, ArtifactRef]) -> None:
    with_index = {**refs, "index": refs["embeddings"]}
    good = read(report(store, with_index, open_index=exact_index, seed=1))
    bad_ref = report(store, with_index, open_index=Reversed, seed=2)
    bad = read(bad_ref)
    assert good["index_scores"] == good["scores"] == bad["scores"]
    assert good["index_intervals"] == good["intervals"]
    assert bad["index_scores"] != bad["scores"]
    assert per_query(bad_ref, "index") != per_query(bad_ref, "exact")
    assert bad_ref.meta["index_scores"] == bad["index_scores"]


def test_a_hybrid_search_is_the_fusion_of_both_rankings(store: Store, refs: dict[str, ArtifactRef]) -> None:
    ref = report(store, refs, hybrid=True, metrics=["mrr_at_10"])
    stored, corpus = open_embeddings(refs["embeddings"].path), Dataset.open(refs["data"].path).corpus()
    encoder = Encoder.load(refs["model"].path)
    words = BM25Searcher(document.content for document in corpus)
    found, expected = per_query(ref, "hybrid"), {}
    for query in Dataset.open(refs["data"].path).queries("test"):
        scores = stored.vectors() @ encoder.encode([query.text], prompt="query")[0]
        dense = [stored.ids[row] for row in np.argsort(-scores, kind="stable")]
        lexical = [corpus[row].id for row in words.search([query.text], 10).rows[0] if row >= 0]
        ranked = [name for name, _ in fused([dense, lexical])]
        expected["mrr_at_10", query.id] = max(1 / (1 + ranked.index(name)) for name in query.positives)
    assert found == pytest.approx(expected)
    assert read(ref)["hybrid_scores"]["retrieval"]["mrr_at_10"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)
    assert read(report(store, refs))["hybrid_scores"] is None


def test_without_an_index_its_columns_are_empty(store: Store, refs: dict[str, ArtifactRef]) -> None:
    ref = report(store, refs)
    assert read(ref)["index_scores"] is None
    assert read(ref)["index_intervals"] is None
    assert set(per_query(ref, "index").values()) == {None}


def test_vectors_of_another_model_or_corpus_are_refused(store: Store, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    other = {"embeddings": encoded(store, refs["data"], tiny_model(store, pooling="last"))}
    with pytest.raises(ContractError, match="encode the corpus with it first"):
        report(store, refs | other)
    grown = beir_data(store, write_beir(tmp_path / "grown", documents=DOCUMENTS | {"new": "one more"}))
    with pytest.raises(ContractError, match=r"expected the 12 searchable documents of the data \(exact\), got 11 others"):
        report(store, refs | {"data": grown})


def test_a_model_without_embeddings_is_refused(store: Store, refs: dict[str, ArtifactRef]) -> None:
    with pytest.raises(ContractError, match=r"expected data alone.* got data, model"):
        report(store, {name: refs[name] for name in ("data", "model")})
    with pytest.raises(ContractError, match="nothing to open it with"):
        report(store, {**refs, "index": refs["embeddings"]})


def test_shuffled_judgements_fall_to_chance(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("bcdfghjkl"), 6)) for _ in range(300)]
    documents = {f"d{n}": " ".join(random.choice(words, 8)) for n in range(300)}
    queries = {f"q{n}": " ".join(documents[f"d{n}"].split()[:3]) for n in range(100)}
    qrels = {"test": {f"q{n}": {f"d{n}": 1} for n in range(100)}}
    data = beir_data(store, write_beir(tmp_path / "random", documents=documents, queries=queries, qrels=qrels))
    content = read(report(store, {"data": data}, metrics=["ndcg_at_10"]))
    assert content["scores"]["retrieval"]["ndcg_at_10"] > 0.9
    assert content["controls"]["retrieval"]["ndcg_at_10_shuffled_qrels"] < 0.1
    assert read(report(store, {"data": data}, metrics=["ndcg_at_10"], controls=False))["controls"] == {}


def test_a_task_on_a_folder_of_its_own_is_encoded_for_the_occasion(
    store: Store, refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    folder = write_beir(
        tmp_path / "fruit",
        documents={"a": "apple", "b": "banana"},
        queries={"q": "apple", "r": "a fruit"},
        qrels={"test": {"q": {"a": 1}}},
    )
    (folder / "qrels" / "graded.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t2\nr\tb\t1\n", encoding="utf-8")
    tasks = [{"kind": "retrieval"}, {"kind": "retrieval", "path": str(folder)}]
    content = read(report(store, {**refs, "index": refs["embeddings"]}, open_index=exact_index, tasks=tasks))
    assert content["queries"] == {"retrieval": 2, "fruit": 1}
    assert content["documents"] == {"retrieval": 11, "fruit": 2}
    assert set(content["scores"]) == {"retrieval", "fruit"}
    assert set(content["index_scores"]) == {"retrieval"}
    graded = [{"kind": "retrieval", "path": str(folder), "qrels": "graded", "name": "graded fruit"}]
    assert read(report(store, {"data": refs["data"]}, tasks=graded))["queries"] == {"graded fruit": 2}


def test_a_changed_folder_gives_another_report(store: Store, data: ArtifactRef, tmp_path: Path) -> None:
    tasks = [{"kind": "retrieval", "path": str(write_beir(tmp_path / "fruit"))}]
    first = report(store, {"data": data}, tasks=tasks)
    with (tmp_path / "fruit" / "corpus.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"_id": "new", "title": "", "text": "parse a secret string, really"}\n')
    second = report(store, {"data": data}, tasks=tasks)
    assert first.uri != second.uri
    assert read(second)["documents"] == {"fruit": len(DOCUMENTS) + 1}


def test_bad_records_of_a_folder_are_skipped_unless_asked_otherwise(store: Store, data: ArtifactRef, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "holes", documents=DOCUMENTS | {"empty": ""})
    assert read(report(store, {"data": data}, tasks=[{"kind": "retrieval", "path": str(folder)}]))["documents"] == {"holes": 11}
    with pytest.raises(DataError, match="empty text"):
        report(store, {"data": data}, tasks=[{"kind": "retrieval", "path": str(folder), "on_bad_record": "fail"}])


def test_the_split_can_be_chosen(store: Store, data: ArtifactRef) -> None:
    content = read(report(store, {"data": data}, tasks=[{"kind": "retrieval"}, {"kind": "retrieval", "split": "dev"}]))
    assert content["queries"] == {"retrieval": 2, "retrieval-dev": 1}


def test_a_split_without_answers_is_refused(store: Store, tmp_path: Path) -> None:
    data = beir_data(store, write_beir(tmp_path / "train_only", qrels={"train": QRELS["train"]}))
    with pytest.raises(DataError, match="no query of this split has an answer"):
        report(store, {"data": data})


def test_the_same_inputs_give_the_same_bytes(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    assert len({report(Store(tmp_path / name), refs).digest for name in ("one", "two")}) == 1


def test_no_network_is_touched(store: Store, refs: dict[str, ArtifactRef], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    report(store, refs, seed=99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["ndgc_at_10"]}, r"unknown metric 'ndgc_at_10'; allowed: ndcg_at_<k>.*did you mean 'ndcg_at_10'"),
        ({"metrics": ["ndcg_at_0"]}, "unknown metric 'ndcg_at_0'"),
        ({"metrics": ["recall_at_500"]}, "metrics look at 500 documents, top_k fetches only 100"),
        ({"metrics": []}, "at least 1 item"),
        ({"tasks": [{"kind": "retrieval"}, {"kind": "retrieval"}]}, "two tasks are called 'retrieval'"),
        ({"tasks": [{"kind": "retrival"}]}, "did you mean 'retrieval'"),
        ({"tasks": [{"kind": "retrieval", "qrels": "graded"}]}, "there is no path"),
    ],
)
def test_configuration_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvalConfig.model_validate(fields)


def test_settings_of_the_baseline_change_it(store: Store, data: ArtifactRef) -> None:
    plain, bare = (report(store, {"data": data}, lexical=lexical) for lexical in ({}, {"stem": False}))
    assert read(plain)["fingerprint"] != read(bare)["fingerprint"]


def test_a_report_ties_with_itself(store: Store, refs: dict[str, ArtifactRef]) -> None:
    ref = report(store, refs)
    found = compare(ref.path, ref.path)
    assert (found.difference, found.p, found.queries) == (0.0, 1.0, 2)


def test_a_comparison_pairs_the_same_queries(store: Store, refs: dict[str, ArtifactRef]) -> None:
    model, bm25 = report(store, refs), report(store, {"data": refs["data"]})
    found = compare(bm25.path, model.path, "mrr_at_10", task="retrieval")
    a, b = per_query(bm25), per_query(model)
    assert found.difference == pytest.approx(np.mean([a["mrr_at_10", query] - b["mrr_at_10", query] for query in ("t1", "t2")]))


def test_a_comparison_through_the_index_reads_its_column(store: Store, refs: dict[str, ArtifactRef]) -> None:
    with_index = {**refs, "index": refs["embeddings"]}
    good, bad = report(store, with_index, open_index=exact_index, seed=3), report(store, with_index, open_index=Reversed, seed=4)
    assert compare(good.path, bad.path, "recall_at_10").difference == 0
    a, b = per_query(good, "index"), per_query(bad, "index")
    expected = np.mean([a["mrr_at_10", query] - b["mrr_at_10", query] for query in ("t1", "t2")])
    assert compare(good.path, bad.path, "mrr_at_10", through="index").difference == pytest.approx(expected)


def test_what_cannot_be_compared_is_refused(store: Store, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    ref = report(store, refs)
    grown = beir_data(store, write_beir(tmp_path / "grown", documents=DOCUMENTS | {"new": "one more"}))
    asked = beir_data(store, write_beir(tmp_path / "asked", queries=QUERIES | {"t2": "put numbers in order"}))
    dev = report(store, {"data": refs["data"]}, tasks=[{"kind": "retrieval", "split": "dev"}])
    for other, message in (
        (report(store, {"data": grown}), "different corpus"),
        (report(store, {"data": asked}), "different queries"),
        (dev, "they share: none"),
    ):
        with pytest.raises(ContractError, match=message):
            compare(ref.path, other.path)
    with pytest.raises(ContractError, match="has no 'ndcg_at_7' scores"):
        compare(ref.path, ref.path, "ndcg_at_7")
    with pytest.raises(ContractError, match=r"was not measured so \(index\)"):
        compare(ref.path, ref.path, through="index")
    with pytest.raises(ArtifactError, match="expected a report artifact"):
        compare(ref.path, tmp_path)


@pytest.mark.parametrize(
    ("name", "published"), [("scifact", 0.672), ("cranfield", 0.367), ("cosqa", 0.384), ("squad_sent", 0.762), ("nl2bash", 0.424)]
)
def test_bm25_reaches_the_known_figures(
    store: Store, data: ArtifactRef, shared_data: Path, name: str, published: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        tasks = [{"kind": "retrieval", "path": str(shared_data / name)}]
        ref = report(store, {"data": data}, tasks=tasks, metrics=["ndcg_at_10"], controls=False)
    assert read(ref)["scores"][name]["ndcg_at_10"] == pytest.approx(published, abs=0.03)
