"""Queries and passages gathered from rows: pairs, triplets, lists, corpora and labels, wherever the rows come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ullme.records import SPLITS, Document, Line, Query, Split, identifier
from ullme.sources._rows import INSTRUCTION, NEGATIVE, NUMBERED, POSITIVE, QUERY

__all__ = ["Pairs"]


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

    def read(self, lines: Iterable[Line], *, split: Split | None = None) -> None:
        """Add every good pair, triplet or list; `split` for those that do not name their own."""
        for line in lines:
            self._add(line, split)

    def read_corpus(self, lines: Iterable[Line]) -> None:
        """Add every good document: text, and optionally id (or _id), title, parent, section and metadata."""
        for line in lines:
            title, parent, section = (line.text(name, empty=True) for name in ("title", "parent", "section"))
            text = None if title is None else line.text("text", empty=bool(title.strip()))
            metadata = line.metadata()
            if title is None or text is None or parent is None or section is None or metadata is None:
                continue
            key = next((key for key in ("_id", "id") if key in line.value), "")
            name = line.text(key) if key else identifier(f"{title}\n{text}" if title else text, "text-")
            if name is None:
                continue
            if name not in self.documents:
                self.add_document(Document(name, text, title, parent=parent, section=section, metadata=metadata))
            elif key:
                line.bad("duplicate id", f"'{name}'")

    def read_labels(self, lines: Iterable[Line], find: Callable[[str], Sequence[str] | None]) -> None:
        """Add every good query whose positives are names; `find` gives the ids that a name means, or None for no such name.

        A name that means no id, such as that of a file that could not be read, is passed over.
        """
        for line in lines:
            text = _text(line, QUERY)
            names = None if text is None else _passages(line, ("positives",))
            if text is None or names is None:
                continue
            found = {name: find(name) for name in names}
            unknown = next((name for name, ids in found.items() if ids is None), None)
            if unknown is not None:
                line.bad("unknown document", f"'{unknown}' is neither a file that was read nor a passage of one")
                continue
            ids = [name for ids in found.values() for name in ids or ()]
            if ids and (asked := self._asked_by(line, text, None)) is not None:
                self.lines += 1
                asked.positives.update(dict.fromkeys(ids, 1))

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
        if (asked := self._asked_by(line, text, default)) is not None:
            self.lines += 1
            asked.positives.update(dict.fromkeys(map(self._passage, positives), 1))
            asked.negatives.update(dict.fromkeys(map(self._passage, negatives)))

    def _asked_by(self, line: Line, text: str, default: Split | None) -> Asked | None:
        """The query that a line asks, with its instruction, group and split; None when these are bad, which is noted."""
        instruction, group = _optional(line, INSTRUCTION), line.text("group", empty=True)
        if instruction is None or group is None:
            return None
        split = line.value.get("split") or default
        if split not in (*SPLITS, None):
            line.bad("unknown split", f"expected train, dev or test, got {split!r}")
            return None
        asked = self._asked.setdefault((text, instruction), Asked(text, instruction, split, group))
        if asked.split != split:
            line.bad("two splits for one query", f"{asked.split or 'none'} before, now {split or 'none'}")
            return None
        return asked

    def _passage(self, text: str) -> str:
        if text not in self._by_text:
            self.add_document(Document(identifier(text, "text-"), text, searchable=self._searchable))
        return self._by_text[text]


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
