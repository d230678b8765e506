"""Queries made from the documents themselves, for those who have documents and no questions yet.

A title or heading becomes the query that everything below it answers; where there is none, a sentence does, for the passage
it stood in (the inverse cloze task: Lee, Chang and Toutanova 2019, "Latent Retrieval for Weakly Supervised Open Domain
Question Answering", arXiv 1906.00300, section 3). Either is taken out of what is embedded, so it cannot be found by its own
words. Scores on such queries compare models on these documents; they are not scores on the questions that people ask.

What becomes of a document depends on nothing but that document. Where several share a title, it is one query with all of
their passages as its answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ullme.passages import PATH_SEPARATOR, headings, sentences
from ullme.records import Document, Query, Records, hash_share, identifier, normalise
from ullme.splits import side_share

__all__ = ["HeldOut", "hold_out"]

HeldOut = Literal["auto", "titles", "sentences", "none"]
SHORT_HEADING = 3
SENTENCE_WORDS = range(6, 41)
PASSAGES_A_SENTENCE, MOST_SENTENCES = 16, 500
"""Of a long document: a sentence for so many passages, and at most so many, since each is looked for in all of its passages."""
PROSE = re.compile(r"[^\W\d_a-z].*[.!?。！？][\"'”’)\]]*", re.DOTALL)


@dataclass
class Asked:
    """A query being made: its spellings, the parents that it comes from, and the passages that answer it."""

    spellings: set[str] = field(default_factory=set)
    parents: set[str] = field(default_factory=set)
    answers: dict[str, int] = field(default_factory=dict)


def hold_out(records: Records, mode: HeldOut) -> tuple[Records, dict[str, int]]:
    """The records with queries made from their documents, and how many of each kind: held_out_titles, held_out_sentences.

    A query's group is the document that it comes from (of several, the one that stands nearest to testing), so the titles of
    a document share a side; the sentences of a long one do not. A document of a title alone keeps it.

    mode: `titles` takes titles and headings; `sentences` one a document, and of a long one one for every PASSAGES_A_SENTENCE
    passages; `auto` sentences where there are no titles.
    """
    parents: dict[str, list[Document]] = defaultdict(list)
    for document in records.documents:
        parents[document.parent or document.id].append(document)
    titles: dict[str, Asked] = defaultdict(Asked)
    lines: dict[str, Asked] = defaultdict(Asked)
    changed: dict[str, Document] = {}
    for parent, documents in parents.items():
        asked = list(_titles(documents)) if mode in ("auto", "titles") else []
        for text, answers in asked:
            _ask(titles, text, parent, answers)
        if asked:
            changed |= {document.id: _without_title(document) for document in documents}
        elif mode in ("auto", "sentences"):
            for group, text, without in _sentences(parent, documents):
                changed |= {document.id: document for document in without}
                _ask(lines, text, group, [document.id for document in without])
    queries = [*_queries(titles, "title-"), *_queries(lines, "sentence-")]
    documents = [changed.get(document.id, document) for document in records.documents]
    return replace(records, documents=documents, queries=queries), {
        "held_out_titles": len(titles),
        "held_out_sentences": len(lines),
    }


def _ask(gathered: dict[str, Asked], text: str, parent: str, answers: Iterable[str]) -> None:
    asked = gathered[normalise(text)]
    asked.spellings.add(" ".join(text.split()))
    asked.parents.add(parent)
    asked.answers.update(dict.fromkeys(answers, 1))


def _queries(gathered: dict[str, Asked], prefix: str) -> Iterator[Query]:
    for text, asked in sorted(gathered.items()):
        group = min(asked.parents, key=lambda parent: (side_share(parent), parent))
        yield Query(identifier(text, prefix), min(asked.spellings), positives=asked.answers, group=group)


def _titles(documents: Sequence[Document]) -> Iterator[tuple[str, list[str]]]:
    """(query, ids of its answers) of every title and heading of one parent."""
    below: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for document in documents:
        if document.text.strip():  # a title without text is all that there is to find
            below[document.title.strip(), tuple(headings(document.section))].append(document.id)
    for (title, path), answers in below.items():
        heading = path[-1] if path else ""
        words = len(normalise(heading).split())
        if words >= SHORT_HEADING or not title:
            text = heading if words > 1 else ""
        else:
            text = f"{title}: {heading}" if heading else title
        if any(sign.isalnum() for sign in text):
            yield text, answers


def _without_title(document: Document) -> Document:
    """The same with its title where people see it and the model does not."""
    if not document.title or not document.text.strip():
        return document
    section = PATH_SEPARATOR.join(part for part in (document.title, document.section) if part)
    return replace(document, title="", section=section)


def _sentences(parent: str, documents: Sequence[Document]) -> Iterator[tuple[str, str, list[Document]]]:
    """(group, sentence, the passages that held it without it) for every PASSAGES_A_SENTENCE passages of a parent.

    At least one sentence, and at most MOST_SENTENCES. A passage is asked about once, and none where nothing can be spared. The
    sentences are those of lowest hash, so documents that have most sentences in common give the same ones. Several of a parent have
    sides of their own: a single large file, too, is both learned from and tested on.
    """
    wanted = min(max(1, len(documents) // PASSAGES_A_SENTENCE), MOST_SENTENCES)
    candidates: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        for sentence in set(map(str.strip, sentences(document.text))):
            if PROSE.fullmatch(sentence) and len(normalise(sentence).split()) in SENTENCE_WORDS:
                candidates[sentence].append(document)
    asked: set[str] = set()
    found = 0
    for sentence in sorted(candidates, key=lambda text: (hash_share(normalise(text), "sentence"), text)):
        holders = [document for document in documents if sentence in document.text]
        without = [replace(document, text=_cut_out(document.text, sentence)) for document in holders]
        spared = all(len(normalise(document.text).split()) >= SENTENCE_WORDS.start for document in without)
        if spared and asked.isdisjoint(document.id for document in without):
            yield parent if wanted == 1 else f"{parent}: {normalise(sentence)}", sentence, without
            asked |= {document.id for document in without}
            found += 1
        if found == wanted:
            return


def _cut_out(text: str, sentence: str) -> str:
    """The text without a sentence; a paragraph's end stays one."""
    first, *others = text.split(sentence)
    for other in others:
        left, right = first.rstrip(), other.lstrip()
        gap = first[len(left) :] + other[: len(other) - len(right)]
        lines, _, indentation = gap.rpartition("\n")
        between = " " if "\n" not in gap else ("\n\n" if "\n" in lines else "\n") + indentation
        first = f"{left}{between}{right}" if left and right else left or right
    return first
