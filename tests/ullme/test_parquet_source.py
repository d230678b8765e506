"""The `parquet` source: the rows of tables mean what the lines of `jsonl` mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from ullme.data import check_records
from ullme.errors import DataError
from ullme.records import Problems, Records, Source
from ullme.sources.jsonl import Jsonl
from ullme.sources.parquet import Parquet

ROWS: list[dict[str, Any]] = [
    {"query": "one", "pos": ["a", "b"], "neg": ["c"], "split": "train"},
    {"query": "two", "pos": ["c"], "neg": [], "split": None, "instruction": "Find", "group": "g"},
    {"query": "one", "pos": ["d"], "neg": None, "split": "train"},
]


def table(path: Path, *rows: dict[str, Any], **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    content = columns or {name: [row.get(name) for row in rows] for name in names}
    pq.write_table(pa.table(content), path, row_group_size=2)
    return path


def read(source: Source) -> tuple[Records, list[str]]:
    problems = Problems()
    records = source.read(problems)
    check_records(records)
    return records, [str(problem) for problem in problems.found]


def parquet(**fields: Any) -> Parquet:
    return Parquet.model_validate({"kind": "parquet", **fields})


def test_rows_mean_what_lines_mean(tmp_path):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = read(Jsonl.model_validate({"kind": "jsonl", "path": lines}))
    assert read(parquet(path=table(tmp_path / "pairs.parquet", *ROWS))) == expected
    assert len(expected[0].queries) == 2


def test_triplets_with_numbered_negatives_and_large_strings(tmp_path):
    path = table(
        tmp_path / "t.parquet",
        anchor=pa.array(["q"], pa.large_string()),
        positive=["p"],
        negative_2=["n2"],
        negative_1=pa.array(["n1"]).dictionary_encode(),
        embedding=[[0.1, 0.2]],
    )
    (query,) = read(parquet(path=path))[0].queries
    texts = {document.id: document.text for document in read(parquet(path=path))[0].documents}
    assert [texts[name] for name in (*query.positives, *query.negatives)] == ["p", "n1", "n2"]


def test_columns_are_renamed_in_pairs_and_corpus(tmp_path):
    pairs = table(tmp_path / "p.parquet", {"text": "a question", "answer": "Milk\nHeat it.", "query": 7, "wrong": "no"})
    corpus = table(tmp_path / "c" / "c.parquet", {"doc": 12, "body": "Heat it.", "title": "Milk", "from": "kitchen"})
    columns = {"query": "text", "positive": "answer", "negative_1": "wrong", "id": "doc", "text": "body", "parent": "from"}
    records, problems = read(parquet(path=pairs, corpus=tmp_path / "c", columns=columns))
    assert not problems
    assert list(records.queries[0].positives) == ["12"]
    assert [(document.id, document.parent) for document in records.documents] == [
        ("12", "kitchen"), (records.queries[0].negatives[0], ""),
    ]  # fmt: skip
    assert corpus.is_file()
    assert records.queries[0].text == "a question"


def test_a_column_that_is_not_there_is_one_line_with_the_nearest(tmp_path):
    path = table(tmp_path / "p.parquet", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"expected a column 'query' or 'anchor', got question, answer; .*\{query: NAME\}"):
        read(parquet(path=path))
    with pytest.raises(
        DataError, match=r"column 'questions' \(data\.source\.columns\.query\), got question, answer; did you mean 'question'\?"
    ):
        read(parquet(path=path, columns={"query": "questions"}))
    with pytest.raises(DataError, match="expected a column 'positive' or 'pos'"):
        read(parquet(path=path, columns={"query": "question"}))
    with pytest.raises(DataError, match="expected a column 'text' or 'title'"):
        read(parquet(corpus=path))
    with pytest.raises(ValidationError, match=r"'querry' is not something a column can hold; .*did you mean 'query'\?"):
        parquet(path=path, columns={"querry": "question"})


def test_bad_rows_are_named_by_file_and_row(tmp_path):
    path = table(tmp_path / "p.parquet", query=["a", None, "b", " ", "c"], pos=[["x"], ["x"], [None], ["x"], []])
    records, problems = read(parquet(path=path))
    assert [query.text for query in records.queries] == ["a"]
    assert problems == [
        f"{path}:2: wrong type ('query' must be a string, got NoneType)",
        f"{path}:3: wrong type ('pos[0]' must be a string, got NoneType)",
        f"{path}:4: empty text ('query')",
        f"{path}:5: no positive (expected 'positive' or 'pos' with at least one passage)",
    ]
    corpus = table(tmp_path / "c.parquet", id=[1, 1, None], text=["x", "y", "z"])
    assert read(parquet(corpus=corpus))[1] == [
        f"{corpus}:2: duplicate id ('1')",
        f"{corpus}:3: wrong type ('id' must be a string, got NoneType)",
    ]


def test_rows_are_counted_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("ullme.sources._rows.BATCH_ROWS", 2)
    path = table(tmp_path / "p.parquet", query=["a", "b", "c", "d", ""], pos=[["x"]] * 5)
    records, problems = read(parquet(path=path))
    assert len(records.queries) == 4
    assert problems == [f"{path}:5: empty text ('query')"]


def test_a_corpus_alone_is_documents_only(tmp_path):
    records, _ = read(parquet(corpus=table(tmp_path / "c.parquet", text=["one", "two"])))
    assert ([document.text for document in records.documents], records.queries) == (["one", "two"], [])
    with pytest.raises(ValidationError, match="expected `path`, `corpus` or both, got neither"):
        parquet()


def test_searchable_corpus_keeps_other_passages_for_training(tmp_path):
    pairs, corpus = table(tmp_path / "p.parquet", *ROWS), table(tmp_path / "c.parquet", text=["a", "z"])
    records, _ = read(parquet(path=pairs, corpus=corpus, searchable="corpus"))
    assert {document.text for document in records.documents if document.searchable} == {"a", "z"}


def test_what_is_no_parquet_is_one_line(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"no table at all")
    with pytest.raises(DataError, match=r"p\.parquet: expected a Parquet file, it cannot be read as one") as caught:
        read(parquet(path=path))
    assert len(str(caught.value).splitlines()) == 1
    whole = table(tmp_path / "q.parquet", *ROWS).read_bytes()
    path.write_bytes(whole[:100] + bytes(100) + whole[200:])
    with pytest.raises(DataError, match="cannot be read as one"):
        read(parquet(path=path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected a folder with \*\.parquet files"):
        read(parquet(path=tmp_path / "empty"))
