"""The judge of mined negatives: what it suspects, what becomes of it, and that training reads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from small_runs import QRELS, tiny_model
from test_mining import mined, report_of, rows_of

from ullme.artifacts import ArtifactRef, Store
from ullme.data import Dataset, Document, Query, read_examples
from ullme.encoder import Encoder
from ullme.errors import ConfigError
from ullme.judging import JudgeConfig, judge
from ullme.mining import MiningConfig
from ullme.mining_context import MiningContext
from ullme.mining_page import page
from ullme.reranking import Reranker


class Shared(Reranker):
    """The number of words that a passage shares with the query, times `sign`."""

    kind: str = "shared"
    sign: float = 1.0

    def scores(self, encoder: Encoder | None, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[np.ndarray]:
        assert encoder is None
        shared = [[len(set(query.split()) & set(text.split())) for text in of] for query, of in zip(queries, passages, strict=True)]
        return [self.sign * np.array(of, dtype=np.float32) for of in shared]


TEXTS = ["a b c", "a x y", "a b c d", "q r s", "a b z"]
CONTEXT = MiningContext(
    [Query("one", "a b c d", "train", {"0": 1}), Query("two", "q r", "train", {"3": 1})],
    [Document(str(row), text) for row, text in enumerate(TEXTS)],
    seed=0,
)
CHOSEN = [[(1, 0.9), (2, 0.8), (4, 0.7)], [(0, 0.5)]]


@pytest.mark.parametrize(
    ("fields", "chosen", "relabelled"),
    [
        ({}, [[(4, 2), (1, 1)], [(0, 0)]], [[], []]),
        ({"suspects": "keep"}, [[(2, 4), (4, 2), (1, 1)], [(0, 0)]], [[], []]),
        ({"suspects": "relabel"}, [[(4, 2), (1, 1)], [(0, 0)]], [[2], []]),
        ({"margin": 1.5}, [[(1, 1)], [(0, 0)]], [[], []]),
        ({"margin": -1.0}, [[(2, 4), (4, 2), (1, 1)], [(0, 0)]], [[], []]),
    ],
)
def test_suspects_score_more_than_the_positive(fields: dict[str, Any], chosen: Any, relabelled: Any) -> None:
    found = judge(JudgeConfig(reranker=Shared(), **fields), CONTEXT, CHOSEN, None)
    assert found.chosen == chosen
    assert found.relabelled == relabelled
    assert found.found["finds_positive"] == 0.5  # the second query's alone
    assert found.found["chance"] == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_a_judge_no_better_than_chance_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge(JudgeConfig(reranker=Shared()), CONTEXT, CHOSEN, None)
    assert "finds the positive no better than chance" in caplog.text


class Failing(Shared):
    """Reads `left` queries, then nothing more."""

    kind: str = "failing"
    left: list[int]
    read: list[str]

    def scores(self, encoder: Encoder | None, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[np.ndarray]:
        if len(self.read) + len(queries) > self.left[0]:
            raise RuntimeError("power cut")
        self.read.extend(queries)
        return [score + 0.1 for score in super().scores(encoder, queries, passages)]


def test_what_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    texts = [f"a{number % 7} b{number % 5} c{number % 3}" for number in range(200)]
    queries = [Query(f"q{number}", f"a{number % 7} b{number}", "train", {str(number): 1}) for number in range(150)]
    documents = [Document(str(row), text) for row, text in enumerate(texts)]
    chosen = [[((number + 11 * step) % 200, 0.5) for step in range(1, 4)] for number in range(150)]
    whole = JudgeConfig(reranker=Failing(left=[1000], read=[]), suspects="keep")
    wanted = judge(whole, MiningContext(queries, documents, 0), chosen, None)
    cut = JudgeConfig(reranker=Failing(left=[130], read=[]), suspects="keep")
    with pytest.raises(RuntimeError, match="power cut"):
        judge(cut, MiningContext(queries, documents, 0, folder=tmp_path), chosen, None)
    file = tmp_path / "judged.jsonl"
    file.write_text(file.read_text() + "[[0.1, 2")  # a line that was not finished
    rest = JudgeConfig(reranker=Failing(left=[1000], read=[]), suspects="keep")
    found = judge(rest, MiningContext(queries, documents, 0, folder=tmp_path), chosen, None)
    assert found == wanted
    assert isinstance(cut.reranker, Failing)
    assert isinstance(rest.reranker, Failing)
    assert [*cut.reranker.read, *rest.reranker.read] == [query.text for query in queries]


JUDGED = {"reranker": {"kind": "generation", "passage_tokens": 24}, "suspects": "relabel"}


def test_the_language_model_judges_and_training_reads_what_it_says(store: Store, dates: ArtifactRef) -> None:
    model = tiny_model(store)
    plain = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 4, "depth": 5})
    ref = mined(store, {"data": dates, "model": model}, miner={"kind": "bm25", "num_negatives": 4, "depth": 5}, judge=JUDGED)
    rows = {row["query_id"]: row for row in pq.read_table(ref.path / "negatives.parquet").to_pylist()}
    data, encoder = Dataset.open(dates.path), Encoder.load(model.path)
    reranker = MiningConfig.model_validate({"judge": JUDGED}).judge.reranker  # type: ignore[union-attr]
    examples = {example.query_id: example for example in read_examples(dates.path, ref.path)}
    suspects = 0
    for query in data.queries("train"):
        before = rows_of(plain)[query.id]
        texts = [data.document(name).content for name in [*query.positives, *before]]
        scores = reranker.scores(encoder, [query.text], [texts])[0].tolist()
        bar, of = min(scores[: len(query.positives)]), dict(zip(before, scores[len(query.positives) :], strict=True))
        row = rows[query.id]
        assert set(row["relabelled"]) == {name for name in before if of[name] > bar}
        assert row["doc_ids"] == sorted((name for name in before if of[name] <= bar), key=lambda name: -of[name])
        np.testing.assert_allclose(row["scores"], [of[name] for name in row["doc_ids"]], rtol=1e-4)
        assert set(examples[query.id].positive_ids) == {*query.positives, *row["relabelled"]}
        assert list(examples[query.id].negative_ids) == row["doc_ids"]
        suspects += len(row["relabelled"])
    assert report_of(ref)["judge"]["suspects"] == suspects == ref.meta["judge_suspects"]
    assert suspects > 0


def test_a_judge_that_reads_with_a_model_has_to_be_given_one(store: Store, dates: ArtifactRef) -> None:
    assert MiningConfig.model_validate({"judge": JUDGED}).needs_model
    with pytest.raises(ConfigError, match=r"mining\.judge: generation reads with a model"):
        mined(store, {"data": dates}, judge=JUDGED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 2}, "mines again with the trained model, and miner: bm25 reads none"),
        ({"first": {"kind": "bm25"}}, "there is one round alone"),
        ({"judge": {"reranker": {"kind": "crossencoder", "model": "x"}}}, "did you mean 'cross_encoder'"),
    ],
)
def test_a_wrong_configuration_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MiningConfig.model_validate(fields)


def test_each_round_has_its_miner() -> None:
    config = MiningConfig.model_validate({"rounds": 3, "first": "bm25", "miner": "topk"})
    assert [config.in_round(number).miner.kind for number in (1, 2, 3)] == ["bm25", "topk", "topk"]
    assert config.in_round(2) == MiningConfig.model_validate({"miner": "topk"})


def test_the_page_shows_what_the_report_holds(store: Store, dates: ArtifactRef) -> None:
    ref = mined(store, {"data": dates}, miner={"kind": "bm25", "num_negatives": 2})
    text, report = (ref.path / "report.html").read_text(encoding="utf-8"), report_of(ref)
    assert text == page(report)
    assert text.count("<article>") == len(report["samples"]) == len(QRELS["train"])
    assert text.count("<rect ") == 20
    assert "http" not in text.replace("http://www.w3.org", "")
    sample = {"query": "a < b", "positives": [{"id": "x", "text": "<script>"}], "negatives": []}
    escaped = page({**report, "samples": [sample], "judge": {**JUDGE, "kind": "generation"}})
    assert "a &lt; b" in escaped
    assert "<script>" not in escaped
    assert "75.0% (generation; chance 25.0%)" in escaped
    empty = page({**json.loads(json.dumps(report)), "scores": {"edges": [], "counts": []}})
    assert "No negative was mined" in empty


JUDGE = {"finds_positive": 0.75, "chance": 0.25, "queries": 8, "suspects": 3, "became_of_them": "drop"}
