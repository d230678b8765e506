"""Rerankers and the fusion of rankings, against their definitions written plainly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_generation import by_hand
from toys import tiny_encoder

from ullme.components import kinds, resolve
from ullme.errors import ConfigError
from ullme.reranking import Reranker, fused

TEXTS = ["the sum of all values", "open a file and read it"]
PASSAGES = [["def total(values): return sum(values)", "def median(values)", "", "open(path).read()"], ["open(path).read()"]]


def test_fused_ranks_are_sums_of_reciprocals() -> None:
    found = fused([["a", "b", "c"], ["c", "a"]])
    assert [name for name, _ in found] == ["a", "c", "b"]
    assert dict(found) == pytest.approx({"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62})
    assert [name for name, _ in fused([["x"], ["y"]])] == ["x", "y"]
    assert fused([[], []]) == []


@pytest.mark.parametrize("score", ["query_given_passage", "passage_given_query", "pmi", "sum"])
def test_the_language_model_scores_what_the_score_says(score: str) -> None:
    encoder = tiny_encoder(dtype=torch.float64)
    reranker = resolve("ullme.rerankers", {"kind": "generation", "score": score, "passage_tokens": 12})
    assert isinstance(reranker, Reranker)
    found = reranker.scores(encoder, TEXTS, PASSAGES)
    assert [len(of) for of in found] == [4, 1]
    for query, passages, scores in zip(TEXTS, PASSAGES, found, strict=True):
        for passage, value in zip(passages, scores, strict=True):
            if passage:
                assert float(value) == pytest.approx(by_hand(encoder, score, query, passage), rel=1e-5)
            else:
                assert math.isinf(value)
    assert all(not len(of) for of in reranker.scores(encoder, TEXTS, [[], []]))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that gives one number for a pair, random weights."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cross")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sum", "all", "values", "open", "file", "read", "def", "path", "total"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **sizes)).save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_cross_encoder_scores_each_pair(cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    reranker = resolve("ullme.rerankers", {"kind": "cross_encoder", "model": str(cross_encoder)})
    assert isinstance(reranker, Reranker)
    found = reranker.scores(tiny_encoder(), TEXTS, PASSAGES)
    pairs = [(query, passage) for query, of in zip(TEXTS, PASSAGES, strict=True) for passage in of]
    np.testing.assert_allclose(np.concatenate(found), CrossEncoder(str(cross_encoder)).predict(pairs), rtol=1e-5)
    assert [len(of) for of in found] == [4, 1]
    assert [len(of) for of in reranker.scores(tiny_encoder(), TEXTS, [[], []])] == [0, 0]


def test_a_cross_encoder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    reranker = resolve("ullme.rerankers", {"kind": "cross_encoder", "model": str(tmp_path / "nowhere")})
    assert isinstance(reranker, Reranker)
    with pytest.raises(ConfigError, match="cross-encoder: no such model folder") as caught:
        reranker.scores(tiny_encoder(), TEXTS, PASSAGES)
    assert "\n" not in str(caught.value)


def test_the_directory_holds_the_kinds_that_people_ask_for() -> None:
    assert kinds("ullme.rerankers") == ["cross_encoder", "generation"]
