from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ullme import lexical
from ullme.errors import ContractError
from ullme.lexical import BM25Searcher, LexicalConfig, tokenise

TEXTS = ["red fox jumps", "red red dog", "blue cat", "!!!"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("parseHTTPHeaders", ["parse", "http", "header"]),
        ("snake_case_name", ["snake", "case", "name"]),
        ("__init__", ["init"]),
        ("utf8 sha256sum", ["utf", "8", "sha", "256", "sum"]),
        ("The classes of a x", ["classe"]),
        ("libraries status glass trees", ["library", "status", "glass", "tree"]),
        ("Café ÜBER_groß", ["café", "über", "gross"]),
        ("日本語 test", ["日", "本", "語", "test"]),
        ("", []),
    ],
)
def test_identifiers_are_split_into_lower_case_words(text: str, tokens: list[str]) -> None:
    assert tokenise(text) == tokens


def test_stemming_and_stop_words_can_be_turned_off() -> None:
    assert tokenise("the dogs") == ["dog"]
    assert tokenise("the dogs", LexicalConfig(stem=False)) == ["dogs"]
    assert tokenise("the dogs", LexicalConfig(stop_words=False)) == ["the", "dog"]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0)])
def test_scores_follow_the_formula(k1: float, b: float) -> None:
    lengths = [3, 3, 2, 0]
    mean_length = sum(lengths) / 4
    frequency = {"a": (0, 1), "b": (1, 2)}  # (row, how often "red" stands in it)

    def by_hand(row: int, count: int) -> float:
        idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
        return idf * count / (count + k1 * (1 - b + b * lengths[row] / mean_length))

    scores = BM25Searcher(TEXTS, LexicalConfig(k1=k1, b=b)).scores("red")
    np.testing.assert_allclose(scores, [by_hand(*frequency["a"]), by_hand(*frequency["b"]), 0, 0], rtol=1e-5)


def test_documents_without_a_shared_word_are_not_found() -> None:
    found = BM25Searcher(TEXTS).search(["red", "unknown", ""], 4)
    assert found.rows.tolist() == [[1, 0, -1, -1], [-1] * 4, [-1] * 4]
    assert np.isneginf(found.scores[1]).all()


def test_ties_go_to_the_lower_row_also_at_the_cut() -> None:
    searcher = BM25Searcher(["same words"] * 6 + ["other"])
    assert searcher.search(["same"], 3).rows.tolist() == [[0, 1, 2]]


def test_more_neighbours_than_documents_are_padded() -> None:
    assert BM25Searcher(TEXTS).search(["cat"], 9).rows.shape == (1, 9)


def test_a_corpus_without_words_finds_nothing() -> None:
    assert BM25Searcher(["!", "?"]).search(["word"], 2).rows.tolist() == [[-1, -1]]


def test_the_top_k_equals_a_full_sort() -> None:
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + int(digit)) for digit in f"{n:03d}") + "x" for n in range(40)]
    texts = [" ".join(random.choice(words, 12)) for _ in range(200)]
    searcher = BM25Searcher(texts)
    query = " ".join(words[:5])
    scores = searcher.scores(query)
    expected = [row for row in np.argsort(-scores, kind="stable") if scores[row] > 0][:10]
    assert searcher.search([query], 10).rows[0].tolist() == expected


def test_nothing_to_search_in_is_refused() -> None:
    with pytest.raises(ContractError, match="expected texts to search in, got none"):
        BM25Searcher([])


def random_texts(count: int) -> list[str]:
    random = np.random.default_rng(3)
    words = ["".join(chr(97 + int(digit)) for digit in f"{n:03d}") + "x" for n in range(300)]
    return [" ".join(random.choice(words, random.integers(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("postings", [1, 7, 500, 10**6])
def test_in_a_folder_whatever_the_size_of_its_segments_the_scores_are_those_in_memory(
    postings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(60)
    plain = BM25Searcher(texts)
    monkeypatch.setattr(lexical, "SEGMENT_POSTINGS", postings)
    for searcher in (BM25Searcher(iter(texts), folder=tmp_path / "words"), BM25Searcher(texts)):
        for query in texts[:20]:
            np.testing.assert_array_equal(searcher.scores(query), plain.scores(query))
    assert sorted(file.name for file in (tmp_path / "words").iterdir()) == ["ends.i64", "scored.bin", "texts.json", "words.u64"]


def test_texts_without_a_word_in_a_folder_find_nothing(tmp_path: Path) -> None:
    assert BM25Searcher(["!", ""], folder=tmp_path).search(["word"], 1).rows.tolist() == [[-1]]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_the_scores_are_those_of_bm25s(k1: float, b: float) -> None:
    bm25s = pytest.importorskip("bm25s")
    texts, config = random_texts(120), LexicalConfig(k1=k1, b=b)
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(token, len(vocabulary)) for token in tokenise(text, config)] for text in texts]
    library = bm25s.BM25(k1=k1, b=b, method="lucene")
    library.index((rows, vocabulary), create_empty_token=False, show_progress=False)
    searcher = BM25Searcher(texts, config)
    for query in texts[:30]:
        expected = library.get_scores_from_ids([vocabulary[token] for token in tokenise(query, config)])
        np.testing.assert_allclose(searcher.scores(query), expected, rtol=1e-5, atol=1e-5)
