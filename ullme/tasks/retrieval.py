"""Retrieval: find the documents that answer each query, in the run's own corpus or in a BEIR folder."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from ullme.artifacts import digest_of
from ullme.data import PREPARE, DataConfig, Dataset, Query
from ullme.documents import Documents
from ullme.errors import ContractError, DataError
from ullme.evaluation import Evaluation, Measured, Task
from ullme.neighbours import MISSING_ROW
from ullme.records import Split
from ullme.systems import QuerySearcher

if TYPE_CHECKING:
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.models.model_meta import ModelMeta

__all__ = ["RetrievalTask"]

logger = logging.getLogger(__name__)

TREC_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
Run = dict[str, dict[str, float]]
"""query id -> document id -> score."""


class RetrievalTask(Task):
    """Queries of one split against the searchable documents.

    path: a folder in BEIR's layout in place of the run's own data; its corpus is encoded for the occasion and searched
    exactly. qrels: the file of its qrels/ to use, by default the one called like the split. on_bad_record: published
    collections hold empty documents, so by default these are left out, with a warning.
    source_digest: fingerprint of that folder's contents, filled in by `resolved()`.
    """

    path: Path | None = None
    split: Split = "test"
    qrels: str = ""
    on_bad_record: Literal["fail", "skip"] = "skip"
    source_digest: str = ""

    @model_validator(mode="after")
    def _qrels_need_a_folder(self) -> RetrievalTask:
        if self.qrels and self.path is None:
            raise ValueError("qrels names a file of the folder `path`, and there is no path; set path, or leave qrels out")
        return self

    @property
    def label(self) -> str:
        """`name`, else the folder's name (or `retrieval`), with the split unless it is test."""
        own = self.path.name if self.path else self.kind
        return self.name or (own if self.split == "test" else f"{own}-{self.split}")

    @property
    def ranks_documents(self) -> bool:
        """Yes."""
        return True

    def resolved(self) -> RetrievalTask:
        """A copy that names the contents of the folder."""
        return self if self.path is None else self.model_copy(update={"source_digest": self._other().source_digest})

    def _other(self) -> DataConfig:
        source = {"kind": "beir", "path": str(self.path), "splits": {self.split: self.qrels or self.split}}
        fields = {"source": source, "on_bad_record": self.on_bad_record, "source_digest": self.source_digest}
        return DataConfig.model_validate(fields).resolved()

    def queries_in(self, counts: Mapping[str, int]) -> int | None:
        """The queries of the split; nobody has counted those of another folder."""
        return None if self.path else counts[f"queries_{self.split}"]

    def run(self, evaluation: Evaluation) -> Measured:
        """Search, and let mteb score what was found.

        Raises:
            DataError: no query of the split has an answer in the corpus. ContractError: vectors of another corpus.
        """
        other = None if self.path is None else evaluation.store.produce(PREPARE, self._other(), {}, seed=0)
        data = Dataset.open(evaluation.data if other is None else evaluation.store.open(other, "data"))
        corpus = data.corpus()
        queries, qrels = _judged(data.queries(self.split), corpus, self.label)
        section = evaluation.section
        meta = _model_meta(evaluation)
        scores: dict[str, dict[str, float]] = {}
        per_query: dict[str, dict[str, np.ndarray]] = {}
        runs: dict[str, Run] = {}
        for through, searcher in evaluation.system.searchers(other).items():
            if len(searcher.ids) != len(corpus) or set(searcher.ids) != set(corpus.ids()):
                raise ContractError(
                    f"evaluate {self.label}: expected the {len(corpus)} searchable documents of the data ({through}), got "
                    f"{len(searcher.ids)} others; encode and index this data first"
                )
            runs[through] = _search(searcher, queries, section.top_k)
            task = _mteb_task(self.label, corpus, queries, qrels, cuts=section.cuts, main_score=section.metrics[0])
            scores[through], details = _score(task, runs[through], meta)
            scores[through] = {metric: round(scores[through][metric], 5) for metric in section.metrics}
            per_query[through] = {
                metric: np.array([_value(metric, query.id, details, runs[through], qrels) for query in queries])
                for metric in section.metrics
            }
        controls = {}
        if section.controls:
            metric = section.metrics[0]
            shuffled = _shuffled(queries, qrels, evaluation.seed)
            task = _mteb_task(self.label, corpus, queries, shuffled, cuts=section.cuts, main_score=metric)
            controls[f"{metric}_shuffled_qrels"] = _score(task, runs["exact"], meta)[0][metric]
        return Measured(
            query_ids=[query.id for query in queries],
            documents=len(corpus),
            digests={
                "corpus": digest_of(sorted((document.id, document.content) for document in corpus)),
                "queries": digest_of(sorted((query.id, query.text, sorted(qrels[query.id].items())) for query in queries)),
            },
            scores=scores,
            per_query=per_query,
            judgements=[digest_of([query.text, sorted(qrels[query.id].items())])[:16] for query in queries],
            controls=controls,
        )


