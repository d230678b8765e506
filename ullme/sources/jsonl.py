"""Pairs, triplets and lists of positives and negatives in JSON Lines, as FlagEmbedding and sentence-transformers write them.

    {"query": "...", "positive": "..."}                                      a pair
    {"anchor": "...", "positive": "...", "negative": "..."}                  a triplet; also negative_1, negative_2, ...
    {"query": "...", "pos": ["...", ...], "neg": ["...", ...], "prompt": "..."}   lists

Optional in each: `instruction` (or `prompt`), `split` (train, dev or test), `group` (queries of one group stay on one side
of the split). `pos_scores` and `neg_scores` are checked and not used. Other keys are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ullme.errors import DataError
from ullme.records import SPLITS, Document, Line, Problems, Query, Records, Source, Split, digest_files, identifier, objects

QUERY = ("query", "anchor")
POSITIVE = ("positive", "pos")
NEGATIVE = ("negative", "neg")
INSTRUCTION = ("instruction", "prompt")
NUMBERED = re.compile(r"negative_(\d+)")

Paths = Annotated[
    tuple[Path, ...], BeforeValidator(lambda value: (value,) if isinstance(value, (str, Path)) else value), Field(min_length=1)
]


class Jsonl(Source):
    """Files of queries with their right (and wrong) passages.

    Lines with the same query (and instruction) become one query with all their passages. A passage's id is a hash of its
    text, unless the corpus has the same text under an id of its own. A passage named both right and wrong for one query
    counts as right.

    path: a file, several, or a folder, of which every *.jsonl is read.
    corpus: a file of more documents to search: {"text": ..., "id" or "_id" and "title": optional}.
    searchable: `all` passages, or only those of the `corpus` file; answers of test queries always are.
    """

    path: Paths
    corpus: Path | None = None
    searchable: Literal["all", "corpus"] = "all"

    def fingerprint(self) -> str:
        """Digest of the contents of every file."""
        corpus = [("corpus", _existing(self.corpus))] if self.corpus else []
        return digest_files([*corpus, *((f"{number:06d}", path) for number, path in enumerate(pair_files(self.path)))])

    def read(self, problems: Problems) -> Records:
        """Every usable query and passage."""
        pairs = Pairs(searchable=self.searchable == "all")
        if self.corpus:
            _read_corpus(_existing(self.corpus), pairs, problems)
        for path in pair_files(self.path):
            pairs.read(path, problems)
        return Records(list(pairs.documents.values()), list(pairs.queries()), {"pairs": pairs.lines})


@dataclass
class Asked:
    """What the lines read so far say about one query."""

    text: str
    instruction: str
    split: Split | None
    group: str
    positives: dict[str, int] = field(default_factory=dict)
    negatives: dict[str, None] = field(default_factory=dict)


class Pairs:
    """Queries and passages gathered from lines: one query per text and instruction, one document per text.

    searchable: what a passage becomes that no corpus holds.
    """

    def __init__(self, *, searchable: bool) -> None:
        self.documents: dict[str, Document] = {}
        self.lines = 0
        self._searchable = searchable
        self._by_text: dict[str, str] = {}
        self._asked: dict[tuple[str, str], Asked] = {}

    def add_document(self, document: Document) -> None:
        """Put a document in; passages with its text (or its title and text) will mean it."""
        self.documents[document.id] = document
        self._by_text.setdefault(document.content, document.id)
        self._by_text.setdefault(document.text, document.id)

    def read(self, path: Path, problems: Problems, *, split: Split | None = None) -> None:
        """Add every good line of a file; `split` for those that do not name their own."""
        for line in objects(path, problems):
            self._add(line, split)

    def queries(self) -> Iterator[Query]:
        """What has been gathered, in order of first appearance."""
        for (text, instruction), asked in self._asked.items():
            name = identifier(f"{instruction}\x00{text}" if instruction else text, "query-")
            negatives = tuple(doc for doc in asked.negatives if doc not in asked.positives)
            yield Query(name, text, asked.split, asked.positives, negatives, instruction, asked.group)

    def _add(self, line: Line, default: Split | None) -> None:
        text = _text(line, QUERY)
        positives = None if text is None else _passages(line, POSITIVE)
        numbered = sorted((name for name in line.value if NUMBERED.fullmatch(name)), key=lambda name: int(name[9:]))
        negatives = None if positives is None else _passages(line, NEGATIVE, numbered)
        if text is None or positives is None or negatives is None or not _scores_fit(line, len(positives), len(negatives)):
            return
        instruction, group = _optional(line, INSTRUCTION), line.text("group", empty=True)
        if instruction is None or group is None:
            return
        split = line.value.get("split") or default
        if split not in (*SPLITS, None):
            line.bad("unknown split", f"expected train, dev or test, got {split!r}")
            return
        asked = self._asked.setdefault((text, instruction), Asked(text, instruction, split, group))
        if asked.split != split:
            line.bad("two splits for one query", f"{asked.split or 'none'} before, now {split or 'none'}")
            return
        self.lines += 1
        asked.positives.update(dict.fromkeys(map(self._passage, positives), 1))
        asked.negatives.update(dict.fromkeys(map(self._passage, negatives)))

    def _passage(self, text: str) -> str:
        if text not in self._by_text:
            self.add_document(Document(identifier(text, "text-"), text, searchable=self._searchable))
        return self._by_text[text]


def pair_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files that `paths` name, folders replaced by their *.jsonl in order of name.

    Raises:
        DataError: a path is not there, or a folder without *.jsonl.
    """
    files = []
    for path in paths:
        found = sorted(path.expanduser().glob("*.jsonl")) if path.expanduser().is_dir() else [_existing(path)]
        if not found:
            raise DataError(f"{path}: expected a folder with *.jsonl files, got one without any; name the files, or another folder")
        files += found
    return files


