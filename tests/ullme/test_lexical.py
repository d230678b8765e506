from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from ullme.errors import ContractError
from ullme.lexical import BM25Searcher, LexicalConfig, tokenise

TEXTS = ["red fox jumps", "red red dog", "blue cat", "!!!"]
IDS = ["a", "b", "c", "d"]


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

    scores = BM25Searcher(TEXTS, IDS, LexicalConfig(k1=k1, b=b)).scores("red")
    np.testing.assert_allclose(scores, [by_hand(*frequency["a"]), by_hand(*frequency["b"]), 0, 0], rtol=1e-5)


def test_documents_without_a_shared_word_are_not_found() -> None:
    found = BM25Searcher(TEXTS, IDS).search(["red", "unknown", ""], 4)
    assert found.rows.tolist() == [[1, 0, -1, -1], [-1] * 4, [-1] * 4]
    assert np.isneginf(found.scores[1]).all()


def test_ties_go_to_the_lower_row_also_at_the_cut() -> None:
    searcher = BM25Searcher(["same words"] * 6 + ["other"], [str(n) for n in range(7)])
    assert searcher.search(["same"], 3).rows.tolist() == [[0, 1, 2]]


def test_more_neighbours_than_documents_are_padded() -> None:
    assert BM25Searcher(TEXTS, IDS).search(["cat"], 9).rows.shape == (1, 9)


def test_a_corpus_without_words_finds_nothing() -> None:
    assert BM25Searcher(["!", "?"], ["a", "b"]).search(["word"], 2).rows.tolist() == [[-1, -1]]


def test_the_top_k_equals_a_full_sort() -> None:
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + int(digit)) for digit in f"{n:03d}") + "x" for n in range(40)]
    texts = [" ".join(random.choice(words, 12)) for _ in range(200)]
    searcher = BM25Searcher(texts, [str(n) for n in range(200)])
    query = " ".join(words[:5])
    scores = searcher.scores(query)
    expected = [row for row in np.argsort(-scores, kind="stable") if scores[row] > 0][:10]
    assert searcher.search([query], 10).rows[0].tolist() == expected


def test_mismatched_or_missing_documents_are_refused() -> None:
    with pytest.raises(ContractError, match="2 texts and 1 ids"):
        BM25Searcher(["a", "b"], ["x"])
    with pytest.raises(ContractError, match="N >= 1"):
        BM25Searcher([], [])


def test_the_library_does_not_log_below_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        BM25Searcher(TEXTS, IDS).search(["red"], 1)
    assert not [record for record in caplog.records if record.name.startswith("bm25s")]
