"""The evaluate stage: one system, measured by mteb on every task, with per-query scores and intervals.

    report.json         see `evaluate`
    per_query.parquet   task, query_id, metric, exact, index (null where nothing was searched through an index)
    logs/times.json     seconds per task

The inputs decide the system: `data` alone is BM25; with `model` and `embeddings` it is exact search of that model's
vectors; with `index` the same queries also go through the index, side by side. Vectors of the corpus are the stored
ones: only queries are encoded.
"""

from __future__ import annotations

import json
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store, digest_of
from ullme.components import Component, Section, component, did_you_mean, resolve
from ullme.data import Dataset
from ullme.encoding import ENCODE, EncodeConfig, open_embeddings
from ullme.errors import ArtifactError, ContractError
from ullme.lexical import BM25Searcher, LexicalConfig
from ullme.neighbours import ExactSearcher, Neighbours, Searcher
from ullme.statistics import Comparison, bootstrap_interval, paired_randomisation

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["EVALUATE", "EvalConfig", "Evaluation", "Measured", "OpenIndex", "System", "Task", "TextSearcher", "compare", "evaluate"]

logger = logging.getLogger(__name__)

OpenIndex = Callable[[Path, str], Searcher]
"""(index artifact, fingerprint of the model that will query it) -> its searcher."""

METRICS = ("ndcg", "mrr", "recall", "map", "precision", "hit_rate")
LEVEL = 0.95


class TextSearcher(Protocol):
    """Finds documents for query texts."""

    @property
    def ids(self) -> Sequence[str]:
        """Document ids; `Neighbours.rows` are positions in it."""
        ...

    def search(self, texts: Sequence[str], k: int) -> Neighbours:
        """The k best documents of each text."""
        ...


