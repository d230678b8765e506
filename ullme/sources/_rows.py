"""Rows of JSON Lines and Parquet files as `Line`s, under the names that this project has for what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from ullme.components import did_you_mean
from ullme.errors import DataError
from ullme.records import Line, Problems, objects

__all__ = ["CORPUS", "PAIRS", "Columns", "Paths", "existing", "files_of", "rows"]

QUERY = ("query", "anchor")
POSITIVE = ("positive", "pos")
NEGATIVE = ("negative", "neg")
INSTRUCTION = ("instruction", "prompt")
NUMBERED = re.compile(r"negative_(\d+)")
PAIRS = (*QUERY, *POSITIVE, *NEGATIVE, *INSTRUCTION, "split", "group", "pos_scores", "neg_scores")
CORPUS = ("_id", "id", "text", "title", "parent", "section", "metadata")
IDS = ("_id", "id", "parent")
BATCH_ROWS = 1024


def _known(columns: dict[str, str]) -> dict[str, str]:
    names = (*PAIRS, *CORPUS)
    for name in columns:
        if name not in names and not NUMBERED.fullmatch(name):
            raise ValueError(f"'{name}' is not something a column can hold; allowed: {', '.join(names)}{did_you_mean(name, names)}")
    return columns


Paths = Annotated[
    tuple[Path, ...], BeforeValidator(lambda value: (value,) if isinstance(value, (str, Path)) else value), Field(min_length=1)
]
Columns = Annotated[dict[str, str], AfterValidator(_known)]
"""What this project calls a column -> what the file calls it."""


def existing(path: Path, what: str) -> Path:
    """The file at `path`.

    Raises:
        DataError: no file there; `what` says which kind was expected.
    """
    found = path.expanduser()
    if not found.is_file():
        raise DataError(f"{path}: expected a {what} file, found nothing there; check the path in data.source")
    return found


def files_of(paths: tuple[Path, ...], suffix: str, what: str) -> list[Path]:
    """The files that `paths` name, folders replaced by what in them ends with `suffix`, in order of name.

    Raises:
        DataError: a path is not there, or a folder without such files.
    """
    files = []
    for path in paths:
        found = sorted(path.expanduser().glob(f"*{suffix}")) if path.expanduser().is_dir() else [existing(path, what)]
        if not found:
            raise DataError(
                f"{path}: expected a folder with *{suffix} files, got one without any; name the files, or another folder"
            )
        files += found
    return files


def rows(path: Path, names: tuple[str, ...], columns: Mapping[str, str], problems: Problems) -> Iterator[Line]:
    """The rows of a file: Parquet where its name says so, else JSON Lines. A row's number counts from 1.

    Args:
        path: the file.
        names: what is wanted of a row, `PAIRS` or `CORPUS`.
        columns: what the file calls them, where that is something else.
        problems: takes the lines that hold no object.

    Raises:
        DataError: cannot be read, no Parquet, or without a column that `columns` names or that no row can do without.
    """
    if path.suffix.lower() == ".parquet":
        yield from _table_rows(path, names, columns, problems)
        return
    taken = set(columns.values()) - columns.keys()
    for line in objects(path, problems):
        kept = {name: value for name, value in line.value.items() if name not in taken and name not in columns}
        given = {name: line.value[theirs] for name, theirs in columns.items() if theirs in line.value}
        yield Line(path, line.number, kept | given, problems) if columns else line


def _table_rows(path: Path, names: tuple[str, ...], columns: Mapping[str, str], problems: Problems) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            source = _source_columns(path, names, columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=sorted(set(source.values()))):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(path, number, {name: _value(name, row[theirs]) for name, theirs in source.items()}, problems)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: expected a Parquet file, it cannot be read as one ({reason}); check data.source") from error


def _source_columns(path: Path, names: tuple[str, ...], columns: Mapping[str, str], present: list[str]) -> dict[str, str]:
    """Our name -> the file's, of every column that is read."""
    wanted = {name: theirs for name, theirs in columns.items() if name in names or (names is PAIRS and NUMBERED.fullmatch(name))}
    got = f"got {', '.join(present) or 'none'}"
    for name, theirs in wanted.items():
        if theirs not in present:
            near = did_you_mean(theirs, present)
            raise DataError(f"{path}: expected a column '{theirs}' (data.source.columns.{name}), {got}{near}")
    taken = set(columns.values())
    plain = [name for name in present if name in names or (names is PAIRS and NUMBERED.fullmatch(name))]
    found = {name: name for name in plain if name not in taken and name not in wanted} | wanted
    for needed in (QUERY, POSITIVE) if names is PAIRS else (("text", "title"),):
        if not found.keys() & set(needed):
            raise DataError(
                f"{path}: expected a column {' or '.join(map(repr, needed))}, {got}; "
                f"say which it is with data.source.columns: {{{needed[0]}: NAME}}"
            )
    return found


def _value(name: str, value: Any) -> Any:
    """Tables often number their documents: an id that is a whole number becomes its digits. Metadata may be an object's JSON."""
    if name == "metadata" and isinstance(value, str):
        try:
            return json.loads(value or "{}")
        except json.JSONDecodeError:
            return value
    return str(value) if name in IDS and isinstance(value, int) else value
