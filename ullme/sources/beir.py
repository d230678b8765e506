"""A folder as BEIR lays it out: the usual way to keep a retrieval collection with its judgements.

corpus.jsonl        {"_id": "...", "text": "...", "title": "...", "metadata": {...}}, the latter two optional
queries.jsonl       {"_id": "...", "text": "..."}, for all splits together
qrels/<split>.tsv   query, document and whole-numbered grade, with or without a header line; TREC's four columns too
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import Field, model_validator

from ullme.errors import DataError
from ullme.records import SPLITS, Document, Problems, Query, Records, Source, Split, digest_files, numbered_lines, objects
from ullme.sources._pairs import Pairs
from ullme.sources._rows import files_of

HEADER_NAMES = {"query-id", "query_id", "queryid", "qid", "query", "topic"}


class Beir(Source):
    """A folder of corpus, queries and graded judgements.

    The whole corpus is searchable. A grade of 0 or less makes a document a negative of its query. Queries without any
    positive are left out and counted; a query judged in two splits stays in the one that matters more (test, then dev).

    splits: which file of qrels/ serves as which split, such as `{test: graded}`; by default train, dev and test, as present.
    split_by_hash: forget which file a judgement came from and let `data.test_share` and `data.dev_share` split the queries;
        of two grades for the same pair, that of the split that matters more counts.
    train_pairs: files of further training pairs in the format of the `jsonl` source; their passages are not searchable,
        except where the corpus has the same text.
    """

    path: Path
    splits: dict[Split, str] = Field(default_factory=dict)
    split_by_hash: bool = False
    train_pairs: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _splits_are_files(self) -> Beir:
        doubled = [name for name, count in Counter(self.splits.values()).items() if count > 1]
        if doubled:
            raise ValueError(f"splits: expected a file for each split, got '{doubled[0]}' for two")
        return self

    def fingerprint(self) -> str:
        """Digest of the contents of every file that is read, with the split it serves as."""
        corpus, queries, qrels = self._files()
        pairs = ((f"pairs-{number:06d}", path) for number, path in enumerate(self._pair_files()))
        return digest_files([("corpus", corpus), ("queries", queries), *qrels.items(), *pairs])

    def read(self, problems: Problems) -> Records:
        """Documents, and the queries of every split with their judgements."""
        corpus, queries_file, qrels = self._files()
        pairs = Pairs(searchable=False)
        bad_documents, bad_queries = set[str](), set[str]()
        for document in _texts(corpus, problems, bad_documents):
            pairs.add_document(document)
        queries = {one.id: one.text for one in _texts(queries_file, problems, bad_queries)}
        known = (queries.keys() | bad_queries, pairs.documents.keys() | bad_documents)
        judged: dict[str, Query] = {}
        twice = 0
        for split in sorted(qrels, key=SPLITS.index, reverse=True):
            here = {query.id: query for query in _judged(qrels[split], queries, known, problems)}
            for name, query in here.items():
                if name in judged and not self.split_by_hash:
                    twice += 1
                    continue
                grades = {doc: grade for doc, grade in query.positives.items() if doc in pairs.documents}
                if name in judged:
                    grades |= judged[name].positives
                judged[name] = replace(query, split=None if self.split_by_hash else split, positives=grades)
        answered = [_graded(query) for query in judged.values() if max(query.positives.values(), default=0) > 0]
        for path in self._pair_files():
            pairs.read(objects(path, problems), split="train")
        counts = {
            "queries_without_positives": len(queries) - len(answered),
            "queries_in_two_splits": twice,
            "train_pairs": pairs.lines,
        }
        return Records(list(pairs.documents.values()), [*answered, *pairs.queries()], counts)

    def _pair_files(self) -> list[Path]:
        return files_of(self.train_pairs, ".jsonl", "JSON Lines")

    def _files(self) -> tuple[Path, Path, dict[Split, Path]]:
        """corpus.jsonl, queries.jsonl and the judgements of each split.

        Raises:
            DataError: something is not there.
        """
        folder = self.path.expanduser()
        expected = "expected a BEIR folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        if not folder.is_dir():
            raise DataError(f"{self.path}: {expected}, got no folder at all; check data.source.path")
        for name in ("corpus.jsonl", "queries.jsonl"):
            if not (folder / name).is_file():
                found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
                raise DataError(f"{self.path}: {expected}, got no {name} (found: {found}); name the folder that holds it")
        present = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
        found = ", ".join(present) or "none"
        wanted: dict[Split, str] = self.splits or {split: split for split in SPLITS if split in present}
        if not wanted:
            raise DataError(
                f"{self.path}/qrels: expected train.tsv, dev.tsv or test.tsv, got {found}; name yours: splits: {{test: NAME}}"
            )
        for split, name in wanted.items():
            if name.removesuffix(".tsv") not in present:
                raise DataError(f"{self.path}/qrels: expected {name.removesuffix('.tsv')}.tsv for splits.{split}, got {found}")
        return folder / "corpus.jsonl", folder / "queries.jsonl", {key: present[wanted[key].removesuffix(".tsv")] for key in wanted}


def _texts(path: Path, problems: Problems, bad: set[str]) -> Iterator[Document]:
    """Each good line, of a document or a query; `bad` takes the ids of the others, so that judgements of them are no news."""
    seen: set[str] = set()
    for line in objects(path, problems):
        name = line.text("_id")
        if name is None:
            continue
        if name in seen:
            line.bad("duplicate id", f"'{name}'")
            continue
        seen.add(name)
        title = line.text("title", empty=True)
        text = None if title is None else line.text("text", empty=bool(title.strip()))
        metadata = None if text is None else line.metadata()
        if title is None or text is None or metadata is None:
            bad.add(name)
            continue
        yield Document(name, text, title, metadata=metadata)


def _judged(path: Path, queries: dict[str, str], known: tuple[set[str], set[str]], problems: Problems) -> Iterator[Query]:
    """The queries of one file of judgements; `positives` still holds every grade, also 0 and below."""
    grades: dict[str, dict[str, int]] = {}
    for number, line in numbered_lines(path, problems):
        fields = line.split("\t") if "\t" in line else line.split()
        if number == 1 and fields[0].strip().casefold() in HEADER_NAMES:
            continue
        if len(fields) not in (3, 4):
            problems.add(path, number, "wrong number of columns", f"expected query, document and grade, got {len(fields)} columns")
            continue
        query, document, score = (fields[0].strip(), fields[-2].strip(), fields[-1].strip())
        try:
            grade = int(score)
        except ValueError:
            problems.add(path, number, "non-integer score", f"'{score}'")
            continue
        if query not in known[0]:
            problems.add(path, number, "unknown query", f"'{query}' is not in queries.jsonl")
        elif document not in known[1]:
            problems.add(path, number, "unknown document", f"'{document}' is not in corpus.jsonl")
        elif grades.setdefault(query, {}).setdefault(document, grade) != grade:
            problems.add(
                path, number, "judged twice", f"'{query}' and '{document}' have {grades[query][document]} already, now {grade}"
            )
    for query, judgements in grades.items():
        if query in queries:
            yield Query(query, queries[query], positives=judgements)


def _graded(query: Query) -> Query:
    """Separate what is right (grade above 0) from what is wrong."""
    positives = {doc: grade for doc, grade in query.positives.items() if grade > 0}
    return replace(query, positives=positives, negatives=tuple(doc for doc in query.positives if doc not in positives))
