"""The data stage: a source's records, checked and split, as four tables that every later stage reads.

    documents.arrow     id, text, title, parent, section, dataset, metadata (JSON), searchable, held_out (`ullme.documents`)
    queries.parquet     id, text, split (train | dev | test), instruction, dataset
    qrels.parquet       query_id, doc_id, score (> 0)
    negatives.parquet   query_id, doc_id: wrong answers that the source itself gave
    logs/skipped.jsonl  with `on_bad_record: skip`, what was left out and why

The same records give the same bytes. What `DataConfig.resolved()` adds makes the artifact's key follow the files' contents.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ullme.artifacts import Draft, Inputs, Stage, digest_of
from ullme.components import Section, component
from ullme.documents import Documents, write_documents
from ullme.errors import ArtifactError, ContractError, DataError
from ullme.held_out import HeldOut, hold_out
from ullme.records import SPLITS, Document, Problems, Query, Records, Source, Split, hash_share, normalise
from ullme.splits import split_queries

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "PREPARE",
    "DataConfig",
    "Dataset",
    "Document",
    "Example",
    "Query",
    "counted",
    "prepare",
    "read_examples",
    "read_texts",
    "write_tables",
]

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 50
NAME_KEY = "data.name"  # in the metadata of queries.parquet
Count = Annotated[int, Field(gt=0)]
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Share = Annotated[float, Field(ge=0, le=0.9)]


class DataConfig(Section):
    """Where the data comes from and how it is split and capped.

    A source that has splits keeps them. Queries without one are split by the hash of their group (by default their content
    words): near-duplicates fall on one side, and a query that was once for testing stays so as data grows (`ullme.splits`).
    Caps keep the queries of lowest hash, so a smaller cap keeps a subset of a larger one, whatever the seed.

    auxiliary: further sources by name. The model is trained on their train queries (those without a split, too); their documents
    are mined for negatives of these, and are neither indexed nor evaluated. What they share with the run's own test and
    development queries or held-out documents is dropped.
    name: what the data set is called, where `backbone.prompts.datasets` has templates for it; empty = the kind of its source.
    held_out: what becomes a query where the source has none: titles and headings, sentences of each document, by default (auto)
    sentences where there are no titles, or nothing (`ullme.held_out`).
    source_digest: fingerprint of the source's contents, filled in by `resolved()`. Written into a configuration by hand,
    it pins the data: other contents are then an error.
    """

    source: Annotated[Source, component("ullme.sources")]
    auxiliary: dict[DatasetName, Annotated[Source, component("ullme.sources")]] = Field(default_factory=dict)
    name: str = ""
    on_bad_record: Literal["fail", "skip"] = "fail"
    held_out: HeldOut = "auto"
    dev_share: Share = 0.05
    test_share: Share = 0.1
    max_train_queries: Count | None = None
    max_dev_queries: Count | None = None
    max_test_queries: Count | None = None
    max_documents: Count | None = None
    source_digest: str = ""

    @model_validator(mode="after")
    def _shares_leave_something(self) -> DataConfig:
        if self.dev_share + self.test_share >= 1:
            raise ValueError(f"dev_share + test_share must be below 1, got {self.dev_share + self.test_share:g}")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        if self.called in self.auxiliary:
            raise ValueError(f"auxiliary: '{self.called}' is what the run's own data set is called; give this one another name")
        return self

    @property
    def called(self) -> str:
        """What the data set is called."""
        return self.name or self.source.kind

    def resolved(self) -> DataConfig:
        """A copy whose `source_digest` names the contents of the source as they are now.

        Raises:
            DataError: the source is not there, or `source_digest` was given and the contents are others.
        """
        found = self.source.fingerprint()
        if self.auxiliary:
            found = digest_of([found, {name: self._fingerprint(name) for name in self.auxiliary}])
        if self.source_digest and self.source_digest != found:
            raise DataError(
                f"data.source ({self.source.kind}): expected contents {self.source_digest[:12]}, got {found[:12]}; "
                "the files changed: bring the old ones back, or remove data.source_digest to use the new ones"
            )
        return self.model_copy(update={"source_digest": found})

    def _fingerprint(self, name: str) -> str:
        try:
            return self.auxiliary[name].fingerprint()
        except DataError as error:
            raise DataError([f"data.auxiliary.{name}: {problem}" for problem in error.problems]) from error


@dataclass(frozen=True, slots=True)
class Example:
    """A query with everything that training needs, ids beside texts.

    scores: the miner's score of each negative, in their order; None unless every negative has one.
    instruction: as in `Query`. dataset: what its data set is called.
    """

    query_id: str
    query: str
    positive_ids: tuple[str, ...]
    positives: tuple[str, ...]
    negative_ids: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    instruction: str = ""
    dataset: str = ""


def prepare(section: DataConfig, inputs: Inputs, draft: Draft) -> None:  # noqa: ARG001 - the signature of every stage
    """Read the source, deal with bad records, split, cap, and write the artifact.

    Raises:
        DataError: bad records under `on_bad_record: fail` (all of them at once), or nothing usable in the source.
    """
    section = section.resolved()
    draft.restart()
    problems = Problems()
    read = {name: source.read(problems) for name, source in {"": section.source, **section.auxiliary}.items()}
    _settle(problems, section.on_bad_record, draft)
    for found in read.values():
        check_records(found)
    records = read.pop("")
    if not records.documents:
        raise DataError(f"data.source ({section.source.kind}): no usable document; there is nothing to index")
    records, made = _with_queries(records, section)
    never = {normalise(document.content) for document in records.documents if document.held_out}
    auxiliary = [_auxiliary(name, found, never) for name, found in read.items()]
    queries, leaked = split_queries(
        [query for part in (records, *auxiliary) for query in part.queries],
        dev_share=section.dev_share,
        test_share=section.test_share,
    )
    queries = [
        query
        for split in SPLITS
        for name in ("", *section.auxiliary)
        for query in _capped([q for q in queries if (q.split, q.dataset) == (split, name)], section, split)
    ]
    documents = _documents([doc for part in (records, *auxiliary) for doc in part.documents], queries, section.max_documents)
    kept = {document.id for document in documents}
    queries = [replace(query, negatives=tuple(doc for doc in query.negatives if doc in kept)) for query in queries]
    write_tables(draft.path, documents, queries, section.called)
    draft.meta |= counted(documents, queries) | dict(records.counts) | made
    draft.meta |= {name: count for part in auxiliary for name, count in part.counts.items()}
    draft.meta |= {"skipped": len(problems), "queries_on_two_sides": leaked}
    logger.info("data: %s", ", ".join(f"{name} {count}" for name, count in draft.meta.items()))
    for split in SPLITS:
        if not draft.meta[f"queries_{split}"]:
            logger.warning("data: the source (%s) gives no %s queries", section.source.kind, split)


PREPARE = Stage("data", "data", 6, prepare)


def check_records(records: Records) -> None:
    """Hold a source to its contract.

    Raises:
        ContractError: an id twice, a judged document that is not there, a query without positives or with a bad split.
    """
    documents = {document.id for document in records.documents}
    if len(documents) != len(records.documents) or len({query.id for query in records.queries}) != len(records.queries):
        raise ContractError("Records: expected unique document and query ids, got one twice")
    for query in records.queries:
        judged = {*query.positives, *query.negatives}
        if not judged <= documents:
            raise ContractError(f"Records: query '{query.id}' points at '{min(judged - documents)}', which is no document")
        if not query.positives or min(query.positives.values()) <= 0:
            raise ContractError(f"Records: query '{query.id}' needs at least one positive, each with a grade above 0")
        if query.split not in (*SPLITS, None):
            raise ContractError(f"Records: query '{query.id}': expected split train, dev, test or None, got {query.split!r}")


def _settle(problems: Problems, on_bad_record: str, draft: Draft) -> None:
    """Fail with every bad record, or write down what is skipped."""
    if not problems:
        return
    causes = ", ".join(f"{cause} {count}" for cause, count in problems.by_cause().items())
    if on_bad_record == "fail":
        listing = draft.scratch / "bad_records.txt"
        listing.write_text("".join(f"{problem}\n" for problem in problems.found), encoding="utf-8", errors="backslashreplace")
        lines = [str(problem) for problem in problems.found[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more, all of them in {listing}")
        lines.append(f"{len(problems)} bad records ({causes}); mend them, or set data.on_bad_record: skip to leave them out")
        raise DataError(lines)
    logs = draft.path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(asdict(problem)) + "\n" for problem in problems.found)
    (logs / "skipped.jsonl").write_text(rows, encoding="utf-8")
    logger.warning("data: %d bad records skipped (%s); each is listed in logs/skipped.jsonl", len(problems), causes)


def _auxiliary(name: str, records: Records, never: set[str]) -> Records:
    """The train queries of an auxiliary source and its documents, under names of their own; less the documents that read so.

    Raises:
        DataError: it has no train query.
    """
    documents = [
        replace(
            document,
            id=f"{name}:{document.id}",
            parent=f"{name}:{document.parent}" if document.parent else "",
            searchable=False,
            held_out=False,
            dataset=name,
        )
        for document in records.documents
        if not document.held_out and normalise(document.content) not in never
    ]
    there = {document.id for document in documents}
    queries = []
    for query in records.queries:
        positives = {f"{name}:{doc}": grade for doc, grade in query.positives.items() if f"{name}:{doc}" in there}
        if query.split in (None, "train") and positives:
            negatives = tuple(f"{name}:{doc}" for doc in query.negatives if f"{name}:{doc}" in there)
            marks = {"id": f"{name}:{query.id}", "split": "train", "dataset": name}
            queries.append(replace(query, positives=positives, negatives=negatives, **marks))
    if not queries:
        raise DataError(
            f"data.auxiliary.{name}: expected train queries to learn from, got none among {len(records.queries)} queries; "
            "auxiliary data sets are only trained on"
        )
    return Records(documents, queries, {f"documents_{name}": len(documents), f"queries_train_{name}": len(queries)})


def _with_queries(records: Records, section: DataConfig) -> tuple[Records, dict[str, int]]:
    """The records as they are if they have queries, else with what `held_out` makes of the documents; and how many."""
    mode = "none" if records.queries else section.held_out
    records, made = hold_out(records, mode) if mode != "none" else (records, {"held_out_titles": 0, "held_out_sentences": 0})
    if any(made.values()):
        logger.warning(
            "data: the source (%s) has no queries; %d titles and headings and %d sentences were taken out of what is embedded and "
            "serve as queries: scores on them compare models, they are not scores on users' questions (data.held_out: none "
            "leaves the documents whole)",
            section.source.kind,
            made["held_out_titles"],
            made["held_out_sentences"],
        )
    return records, made


def _capped(queries: list[Query], section: DataConfig, split: Split) -> list[Query]:
    cap: int | None = getattr(section, f"max_{split}_queries")
    if cap is None or len(queries) <= cap:
        return queries
    chosen = set(sorted((query.id for query in queries), key=lambda name: (hash_share(name, "cap"), name))[:cap])
    return [query for query in queries if query.id in chosen]


def _documents(documents: list[Document], queries: list[Query], cap: int | None) -> list[Document]:
    """At most `cap` searchable documents; the answers of the kept test queries are searchable in any case.

    With a cap, those of dev queries stay too, and a document beyond it stays only to train on, if a train query has judged
    it; otherwise it goes.
    """
    answers = {doc for query in queries if query.split == "test" for doc in query.positives}
    documents = [replace(doc, searchable=True) if doc.id in answers and not doc.searchable else doc for doc in documents]
    searchable = [document.id for document in documents if document.searchable]
    if cap is None or len(searchable) <= cap:
        return documents
    needed = {doc for query in queries if query.split != "train" for doc in query.positives} & set(searchable)
    if len(needed) > cap:
        logger.warning("data: max_documents is %d, but %d answer dev and test queries; all of these are kept", cap, len(needed))
    order = sorted(searchable, key=lambda name: (name not in needed, hash_share(name, "cap"), name))
    chosen = set(order[: max(cap, len(needed))])
    trained = {doc for query in queries for doc in (*query.positives, *query.negatives) if query.split == "train"}
    return [
        replace(document, searchable=document.id in chosen)
        for document in documents
        if document.id in chosen or document.id in trained or not document.searchable
    ]


def counted(documents: Sequence[Document], queries: Sequence[Query]) -> dict[str, int]:
    """What a data artifact's manifest says of it. trainable: documents that training may see, about (see `ullme.mining`)."""
    seen = {doc for query in queries if query.split == "train" for doc in query.positives}
    judged = {doc for query in queries if query.split != "train" for doc in query.positives} - seen
    contents = Counter(normalise(document.content) for document in documents)
    texts = Counter(normalise(query.text) for query in queries)
    return {
        "documents": len(documents),
        "searchable": sum(document.searchable for document in documents),
        "trainable": sum(not document.held_out and document.id not in judged for document in documents),
        **{f"queries_{split}": sum(query.split == split for query in queries) for split in SPLITS},
        "qrels": sum(len(query.positives) for query in queries),
        "negatives": sum(len(query.negatives) for query in queries),
        "duplicate_documents": len(documents) - len(contents),
        "duplicate_queries": len(queries) - len(texts),
    }


