"""The words of a corpus: made once, found again, and made in memory where nothing can be kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_runs import DOCUMENTS, beir_data, write_beir

from ullme import words
from ullme.artifacts import ArtifactRef, Store
from ullme.data import Dataset
from ullme.errors import ArtifactError
from ullme.evaluation import EVALUATE, EvalConfig
from ullme.lexical import BM25Searcher, LexicalConfig
from ullme.words import WORDS, words_of


def same(one: BM25Searcher, other: BM25Searcher) -> bool:
    return one.count == other.count and all(np.array_equal(one.scores(text), other.scores(text)) for text in DOCUMENTS.values())


def test_they_are_made_once_for_each_setting(store: Store, dates: ArtifactRef, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BM25Searcher(document.content for document in Dataset.open(dates.path).corpus())
    assert same(words_of(store, dates), plain)
    other = LexicalConfig(k1=0.5)
    assert not same(words_of(store, dates, other), plain)
    monkeypatch.setattr(words, "BM25Searcher", type("Opened", (), {"open": BM25Searcher.open}))  # none is made any more
    assert same(words_of(store, dates), plain)
    assert words_of(store, dates, other)._config == other
    assert len(store.finished("words")) == 2


def test_an_evaluation_foretells_their_space_where_it_makes_them(store: Store, dates: ArtifactRef) -> None:
    def foretold() -> int:
        space = store.space(EVALUATE, EvalConfig(), {"data": dates})
        assert space is not None
        return space

    before = foretold()
    made = store.produce(WORDS, LexicalConfig(), {"data": dates}, seed=0)
    written = sum(entry["size"] for entry in store.manifest(made)["files"].values())
    assert written < before - foretold() == store.space(WORDS, LexicalConfig(), {"data": dates})


def test_where_nothing_can_be_kept_they_are_made_in_memory(
    store: Store, dates: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = words_of(store, dates)

    def refused(*_: object, **__: object) -> ArtifactRef:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Store, "produce", refused)
    assert same(words_of(store, dates), expected)


def test_rows_are_those_of_the_corpus(store: Store, tmp_path: Path) -> None:
    data = beir_data(store, write_beir(tmp_path / "beir"))
    corpus = Dataset.open(data.path).corpus()
    for place, document in enumerate(corpus):
        assert place in words_of(store, data).search([document.content], 2).rows[0]


@pytest.mark.parametrize("name", ["texts.json", "words.u64", "scored.bin"])
def test_something_that_is_missing_is_one_line(name: str, tmp_path: Path) -> None:
    BM25Searcher(["red fox", "blue dog"], folder=tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match="not the words of a corpus"):
        BM25Searcher.open(tmp_path)