def _judged(queries: Sequence[Query], corpus: Documents, label: str) -> tuple[list[Query], dict[str, dict[str, int]]]:
    """The queries that have an answer in the corpus, and their judgements there."""
    ids = set(corpus.ids())
    qrels = {query.id: {doc: grade for doc, grade in query.positives.items() if doc in ids} for query in queries}
    kept = [query for query in queries if qrels[query.id]]
    if not kept:
        raise DataError(f"evaluate {label}: no query of this split has an answer among the {len(corpus)} searchable documents")
    if len(kept) < len(queries):
        logger.warning(
            "evaluate %s: %d of %d queries have no answer in the corpus and are left out",
            label,
            len(queries) - len(kept),
            len(queries),
        )
    return kept, {query.id: qrels[query.id] for query in kept}


def _search(searcher: QuerySearcher, queries: Sequence[Query], top_k: int) -> Run:
    ids = [str(name) for name in searcher.ids]
    found = searcher.search(queries, min(top_k, len(ids)))
    return {
        query.id: {ids[row]: float(score) for row, score in zip(rows, scores, strict=True) if row != MISSING_ROW}
        for query, rows, scores in zip(queries, found.rows, found.scores, strict=True)
    }


def _shuffled(queries: Sequence[Query], qrels: Mapping[str, dict[str, int]], seed: int) -> dict[str, dict[str, int]]:
    """Every query gets the judgements of another one: a random cycle."""
    order = np.random.default_rng([seed, zlib.crc32(b"shuffled qrels")]).permutation(len(queries))
    return {queries[here].id: qrels[queries[there].id] for here, there in zip(order, np.roll(order, 1), strict=True)}


def _value(
    metric: str, query: str, details: Mapping[str, Mapping[str, float]], run: Run, qrels: Mapping[str, Mapping[str, int]]
) -> float:
    """One query's score. mteb averages reciprocal ranks without keeping them, so these are computed here, by its rule for ties."""
    name, _, cut = metric.rpartition("_at_")
    if name != "mrr":
        return details[query][f"{TREC_NAMES[name]}_{cut}"]
    ranked = sorted(run[query], key=lambda doc: (run[query][doc], doc), reverse=True)[: int(cut)]
    return next((1 / rank for rank, doc in enumerate(ranked, start=1) if qrels[query].get(doc, 0) > 0), 0.0)


# The seam to mteb


class FinishedSearch:
    """mteb's SearchProtocol over results that are there already: nothing is encoded or searched again."""

    def __init__(self, run: Run, meta: ModelMeta) -> None:
        self._run, self._meta = run, meta

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and revision."""
        return self._meta

    def index(self, corpus: Any, **_: Any) -> None:
        """The corpus was indexed before."""

    def search(self, queries: Any, **_: Any) -> Run:
        """The results of exactly these queries; one that found nothing has an empty result, not none."""
        return {query: dict(self._run[query]) for query in queries["id"]}


def _model_meta(evaluation: Evaluation) -> ModelMeta:
    """The revision is the system's fingerprint: mteb identifies results by name and revision."""
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    name, revision = f"ullme/{evaluation.system.name}", evaluation.system.fingerprint
    return ModelMeta.create_empty(overwrites={"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE})


def _mteb_task(
    name: str,
    corpus: Documents,
    queries: Sequence[Query],
    qrels: dict[str, dict[str, int]],
    *,
    cuts: Sequence[int],
    main_score: str,
) -> AbsTaskRetrieval:
    """An mteb retrieval task that is in memory already; it keeps the per-query scores that mteb averages."""
    from datasets import Dataset as Table
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="Local retrieval task.",
            dataset={"path": "local", "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=main_score,
        )
        k_values = tuple(sorted({1, *cuts}))  # mteb always reads Recall@1

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002 - mteb's signature
            if self.data_loaded:
                return
            texts = {"id": [document.id for document in corpus], "text": [document.content for document in corpus]}
            asked = {"id": [query.id for query in queries], "text": [query.text for query in queries]}
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Table.from_dict(texts),
                        "queries": Table.from_dict(asked),
                        "relevant_docs": qrels,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

        def task_specific_scores(self, scores: dict[str, dict[str, float]], *_: Any, **__: Any) -> dict[str, float]:
            self.per_query = scores
            return {}

    return LocalRetrieval()


def _score(task: Any, run: Run, meta: ModelMeta) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(mteb's aggregate scores, its per-query scores). No cache: the store is the one truth about what was measured."""
    import mteb

    logging.getLogger("mteb").setLevel(logging.WARNING)
    results = mteb.evaluate(
        FinishedSearch(run, meta),  # type: ignore[arg-type]
        task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 1},
    )
    scores: Any = results.task_results[0].scores["test"][0]
    return dict(scores), task.per_query