def write_tables(path: Path, documents: Iterable[Document], queries: Sequence[Query], called: str) -> None:
    """Write a data artifact's tables. called: the data set's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    qrels = [(query.id, doc, grade) for query in queries for doc, grade in query.positives.items()]
    negatives = [(query.id, doc) for query in queries for doc in query.negatives]
    tables: dict[str, dict[str, pa.Array]] = {
        "queries": {
            name: pa.array([getattr(query, name) for query in queries], pa.string())
            for name in ("id", "text", "split", "instruction", "dataset")
        },
        "qrels": {
            "query_id": pa.array([row[0] for row in qrels], pa.string()),
            "doc_id": pa.array([row[1] for row in qrels], pa.string()),
            "score": pa.array([row[2] for row in qrels], pa.int32()),
        },
        "negatives": {
            "query_id": pa.array([row[0] for row in negatives], pa.string()),
            "doc_id": pa.array([row[1] for row in negatives], pa.string()),
        },
    }
    write_documents(path, documents)
    for name, columns in tables.items():
        table = pa.table(columns).replace_schema_metadata({NAME_KEY: called} if name == "queries" else None)
        pq.write_table(table, path / f"{name}.parquet", compression="zstd")


class Dataset:
    """A data artifact: documents stay on disk, queries are read when first asked for and kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """The data set in a directory.

        Raises:
            ArtifactError: not a data artifact.
        """
        dataset = cls(Path(path))
        dataset.documents()
        for name in ("queries", "qrels", "negatives"):
            if not (dataset.path / f"{name}.parquet").is_file():
                raise ArtifactError(f"{path}: expected a data artifact, but there is no {name}.parquet; run the data stage again")
        return dataset

    @cached_property
    def name(self) -> str:
        """What the data set is called (`data.name`)."""
        import pyarrow.parquet as pq

        return (pq.read_schema(self.path / "queries.parquet").metadata or {}).get(NAME_KEY.encode(), b"").decode()

    def documents(self) -> Documents:
        """Every document, searchable or not."""
        return self._documents

    def corpus(self) -> Documents:
        """The documents that are indexed and evaluated."""
        return self._corpus

    def training_documents(self) -> Documents:
        """The documents that training may see: where negatives are mined."""
        return self._documents.where("held_out", equals=False)

    def document(self, name: str) -> Document:
        """The document with this id. For many, `documents().named(...)` reads them together."""
        return self._documents[self._places[name]]

    def queries(self, split: Split) -> list[Query]:
        """Queries of one split, each with its positives and the source's own negatives."""
        return [query for query in self._queries if query.split == split]

    def _table(self, name: str) -> pa.Table:
        import pyarrow.parquet as pq

        return pq.read_table(self.path / f"{name}.parquet")

    @cached_property
    def _documents(self) -> Documents:
        return Documents.open(self.path)

    @cached_property
    def _corpus(self) -> Documents:
        return self._documents.where("searchable", equals=True)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, (name,) in enumerate(self._documents.walk("id"))}

    @cached_property
    def _queries(self) -> list[Query]:
        positives: dict[str, dict[str, int]] = defaultdict(dict)
        negatives: dict[str, list[str]] = defaultdict(list)
        for row in self._table("qrels").to_pylist():
            positives[row["query_id"]][row["doc_id"]] = row["score"]
        for row in self._table("negatives").to_pylist():
            negatives[row["query_id"]].append(row["doc_id"])
        rows: list[dict[str, Any]] = self._table("queries").to_pylist()
        return [Query(**row, positives=positives[row["id"]], negatives=tuple(negatives[row["id"]])) for row in rows]


