"""Search in a release: right answers in order, and no model with somebody else's index."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import produce

from flows.commands.search import _show
from flows.retriever import EXCERPT_CHARACTERS, Hit, Release, Retriever, excerpt
from ullme.artifacts import ArtifactRef, Store
from ullme.data import Dataset
from ullme.encoder import Encoder
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.rerankers.generation import Generation


def test_hits_are_the_nearest_documents_with_rank_score_and_text(release: Release) -> None:
    retriever = Retriever.open(release)
    first, second = retriever.search(["the sum of all values", "the median"], k=3)
    corpus = {document.id: document for document in Dataset.open(release.data.path).corpus()}
    encoder = Encoder.load(release.model.path)
    vectors = encoder.encode([document.content for document in corpus.values()], prompt="document")
    scores = vectors @ encoder.encode(["the sum of all values"], prompt="query")[0]
    assert [hit.rank for hit in first] == [1, 2, 3]
    np.testing.assert_allclose([hit.score for hit in first], np.sort(scores)[::-1][:3], atol=2e-3)
    assert all(hit.text == corpus[hit.id].text and hit.excerpt for hit in first)
    assert all((hit.passage, hit.section, hit.passages) == (hit.id, "", 1) for hit in first)
    assert len(second) == 3


def test_fewer_documents_than_asked_for_are_fewer_hits(release: Release) -> None:
    retriever = Retriever.open(release)
    assert len(retriever.search(["sum"], k=10_000)[0]) == retriever.index.count
    assert retriever.search([], k=5) == []
    with pytest.raises(ContractError):
        retriever.search(["sum"], k=0)


def release_of(folder: Path, rows: list[dict[str, Any]], index: Mapping[str, Any]) -> Release:
    """What the real stages make of a corpus."""
    store, corpus = Store(folder / "store"), folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = produce(store, "data", {"source": {"kind": "jsonl", "corpus": str(corpus)}, "held_out": "none"})
    model = produce(store, "backbone", {"model": "tiny:llama", "dtype": "float32", "max_tokens": 48})
    embeddings = produce(store, "encode", {}, data=data, model=model)
    return Release(model=model, index=produce(store, "index", index, embeddings=embeddings), data=data)


def passage_rows() -> list[dict[str, Any]]:
    """One document of forty passages, which crowd the others out, eight of five, and one that was never cut."""
    sizes = {"long.md": 40, **{f"short{number}.md": 5 for number in range(8)}}
    rows = [
        {"id": f"{name}#{number}", "parent": name, "section": f"Part {number}", "title": name, "text": f"{name} says {number}"}
        for name, size in sizes.items()
        for number in range(1, size + 1)
    ]
    return [*rows, {"id": "whole.txt", "text": "a text that was never cut"}]


@pytest.mark.parametrize("index", [{"kind": "flat"}, {"kind": "hnsw"}], ids=lambda index: index["kind"])
def test_a_document_in_passages_is_one_hit_with_its_best_passage(tmp_path: Path, index: Mapping[str, Any]) -> None:
    rows = passage_rows()
    retriever = Retriever.open(release_of(tmp_path, rows, index))
    texts = ["long.md says 3", "short2.md says 5"]
    found = retriever.search(texts, k=6)
    encoder, by_id = retriever.encoder, {row["id"]: row for row in rows}
    contents = [f"{row['title']}\n{row['text']}" if "title" in row else row["text"] for row in rows]
    scores = encoder.encode(texts, prompt="query") @ encoder.encode(contents, prompt="document").T
    for hits, of_text in zip(found, scores, strict=True):
        best: dict[str, float] = {}
        for row, score in zip(rows, of_text, strict=True):
            best[row.get("parent", row["id"])] = max(score, best.get(row.get("parent", row["id"]), -2))
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
        assert len({hit.id for hit in hits}) == 6
        np.testing.assert_allclose([hit.score for hit in hits], sorted(best.values(), reverse=True)[:6], atol=5e-3)
        for hit in hits:
            row = by_id[hit.passage]
            assert (hit.id, hit.section, hit.text) == (row.get("parent", row["id"]), row.get("section", ""), row["text"])
            assert hit.score == pytest.approx(best[hit.id], abs=5e-3)
            assert 1 <= hit.passages <= (40 if hit.id == "long.md" else 5)
    everything = {hit.id: hit.passages for hit in retriever.search(texts, k=50)[0]}
    assert everything.keys() == {row.get("parent", row["id"]) for row in rows}
    if index["kind"] == "flat":  # a graph may miss some of many passages that are nearly the same
        assert everything == Counter(row.get("parent", row["id"]) for row in rows)


def functions() -> list[dict[str, Any]]:
    """Passages of three files, with metadata."""
    files = {"a.md": ("en", 2019), "b.md": ("de", 2021), "c.md": ("en", 2024)}
    return [
        {"id": f"{name}#{part}", "parent": name, "text": f"{word} number {part}", "metadata": {"language": language, "year": year}}
        for (name, (language, year)), word in zip(files.items(), ("alpha", "beta", "gamma"), strict=True)
        for part in range(1, 6)
    ]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    return Retriever.open(release_of(tmp_path_factory.mktemp("labelled"), functions(), {"kind": "hnsw"}))


def test_a_filter_leaves_the_best_of_the_documents_that_fit(labelled: Retriever) -> None:
    question = ["beta number 3"]
    everything = labelled.search(question, k=3)[0]
    english = labelled.search(question, k=3, where={"language": "en"})[0]
    assert [hit.id for hit in english] == [hit.id for hit in everything if hit.metadata["language"] == "en"]
    np.testing.assert_allclose([hit.score for hit in english], [hit.score for hit in everything if hit.id != "b.md"], atol=1e-4)
    assert [hit.id for hit in labelled.search(question, k=3, where=["year=2021..", "language=en"])[0]] == ["c.md"]
    assert labelled.search(question, where=["year=2030.."]) == [[]]
    with pytest.raises(ConfigError, match="no document has a field 'lang'; they have: language, year; did you mean 'language'"):
        labelled.search(question, where={"lang": "en"})


def test_a_hybrid_search_fuses_the_ranks_of_both(labelled: Retriever) -> None:
    hits = labelled.search(["gamma"], k=3, hybrid=True)[0]
    assert hits[0].id == "c.md"  # the only one with the word
    dense = labelled.index.search(labelled.embed(["gamma"]), 15).rows[0].tolist()
    words = {labelled.index.ids.index(f"c.md#{part}"): rank for rank, part in enumerate(range(1, 6), start=1)}
    expected = max(1 / (60 + rank) + (1 / (60 + words[row]) if row in words else 0) for rank, row in enumerate(dense, start=1))
    assert hits[0].score == pytest.approx(expected)
    only = labelled.search(["gamma"], k=3, hybrid=True, where={"language": "de"})[0]
    assert [hit.id for hit in only] == ["b.md"]


def test_a_reranked_search_is_in_the_order_of_the_reranker(labelled: Retriever) -> None:
    reranker = Generation(depth=15)
    hits = labelled.search(["beta number 3"], k=2, rerank=reranker)[0]
    texts = [row["text"] for row in functions()]
    scores = dict(zip(texts, reranker.scores(labelled.encoder, ["beta number 3"], [texts])[0].tolist(), strict=True))
    best = sorted({row["parent"]: 0 for row in functions()}, key=lambda name: -max(_of(name, scores)))
    assert [hit.id for hit in hits] == best[:2]
    assert hits[0].score == pytest.approx(max(_of(best[0], scores)), abs=1e-4)
    assert labelled.seconds.keys() == {"encode", "search", "rerank"}
    assert all(seconds > 0 for seconds in labelled.seconds.values())


def _of(name: str, scores: Mapping[str, float]) -> list[float]:
    return [scores[row["text"]] for row in functions() if row["parent"] == name]


def test_an_index_of_another_model_is_refused(release: Release, artifacts: Mapping[str, ArtifactRef]) -> None:
    with pytest.raises(ContractError, match="index was built with model"):
        Retriever.open(release.model_copy(update={"index": artifacts["other_index"]}))


def test_a_damaged_index_is_refused(release: Release, tmp_path: Path) -> None:
    copy = tmp_path / "index" / release.index.path.name
    shutil.copytree(release.index.path, copy)
    data = bytearray((copy / "index.faiss").read_bytes())
    data[-1] ^= 1
    (copy / "index.faiss").write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        Retriever.open(release.model_copy(update={"index": release.index.model_copy(update={"uri": str(copy)})}))


def test_another_kind_in_the_place_of_the_index_is_refused(release: Release) -> None:
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'index', got 'data'"):
        Retriever.open(release.model_copy(update={"index": release.data}))


def test_a_release_survives_its_file(release: Release, tmp_path: Path) -> None:
    file = tmp_path / "release.json"
    file.write_text(release.model_dump_json())
    assert Release.read(file) == release
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="expected the JSON of a release"):
        Release.read(file)


def test_excerpts_are_short_whole_words_without_margin() -> None:
    assert excerpt("    def f():\n\n        return 1\n") == "def f():\n    return 1"
    long = excerpt("word " * 200)
    assert long.endswith("word ...")
    assert len(long) <= EXCERPT_CHARACTERS + 4


def test_an_answer_is_shown_with_its_place_in_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "rank": 1,
        "score": 0.5,
        "id": "guide.md",
        "text": "Do it.",
        "excerpt": "Do it.",
        "passage": "guide.md#2",
        "passages": 3,
    }
    for title, section, place in (
        ("The guide", "Install > On Linux", "  The guide > Install > On Linux"),
        ("", "Install", "  Install"),
        ("The guide", "", "  The guide"),
        ("", "", ""),
    ):
        _show(Hit.model_validate({**fields, "title": title, "section": section}))
        assert capsys.readouterr().out == f"\n 1  0.500  guide.md{place}\n    Do it.\n"