class System(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """`bm25` or `model`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the answers may."""
        ...

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
        """`exact`, and `index` where there is one, over the run's own corpus or over `other`, a data artifact."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a task found. Keys of the outer mappings are `exact` and, where there is one, `index`.

    scores: metric -> value, as mteb reports it. per_query: metric -> Float64[Q], rows in the order of `query_ids`.
    documents: size of the corpus. digests: `corpus` and `queries` (texts with their judgements): equal means comparable.
    controls: what the same metric is under chance.
    """

    query_ids: Sequence[str]
    documents: int
    digests: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    per_query: Mapping[str, Mapping[str, np.ndarray]]
    controls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What a task is given: the system, the run's data artifact, a store for what the task itself prepares, the section."""

    system: System
    data: Path
    store: Store
    section: EvalConfig
    seed: int


class Task(Component):
    """Base of every kind of evaluation task. `name` is its key in the report."""

    name: str = ""

    @property
    def label(self) -> str:
        """The key in the report: `name`, or what the kind makes of its fields."""
        return self.name or self.kind

    def resolved(self) -> Task:
        """A copy that also names the contents of the files it reads, so that the artifact's key follows them."""
        return self

    @abstractmethod
    def run(self, evaluation: Evaluation) -> Measured:
        """Measure the system."""


class EvalConfig(Section):
    """What is measured.

    metrics: as mteb names them, `<ndcg|mrr|recall|map|precision|hit_rate>_at_<k>`; the first is the one that plots and
    tables lead with. top_k: documents fetched per query. bootstrap_samples: for the 95% intervals.
    controls: also score against the judgements of other queries, drawn by seed: a sound measurement falls to chance.
    lexical: settings of the BM25 baseline.
    """

    tasks: tuple[Annotated[Task, component("ullme.tasks")], ...] = Field(default_factory=lambda: _default_tasks(), min_length=1)
    metrics: tuple[str, ...] = Field(
        default=("ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100", "map_at_100"), min_length=1
    )
    top_k: int = Field(default=100, ge=1)
    bootstrap_samples: int = Field(default=2000, ge=100)
    controls: bool = True
    lexical: LexicalConfig = LexicalConfig()

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            name, _, cut = metric.rpartition("_at_")
            if name not in METRICS or not cut.isdigit() or int(cut) < 1:
                known = [f"{known}_at_{cut if cut.isdigit() else 10}" for known in METRICS]
                raise ValueError(
                    f"unknown metric '{metric}'; allowed: {', '.join(f'{name}_at_<k>' for name in METRICS)}{did_you_mean(metric, known)}"
                )
        return tuple(dict.fromkeys(metrics))

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        deepest = max(self.cuts)
        if deepest > self.top_k:
            raise ValueError(f"metrics look at {deepest} documents, top_k fetches only {self.top_k}; raise top_k")
        labels = [task.label for task in self.tasks]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two tasks are called '{max(labels, key=labels.count)}'; give each its own name")
        return self

    @property
    def cuts(self) -> list[int]:
        """Ranks at which the metrics cut, ascending."""
        return sorted({int(metric.rpartition("_at_")[2]) for metric in self.metrics})

    def resolved(self) -> EvalConfig:
        """A copy whose tasks name the contents of the files they read; do this before the artifact's key is made."""
        return self.model_copy(update={"tasks": tuple(task.resolved() for task in self.tasks)})


def _default_tasks() -> Any:
    return (resolve("ullme.tasks", "retrieval"),)


@dataclass(frozen=True)
class LexicalSystem:
    """BM25 over the corpus."""

    inputs: Inputs
    store: Store
    config: LexicalConfig
    name: str = "bm25"

    @property
    def fingerprint(self) -> str:
        """Digest of the settings: the method itself has no weights."""
        return digest_of(["bm25", version("bm25s"), self.config.identity()])

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
        """`exact` only."""
        corpus = Dataset.open(self.inputs["data"] if other is None else self.store.open(other, "data")).corpus()
        return {"exact": BM25Searcher([doc.content for doc in corpus], [doc.id for doc in corpus], self.config)}


class EncodedSearcher:
    """Query texts through an encoder, its vectors through a searcher. A text is encoded once."""

    def __init__(self, encoder: Encoder, searcher: Searcher, known: dict[str, np.ndarray]) -> None:
        self._encoder, self._searcher, self._known = encoder, searcher, known

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._searcher.ids

    def search(self, texts: Sequence[str], k: int) -> Neighbours:
        """The k best documents of each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encoder.encode(new, prompt="query"), strict=True))
        return self._searcher.search(np.stack([self._known[text] for text in texts]), k)


@dataclass(frozen=True)
class VectorSystem:
    """A model over its stored vectors, exactly and through the index where one is given."""

    inputs: Inputs
    store: Store
    open_index: OpenIndex | None
    name: str = "model"
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of the model artifact."""
        return self.inputs.ref("model").digest

    @cached_property
    def encoder(self) -> Encoder:
        """The model."""
        from ullme.encoder import Encoder

        return Encoder.load(self.inputs["model"])

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
        """Over the stored vectors; another corpus is encoded first (in shards that a crash does not lose)."""
        if other is None:
            path = self.inputs["embeddings"]
        else:
            refs = {"data": other, "model": self.inputs.ref("model")}
            path = self.store.open(self.store.produce(ENCODE, EncodeConfig(), refs, seed=0), "embeddings")
        stored = open_embeddings(path)
        if stored.fingerprint != self.fingerprint:
            raise ContractError(
                f"evaluate: the embeddings were made by model {stored.fingerprint[:12]}, the model given is {self.fingerprint[:12]}; "
                "encode the corpus with it first"
            )
        vectors = np.concatenate([block for _, block in stored.shards()])
        found = {"exact": EncodedSearcher(self.encoder, ExactSearcher(vectors, stored.ids), self._known)}
        if other is None and "index" in self.inputs:
            if self.open_index is None:
                raise ContractError("evaluate: an index was given, but nothing to open it with (open_index)")
            found["index"] = EncodedSearcher(self.encoder, self.open_index(self.inputs["index"], self.fingerprint), self._known)
        return found


def evaluate(section: EvalConfig, inputs: Inputs, draft: Draft, *, open_index: OpenIndex | None = None) -> None:
    """Stage: `data` (and `model` with `embeddings`, and `index`) -> report.

    report.json: system, fingerprint, inputs (digests), scores {task: {metric: value}}, intervals {task: {metric:
    [low, high]}}, index_scores and index_intervals (the same through the index, or null), queries {task: n},
    documents {task: n}, digests {task: {corpus, queries}}, controls {task: {name: value}}, settings.

    Raises:
        ContractError: model without embeddings, vectors of another model, or vectors of another corpus.
    """
    if ("model" in inputs) != ("embeddings" in inputs) or ("index" in inputs and "model" not in inputs):
        raise ContractError(
            f"evaluate: expected data alone (BM25), or data, model and embeddings, and perhaps index; got {', '.join(sorted(inputs.refs))}"
        )
    store = Store(draft.scratch / "store")
    system: System = VectorSystem(inputs, store, open_index) if "model" in inputs else LexicalSystem(inputs, store, section.lexical)
    evaluation = Evaluation(system, inputs["data"], store, section, draft.seed)
    measured, seconds = {}, {}
    for task in section.tasks:
        started = time.monotonic()
        measured[task.label] = task.run(evaluation)
        seconds[task.label] = round(time.monotonic() - started, 3)
        shown = "; ".join(
            f"{through} " + ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
            for through, scores in measured[task.label].scores.items()
        )
        logger.info("evaluate %s on %s (%d queries): %s", system.name, task.label, len(measured[task.label].query_ids), shown)
    report = {
        "system": system.name,
        "fingerprint": system.fingerprint,
        "inputs": {name: ref.digest for name, ref in inputs.refs.items()},
        "scores": _scores(measured, "exact"),
        "intervals": _intervals(measured, "exact", section.bootstrap_samples, draft.seed),
        "index_scores": _scores(measured, "index") or None,
        "index_intervals": _intervals(measured, "index", section.bootstrap_samples, draft.seed) or None,
        "queries": {label: len(result.query_ids) for label, result in measured.items()},
        "documents": {label: result.documents for label, result in measured.items()},
        "digests": {label: dict(result.digests) for label, result in measured.items()},
        "controls": {label: dict(result.controls) for label, result in measured.items() if result.controls},
        "settings": {**section.identity(), "seed": draft.seed, "mteb": version("mteb")},
    }
    (draft.path / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    _write_per_query(draft.path / "per_query.parquet", measured)
    (draft.path / "logs").mkdir(exist_ok=True)
    (draft.path / "logs" / "times.json").write_text(json.dumps(seconds), encoding="utf-8")
    draft.meta |= {
        "system": system.name,
        "queries": report["queries"],
        "scores": report["scores"],
        "index_scores": report["index_scores"],
    }


EVALUATE = Stage("evaluate", "report", 1, evaluate)
"""Without an index; with one: `dataclasses.replace(EVALUATE, run=partial(evaluate, open_index=...))`."""


def compare(
    a: Path, b: Path, metric: str = "ndcg_at_10", *, task: str | None = None, through: str = "exact", seed: int = 0
) -> Comparison:
    """How much better report artifact `a` is than `b`, by per-query scores.

    task: may be left out when the reports hold one. through: `exact` or `index`.

    Raises:
        ContractError: not the same task, queries and corpus, or scores that one of them does not have.
        ArtifactError: not a report.
    """
    reports = [_read_report(path) for path in (a, b)]
    shared = [name for name in reports[0]["scores"] if name in reports[1]["scores"]]
    if task is None:
        if len(shared) != 1:
            raise ContractError(f"compare: the reports share {len(shared)} tasks ({', '.join(shared) or 'none'}); name one of them")
        task = shared[0]
    if task not in shared:
        raise ContractError(f"compare: task '{task}' is not in both reports; both have: {', '.join(shared) or 'none'}")
    for part in ("queries", "corpus"):
        first, second = (report["digests"][task][part] for report in reports)
        if first != second:
            raise ContractError(
                f"compare: task '{task}' was measured on different {part} ({first[:12]} and {second[:12]}); evaluate both on the same data"
            )
    columns = [_read_per_query(path, task, metric, through) for path in (a, b)]
    if columns[0].keys() != columns[1].keys():
        raise ContractError(f"compare: task '{task}' has scores of different queries in the two reports; evaluate both again")
    order = sorted(columns[0])
    return paired_randomisation([columns[0][name] for name in order], [columns[1][name] for name in order], seed=seed, level=LEVEL)


def _scores(measured: Mapping[str, Measured], through: str) -> dict[str, dict[str, float]]:
    return {label: dict(result.scores[through]) for label, result in measured.items() if through in result.scores}


def _intervals(measured: Mapping[str, Measured], through: str, samples: int, seed: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for label, result in measured.items():
        for metric, values in result.per_query.get(through, {}).items():
            interval = bootstrap_interval(values, samples=samples, seed=seed, level=LEVEL)
            found.setdefault(label, {})[metric] = [round(interval.low, 5), round(interval.high, 5)]
    return found


def _write_per_query(path: Path, measured: Mapping[str, Measured]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("task", "query_id", "metric")
    schema = pa.schema([*((name, pa.string()) for name in names), ("exact", pa.float64()), ("index", pa.float64())])
    rows = []
    for label, result in measured.items():
        for metric, values in result.per_query["exact"].items():
            index = result.per_query["index"][metric].tolist() if "index" in result.per_query else [None] * len(values)
            rows += [
                dict(zip(schema.names, (label, query, metric, exact, through), strict=True))
                for query, exact, through in zip(result.query_ids, values.tolist(), index, strict=True)
            ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def _read_report(path: Path) -> dict[str, Any]:
    file = Path(path) / "report.json"
    if not file.is_file():
        raise ArtifactError(f"{path}: expected a report artifact, but there is no report.json; evaluate again")
    return json.loads(file.read_text(encoding="utf-8"))


def _read_per_query(path: Path, task: str, metric: str, through: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    if through not in ("exact", "index"):
        raise ContractError(f"compare: through must be exact or index, got '{through}'")
    table = pq.read_table(Path(path) / "per_query.parquet", filters=[("task", "=", task), ("metric", "=", metric)])
    if not table.num_rows:
        raise ContractError(f"compare: {path} has no '{metric}' scores of task '{task}'; add the metric to evaluation.metrics")
    values = table.column(through).to_pylist()
    if None in values:
        raise ContractError(f"compare: {path} was not measured through an index on task '{task}'; compare through exact")
    return dict(zip(table.column("query_id").to_pylist(), values, strict=True))
