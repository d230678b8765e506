"""Queries that the model writes itself: kept by their round trip, resumed after a crash, never those that people asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import beir_data, tiny_model, write_beir
from toys import json_lines

from ullme import synthetic
from ullme.artifacts import ArtifactRef, Store
from ullme.data import Dataset
from ullme.encoder import Encoder
from ullme.errors import DataError
from ullme.synthetic import SYNTHESISE, SyntheticConfig


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    folder = tmp_path_factory.mktemp("synthetic")
    store = Store(folder / "store")
    return {"data": beir_data(store, write_beir(folder / "beir")), "model": tiny_model(store)}


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes noise; here it repeats a few words of its text, so that a round trip can succeed."""

    def generate(self: Encoder, prompts: list[str], **_: Any) -> list[str]:
        return [prompt.partition("Text: ")[2].partition("\n")[0] + " please?\nand more" for prompt in prompts]

    monkeypatch.setattr(Encoder, "generate", generate)


def produce(folder: Path, refs: dict[str, ArtifactRef], **settings: Any) -> ArtifactRef:
    return Store(folder).produce(SYNTHESISE, SyntheticConfig(**{"rivals": 0, "batch_documents": 2, **settings}), refs, seed=1)


def test_every_query_names_its_document_and_nothing_else_changes(
    refs: dict[str, ArtifactRef], speaking: None, tmp_path: Path
) -> None:
    before, ref = Dataset.open(refs["data"].path), produce(tmp_path, refs, per_document=2)
    after = Dataset.open(ref.path)
    assert list(after.documents()) == list(before.documents())
    assert [after.queries(split) for split in ("dev", "test")] == [before.queries(split) for split in ("dev", "test")]
    new = [query for query in after.queries("train") if query.id.startswith("synthetic:")]
    contents = {document.id: document.content for document in before.training_documents()}
    assert {document for query in new for document in query.positives} <= contents.keys()
    assert all(query.text == f"{contents[next(iter(query.positives))]} please?" for query in new)
    rows = json_lines(ref.path / "logs" / "synthetic.jsonl")
    assert len(rows) == ref.meta["synthetic_written"] == 2 * len(contents)
    assert [row["outcome"] for row in rows].count("asked already") >= len(contents)  # the same question twice
    assert ref.meta["synthetic_kept"] == len(new)


def test_the_documents_of_test_queries_are_written_for_only_where_training_may_see_them(
    refs: dict[str, ArtifactRef], speaking: None, tmp_path: Path
) -> None:
    written = {row["document"] for row in json_lines(produce(tmp_path, refs).path / "logs" / "synthetic.jsonl")}
    assert written == {document.id for document in Dataset.open(refs["data"].path).training_documents()}


def test_a_query_stays_only_if_its_own_passage_is_the_likeliest(
    refs: dict[str, ArtifactRef], speaking: None, tmp_path: Path
) -> None:
    ref = produce(tmp_path, refs, rivals=3)
    rated = [row for row in json_lines(ref.path / "logs" / "synthetic.jsonl") if "rivals" in row]
    assert rated
    for row in rated:
        assert row["document"] not in row["rivals"]
        likelier = any(value >= row["logprob"] for value in row["rivals"].values())
        assert row["outcome"] == ("another passage is likelier" if likelier else "kept")


def test_what_a_real_test_asks_is_not_trained_on(
    refs: dict[str, ArtifactRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = Dataset.open(refs["data"].path).queries("test")[0].text
    monkeypatch.setattr(Encoder, "generate", lambda self, prompts, **_: [asked, *["???"] * (len(prompts) - 1)])
    with pytest.raises(DataError, match=r"none of 11 queries was kept \(asked already 6, empty 5\)"):
        produce(tmp_path, refs)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_run_writes_on_to_the_same_result(
    batches: int, refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real generation: the noise of a random model, drawn by seed."""
    expected = produce(tmp_path / "one", refs)

    class Killed(BaseException):
        pass

    plain, count = synthetic._Writer.write, []

    def write(self: Any, documents: Any) -> Any:
        if len(count) == batches:
            raise Killed
        count.append(documents)
        return plain(self, documents)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic._Writer, "write", write)
        with pytest.raises(Killed):
            produce(tmp_path / "two", refs)
    (file,) = (tmp_path / "two").rglob("written.jsonl")
    with file.open("a", encoding="utf-8") as half:
        half.write('[{"document": "pa')  # what a crash leaves of a line
    assert produce(tmp_path / "two", refs).digest == expected.digest


def test_a_prompt_needs_its_place() -> None:
    with pytest.raises(ValueError, match=r"expected a text with \{passage\} in it once"):
        SyntheticConfig(prompt="write a question")
