"""Search in a release: right answers in order, and no model with somebody else's index."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from flows.retriever import EXCERPT_CHARACTERS, Release, Retriever, excerpt
from ullme.artifacts import ArtifactRef
from ullme.data import Dataset
from ullme.encoder import Encoder
from ullme.errors import ArtifactError, ContractError


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
    assert len(second) == 3


def test_fewer_documents_than_asked_for_are_fewer_hits(release: Release) -> None:
    retriever = Retriever.open(release)
    assert len(retriever.search(["sum"], k=10_000)[0]) == retriever.index.count
    assert retriever.search([], k=5) == []
    with pytest.raises(ContractError):
        retriever.search(["sum"], k=0)


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