def read_examples(data_path: Path, negatives_path: Path | None = None, split: Split = "train") -> list[Example]:
    """The examples of one split: positives best grade first, then what the judge of the negatives took for one; negatives the
    source's own first, then the mined ones.

    A mined id that is a positive of its query, or a negative already, is passed over.

    Raises:
        ContractError: the negatives name a query or a document that the data does not have.
    """
    data = Dataset.open(data_path)
    mined = _mined(data, negatives_path) if negatives_path is not None else {}
    used = {name for query in data.queries(split) for name in (*query.positives, *query.negatives)}
    used |= {name for found, relabelled in mined.values() for name in (*relabelled, *(name for name, _ in found))}
    texts = {name: document.content for name, document in data.documents().named(used).items()}
    examples = []
    for query in data.queries(split):
        found, relabelled = mined.get(query.id, ((), ()))
        positives = sorted(query.positives, key=lambda doc: -query.positives[doc])
        positives += [doc for doc in relabelled if doc not in query.positives]
        scores: dict[str, float | None] = dict.fromkeys(doc for doc in query.negatives if doc not in relabelled)
        for doc, score in found:
            if doc not in positives and scores.get(doc) is None:
                scores[doc] = score
        known = [score for score in scores.values() if score is not None]
        examples.append(
            Example(
                query_id=query.id,
                query=query.text,
                positive_ids=tuple(positives),
                positives=tuple(texts[doc] for doc in positives),
                negative_ids=tuple(scores),
                negatives=tuple(texts[doc] for doc in scores),
                scores=tuple(known) if known and len(known) == len(scores) else None,
                instruction=query.instruction,
                dataset=query.dataset or data.name,
            )
        )
    return examples