def _existing(path: Path) -> Path:
    found = path.expanduser()
    if not found.is_file():
        raise DataError(f"{path}: expected a JSON Lines file, found nothing there; check the path in data.source")
    return found


def _read_corpus(path: Path, pairs: Pairs, problems: Problems) -> None:
    for line in objects(path, problems):
        title = line.text("title", empty=True)
        text = None if title is None else line.text("text", empty=bool(title.strip()))
        if title is None or text is None:
            continue
        key = next((key for key in ("_id", "id") if key in line.value), "")
        name = line.text(key) if key else identifier(f"{title}\n{text}" if title else text, "text-")
        if name is None:
            continue
        if name not in pairs.documents:
            pairs.add_document(Document(name, text, title))
        elif key:
            line.bad("duplicate id", f"'{name}'")


def _named(line: Line, names: tuple[str, ...]) -> str | None:
    """Which of the names for one thing the record uses; "" for none, None for several (noted)."""
    used = [name for name in names if name in line.value]
    if len(used) > 1:
        line.bad("field given twice", f"{' and '.join(map(repr, used))} mean the same")
        return None
    return used[0] if used else ""


def _text(line: Line, names: tuple[str, ...]) -> str | None:
    name = _named(line, names)
    if name == "":
        line.bad("missing field", f"expected {' or '.join(map(repr, names))}, got {', '.join(map(repr, line.value)) or 'none'}")
    return line.text(name) if name else None


def _optional(line: Line, names: tuple[str, ...]) -> str | None:
    name = _named(line, names)
    return name if not name else line.text(name, empty=True)


def _passages(line: Line, names: tuple[str, ...], numbered: list[str] | None = None) -> list[str] | None:
    """The passages under one of `names` (a text or a list of texts), then those of the numbered columns.

    None = something is wrong, which is noted. Without `numbered` there must be at least one.
    """
    name = _named(line, names)
    if name is None:
        return None
    given = line.value[name] if name else []
    values = [(name, given)] if isinstance(given, str) else [(f"{name}[{at}]", item) for at, item in enumerate(_listed(given))]
    if not isinstance(given, (str, list)) and given is not None:
        line.bad("wrong type", f"'{name}' must be a string or a list of strings, got {type(given).__name__}")
        return None
    if not values and numbered is None:
        line.bad("no positive", f"expected {' or '.join(map(repr, names))} with at least one passage")
        return None
    values += [(column, line.value[column]) for column in numbered or [] if line.value[column] is not None]
    checked = [line.checked(value, column) for column, value in values]
    texts = [text for text in checked if text is not None]
    return texts if len(texts) == len(checked) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _scores_fit(line: Line, positives: int, negatives: int) -> bool:
    """Whether `pos_scores` and `neg_scores`, where given, are numbers, one a passage."""
    for name, expected in (("pos_scores", positives), ("neg_scores", negatives)):
        scores = line.value.get(name)
        if scores is None:
            continue
        if not isinstance(scores, list) or not all(isinstance(item, (int, float)) and item is not True for item in scores):
            line.bad("wrong type", f"'{name}' must be a list of numbers")
            return False
        if len(scores) != expected:
            line.bad("wrong length", f"'{name}' has {len(scores)} numbers for {expected} passages")
            return False
    return True
