"""A file of texts that are to be encoded, as a stream of documents.

    .txt       one text a line; its id is the number of the line
    .jsonl     {"id": ..., "text": ...} a line, and optionally "title"
    .parquet   the same as columns

The file is read once before anything is encoded, so that every bad record is named at once, and its documents are counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ullme.artifacts import sha256_file
from ullme.errors import DataError
from ullme.records import Document, Problems, numbered_lines
from ullme.sources._rows import rows

__all__ = ["TextFile"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
WANTED = ("id", "_id", "text", "title")
SHOWN_PROBLEMS = 50


@dataclass(frozen=True)
class TextFile:
    """A checked file. count: documents in it; digest: sha256 of its bytes."""

    path: Path
    count: int
    digest: str

    @classmethod
    def open(cls, path: Path) -> TextFile:
        """Check every record. 8 bytes a document are held meanwhile.

        Raises:
            DataError: not there, of another kind, without any text, or with bad records (all of them at once) or an id twice.
        """
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: expected a file {', '.join(SUFFIXES)}; give the texts in one of these forms")
        problems, short = Problems(), bytearray()
        for document in documents(path, problems):
            short += hashlib.blake2b(document.id.encode(), digest_size=8).digest()
        if problems:
            lines = [str(problem) for problem in problems.found[:SHOWN_PROBLEMS]]
            more = f", of which {SHOWN_PROBLEMS} are shown" if len(problems) > SHOWN_PROBLEMS else ""
            raise DataError([*lines, f"{len(problems)} bad records{more}; mend them and run again"])
        if not short:
            raise DataError(f"{path}: expected at least one text, got none")
        _, first, counts = np.unique(np.frombuffer(bytes(short), dtype=np.uint64), return_index=True, return_counts=True)
        if (counts > 1).any():
            twice = int(first[counts > 1].min())
            name = next(document.id for place, document in enumerate(documents(path, Problems())) if place == twice)
            raise DataError(f"{path}: expected a different id for every text, got '{name}' {counts.max()} times")
        return cls(path, len(short) // 8, sha256_file(path))

    def documents(self) -> Iterator[Document]:
        """The documents in the order of the file."""
        return documents(self.path, Problems())


def documents(path: Path, problems: Problems) -> Iterator[Document]:
    """Every usable record of a file; the others go to `problems`."""
    if path.suffix.lower() == ".txt":
        yield from (Document(str(number), line) for number, line in numbered_lines(path, problems))
        return
    for line in rows(path, WANTED, {}, problems):
        name = line.text("_id" if "_id" in line.value and "id" not in line.value else "id")
        text, title = line.text("text"), line.text("title", empty=True)
        if name is not None and text is not None and title is not None:
            yield Document(name, text, title)