def read_texts(data_path: Path) -> list[Example]:
    """The documents that training may see, each the query and the positive of itself; one of those that read the same."""
    data = Dataset.open(data_path)
    found: dict[str, Document] = {}
    for document in data.training_documents():
        found.setdefault(normalise(document.content), document)
    return [Example(doc.id, doc.content, (doc.id,), (doc.content,), dataset=doc.dataset or data.name) for doc in found.values()]


def _mined(data: Dataset, path: Path) -> dict[str, tuple[list[tuple[str, float]], list[str]]]:
    """Query -> its negatives with their scores, and what was relabelled a positive."""
    import pyarrow.parquet as pq

    queries = {query.id for split in SPLITS for query in data.queries(split)}
    documents = {name for (name,) in data.documents().walk("id")}
    mined: dict[str, tuple[list[tuple[str, float]], list[str]]] = {}
    for row in pq.read_table(path / "negatives.parquet").to_pylist():
        relabelled = row.get("relabelled") or []
        unknown = {row["query_id"]} - queries or {*row["doc_ids"], *relabelled} - documents
        if unknown:
            raise ContractError(f"{path}: the mined negatives name '{min(unknown)}', which the data {data.path} does not have")
        mined[row["query_id"]] = (list(zip(row["doc_ids"], row["scores"], strict=True)), relabelled)
    return mined
