from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme.errors import DataError
from ullme.records import Document
from ullme.text_file import TextFile


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_lines_of_text_are_named_by_their_number(tmp_path: Path) -> None:
    file = TextFile.open(written(tmp_path / "a.txt", "first\n\n  \nthe fourth line\n"))
    assert list(file.documents()) == [Document("1", "first"), Document("4", "the fourth line")]
    assert file.count == 2


def test_json_lines_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "one", "title": "T"}, {"id": "b", "text": "two", "title": ""}]
    lines = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (lines, tmp_path / "a.parquet"):
        assert list(TextFile.open(path).documents()) == [Document("a", "one", "T"), Document("b", "two")]
    with_underscore = written(tmp_path / "b.jsonl", '{"_id": "x", "text": "y"}\n')
    assert list(TextFile.open(with_underscore).documents()) == [Document("x", "y")]


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    one, other = (TextFile.open(written(tmp_path / "a.txt", text)).digest for text in ("one", "other"))
    assert one != other


def test_every_bad_record_is_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"id": "a", "text": "fine"}\n{"id": "b"}\n{"text": "no id"}\nnot json\n')
    with pytest.raises(DataError) as caught:
        TextFile.open(path)
    assert [line.partition(": ")[0] for line in caught.value.problems[:-1]] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert caught.value.problems[-1] == "3 bad records; mend them and run again"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "x", r"expected a file \.txt, \.jsonl, \.parquet"),
        ("a.txt", "\n \n", "expected at least one text, got none"),
        ("a.jsonl", '{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n{"id": "b", "text": "z"}\n', "id .* got 'b' 2 times"),
        ("a.parquet", "x", "cannot be read as one"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        TextFile.open(written(tmp_path / name, content))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        TextFile.open(tmp_path / "a.txt")
