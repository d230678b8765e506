"""The documents of a data artifact on disk: one after the other as a stream, or row by row, whatever their number.

`documents.arrow` is an Arrow file in plain batches: a row is read from where it lies, and nothing is kept. What data stages
before version 5 wrote, `documents.parquet`, is read into memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ullme.errors import ArtifactError
from ullme.records import Document

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DOCUMENTS_FILE", "Documents", "write_documents"]

DOCUMENTS_FILE, EARLIER_FILE = "documents.arrow", "documents.parquet"
BATCH_ROWS = 1024
KEPT_BATCHES = 64  # as references into the mapped file
TEXTS, MARKS = ("id", "text", "title", "parent", "section", "dataset"), ("searchable", "held_out")


def write_documents(folder: Path, documents: Iterable[Document]) -> None:
    """Write `documents.arrow`. Equal documents give equal bytes."""
    import pyarrow as pa

    fields = [(name, pa.string()) for name in (*TEXTS, "metadata")] + [(name, pa.bool_()) for name in MARKS]
    schema = pa.schema(fields)
    rest = iter(documents)
    with pa.OSFile(str(folder / DOCUMENTS_FILE), "wb") as out, pa.ipc.new_file(out, schema) as writer:
        while batch := list(islice(rest, BATCH_ROWS)):
            columns: dict[str, list[Any]] = {name: [getattr(document, name) for document in batch] for name in (*TEXTS, *MARKS)}
            columns["metadata"] = [
                json.dumps(dict(document.metadata), sort_keys=True) if document.metadata else "" for document in batch
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


class Documents(Sequence[Document]):
    """The documents of a folder, or those in some of its rows; in the order of the rows given.

    Walking through all of them reads batch by batch and keeps none; `documents[5]` reads one.
    """

    def __init__(self, file: _File, rows: np.ndarray | None = None) -> None:
        """Use `Documents.open`. rows: Int[n], rows of the file; None = all."""
        self._file, self._rows = file, rows

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Those that `write_documents` wrote.

        Raises:
            ArtifactError: there is no such file, or it cannot be read.
        """
        return cls(_File(folder))

    def __len__(self) -> int:
        return self._file.count if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Document: ...
    @overload
    def __getitem__(self, place: slice) -> Documents: ...
    def __getitem__(self, place: int | slice) -> Document | Documents:
        """One document; of a slice, those in it."""
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        row = range(len(self))[place]
        return self._file.document(row if self._rows is None else int(self._rows[row]))

    def __iter__(self) -> Iterator[Document]:
        names = (*TEXTS, *MARKS, "metadata")
        for values in self.walk(*names):
            yield _document(dict(zip(names, values, strict=True)))

    def walk(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """These fields of every document; `metadata` as the JSON that is stored, empty where there is none."""
        rows = self._rows
        if rows is not None and len(rows) > 1 and (np.diff(rows) <= 0).any():
            for row in rows.tolist():
                yield self._file.values(row, names)
            return
        start = 0
        span = range(self._file.count) if rows is None else range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)
        for first, batch in self._file.batches(names, span):
            columns = [batch.column(name) for name in names]
            if rows is not None:
                stop = start + int(np.searchsorted(rows[start : start + batch.num_rows], first + batch.num_rows))
                inside = rows[start:stop] - first
                start = stop
                columns = [column.take(inside) for column in columns]
            yield from zip(*(column.to_pylist() for column in columns), strict=True)

    def ids(self) -> list[str]:
        """Ids of all of them, in memory."""
        return [name for (name,) in self.walk("id")]

    def take(self, places: np.ndarray | Sequence[int]) -> Documents:
        """Those at these places, in this order."""
        chosen = np.asarray(places, dtype=np.int32 if self._file.count < 2**31 else np.int64)
        return Documents(self._file, chosen if self._rows is None else self._rows[chosen])

    def where(self, name: str, *, equals: Any) -> Documents:
        """Those with this value in a field."""
        return self.take(np.flatnonzero(np.fromiter((value == equals for (value,) in self.walk(name)), bool, len(self))))

    def places(self, names: Collection[str]) -> dict[str, int]:
        """Where the documents with these ids stand; those that are not among them are left out."""
        wanted = names if isinstance(names, set | frozenset | dict) else set(names)
        return {name: place for place, (name,) in enumerate(self.walk("id")) if name in wanted} if wanted else {}

    def named(self, names: Collection[str]) -> dict[str, Document]:
        """The documents with these ids, read together."""
        found = self.places(names)
        there = self.take(list(found.values()))
        return {document.id: document for document in there}


class _File:
    """The Arrow file, mapped for single rows and read plainly for streams: pages of a mapping stay in memory once touched."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._path = folder / DOCUMENTS_FILE
        try:
            self._stored: pa.Buffer | None = None if self._path.is_file() else _earlier(folder / EARLIER_FILE)
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)) if self._stored is None else self._stored)
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{self._path}: not a table of documents ({error}); run the data stage again") from error
        last = self._reader.num_record_batches - 1
        self.count = last * BATCH_ROWS + self._reader.get_batch(last).num_rows if last >= 0 else 0
        self._batch, self._lock = lru_cache(KEPT_BATCHES)(self._reader.get_batch), Lock()

    def batches(self, names: Collection[str], span: range) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(row of the first document, batch) of all that hold rows of a span, with these columns alone."""
        import pyarrow as pa

        fields = [self._reader.schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        with pa.OSFile(str(self._path)) if self._stored is None else pa.BufferReader(self._stored) as source:
            reader = pa.ipc.open_file(source, options=options)
            for number in range(span.start // BATCH_ROWS, -(-span.stop // BATCH_ROWS)):
                yield number * BATCH_ROWS, reader.get_batch(number)

    def values(self, row: int, names: Collection[str]) -> tuple[Any, ...]:
        """These fields of one document."""
        with self._lock:  # a server asks from several threads, and the reader is made for one
            batch = self._batch(row // BATCH_ROWS)
        return tuple(batch.column(name)[row % BATCH_ROWS].as_py() for name in names)

    def document(self, row: int) -> Document:
        """One document."""
        names = (*TEXTS, *MARKS, "metadata")
        return _document(dict(zip(names, self.values(row, names), strict=True)))


def _document(values: dict[str, Any]) -> Document:
    return Document(**{**values, "metadata": json.loads(values["metadata"] or "{}")})


def _earlier(file: Path) -> pa.Buffer:
    """What an earlier data stage wrote, as the same table in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise ArtifactError(f"{file.parent}: expected a data artifact, but there is no {DOCUMENTS_FILE}; run the data stage again")
    table = pq.read_table(file).combine_chunks()
    for name in ("metadata", "dataset", "section", "parent"):
        if name not in table.column_names:
            table = table.append_column(name, pa.array([""] * len(table), pa.string()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return sink.getvalue()
