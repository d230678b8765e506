"""What a source gives, how its files are read, and how every bad record is named by `path:line`.

A source (`ullme/sources/<kind>.py`) turns files into `Records`. Whatever it cannot use it reports to `Problems` and goes
on, so that one run names every bad record; whether that stops the run is decided in `ullme.data`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ullme.artifacts import digest_of, sha256_file
from ullme.components import Component
from ullme.errors import DataError

__all__ = [
    "SPLITS",
    "Document",
    "Line",
    "Problem",
    "Problems",
    "Query",
    "Records",
    "Source",
    "Split",
    "digest_files",
    "hash_share",
    "identifier",
    "normalise",
    "numbered_lines",
    "objects",
]

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One passage.

    searchable: part of the corpus that is indexed and evaluated; False = it exists only to train on.
    held_out: never shown in training, not even as a negative: it belongs to what the model is tested on.
    parent: id of the document that this passage was cut from; empty = it was not cut, it is the document.
    section: where in the parent it stands, such as `Install > On Linux`; shown to people, never embedded.
    dataset: the auxiliary data set it belongs to; empty = the run's own.
    metadata: what searches can filter by (`ullme.filters`): texts, numbers, truth values and lists of them; never embedded.
    """

    id: str
    text: str
    title: str = ""
    searchable: bool = True
    held_out: bool = False
    parent: str = ""
    section: str = ""
    dataset: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def content(self) -> str:
        """What is embedded: title and text on lines of their own, or the one that is there."""
        return f"{self.title}\n{self.text}" if self.title and self.text else self.title or self.text


@dataclass(frozen=True, slots=True)
class Query:
    """One question with its judged documents.

    split: train, dev or test; None = the source does not say, and `ullme.data` decides by the hash of `group`.
    positives: document id -> grade (> 0). negatives: ids of documents that the source calls wrong answers.
    instruction: what this query asks for, where the source says so; empty = the model's own query prompt.
    group: queries of one group stay on one side of the split; empty = the canonical form of the text (`ullme.splits`).
    dataset: the auxiliary data set it belongs to; empty = the run's own.
    """

    id: str
    text: str
    split: Split | None = None
    positives: Mapping[str, int] = field(default_factory=dict)
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    group: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class Records:
    """All that a source holds: ids are unique, and every judged id is one of the documents.

    counts: whatever else is worth showing people, such as what was left out on purpose.
    """

    documents: list[Document]
    queries: list[Query]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad record: where, which kind of mistake (a fixed phrase, counted), and what exactly."""

    path: str
    line: int
    cause: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


class Problems:
    """Collects every bad record, in the order of reading."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, path: Path, line: int, cause: str, detail: str = "") -> None:
        """Note a bad record. `cause` is the phrase it is counted under, `detail` what is particular to it."""
        self.found.append(Problem(str(path), line, cause, detail))

    def by_cause(self) -> dict[str, int]:
        """Number of bad records of each cause, most frequent first."""
        return dict(Counter(problem.cause for problem in self.found).most_common())

    def __len__(self) -> int:
        return len(self.found)


class Source(Component):
    """Base of every source kind: fields say where the data lies, `read` yields it, `fingerprint` says which version."""

    @abstractmethod
    def read(self, problems: Problems) -> Records:
        """Everything usable; what is not goes to `problems`.

        Raises:
            DataError: the source as a whole is not there or not what it should be.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the data that `read` would see: other contents, other fingerprint.

        Raises:
            DataError: the source is not there.
        """


def normalise(text: str) -> str:
    """Words of `text` in one spelling (compatibility forms, case, punctuation and spacing do not count).

    Text without any word keeps its non-space characters, so two different symbols stay different.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


def hash_share(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the text and the salt alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{salt}\x00{text}".encode()).digest()[:7]) / 256**7


def identifier(text: str, prefix: str) -> str:
    """A stable id for a text that came without one: the prefix and 16 hexadecimal digits of its sha256."""
    return prefix + hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """One digest of the contents of files under the names they have within their source."""
    return digest_of([[name, sha256_file(path)] for name, path in sorted(files)])


def numbered_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line that is not blank; a line that is not UTF-8 is a problem.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    problems.add(path, number, "invalid UTF-8", f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
                    continue
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions") from error


def objects(path: Path, problems: Problems) -> Iterator[Line]:
    """Each line of a JSON Lines file that holds an object; anything else on a line is a problem.

    Raises:
        DataError: the file cannot be opened.
    """
    for number, line in numbered_lines(path, problems):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(path, number, "bad JSON", f"{error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            problems.add(path, number, "bad JSON", str(error))
        else:
            if isinstance(value, dict):
                yield Line(path, number, value, problems)
            else:
                problems.add(path, number, "not an object", f"expected {{...}}, got {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class Line:
    """One object of a JSON Lines file, or one row of a table, which reports what is wrong with itself."""

    path: Path
    number: int
    value: dict[str, Any]
    problems: Problems

    def bad(self, cause: str, detail: str = "") -> None:
        """Note that this record cannot be used."""
        self.problems.add(self.path, self.number, cause, detail)

    def text(self, name: str, *, empty: bool = False) -> str | None:
        """The field `name` as a text; None when it is bad, which is noted. With `empty` it may be absent, null or blank."""
        if name not in self.value and not empty:
            self.bad("missing field", f"'{name}'; got {', '.join(map(repr, self.value)) or 'none'}")
            return None
        value = self.value.get(name)
        return "" if empty and value is None else self.checked(value, name, empty=empty)

    def metadata(self) -> dict[str, Any] | None:
        """The field `metadata`, {} where there is none; None when it is bad, which is noted. Fields that are null are left out."""
        given = self.value.get("metadata") or {}
        if not isinstance(given, dict):
            self.bad("wrong type", f"'metadata' must be an object, got {type(given).__name__}")
            return None
        kept = {name: value for name, value in given.items() if value is not None}
        for name, value in kept.items():
            if not all(isinstance(one, str | int | float) for one in (value if isinstance(value, list) else [value])):
                self.bad("wrong type", f"'metadata.{name}' must be a text, a number, true, false or a list of them")
                return None
        return kept

    def checked(self, value: Any, name: str, *, empty: bool = False) -> str | None:
        """`value` if it is a text that can be stored, else None, which is noted; `name` says where it stood."""
        if not isinstance(value, str):
            self.bad("wrong type", f"'{name}' must be a string, got {type(value).__name__}")
        elif not value.strip() and not empty:
            self.bad("empty text", f"'{name}'")
        elif "\x00" in value:
            self.bad("NUL character", f"'{name}' at position {value.index(chr(0))}")
        elif surrogate := next((sign for sign in value if "\ud800" <= sign <= "\udfff"), ""):
            self.bad("lone surrogate", f"'{name}' has \\u{ord(surrogate):04x} without its other half")
        else:
            return value
        return None
