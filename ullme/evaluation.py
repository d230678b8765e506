"""The evaluate stage: one system, measured by mteb on every task, with per-query scores and intervals.

    report.json         see `evaluate`
    per_query.parquet   task, query_id, metric, judged (digest of the query's text and judgements), exact, index and hybrid (null
                        where nothing was searched so)
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from ullme.artifacts import Draft, Inputs, Stage, Store
from ullme.components import Component, Section, component, did_you_mean, resolve
from ullme.errors import ArtifactError, ContractError
from ullme.lexical import LexicalConfig
from ullme.statistics import Comparison, bootstrap_interval, paired_randomisation
from ullme.systems import LexicalSystem, OpenIndex, System, VectorSystem
from ullme.words import WORDS, words_space

__all__ = ["EVALUATE", "EvalConfig", "Evaluation", "Measured", "Task", "compare", "compare_standing", "evaluate"]

logger = logging.getLogger(__name__)

METRICS = ("ndcg", "mrr", "recall", "map", "precision", "hit_rate")
THROUGH = ("exact", "index", "hybrid")
"""The ways that a search is measured: every vector compared, as the index finds them, and together with BM25."""
LEVEL = 0.95
SCORE_BYTES, REPORT_BYTES = 24, 6_000  # one query's score by one metric; what a task adds to the report


@dataclass(frozen=True)
class Measured:
    """What a task found. Keys of the outer mappings are `exact` and, where there are such, `index` and `hybrid`.

    scores: metric -> value, as mteb reports it. per_query: metric -> Float64[Q], rows in the order of `query_ids`.
    judgements: digest of each query's text and judgements, in that order: what makes it the same query another day.
    documents: size of the corpus. digests: `corpus` and `queries` (texts with their judgements): equal means comparable.
    controls: what the same metric is under chance.
    """

    query_ids: Sequence[str]
    documents: int
    digests: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    per_query: Mapping[str, Mapping[str, np.ndarray]]
    judgements: Sequence[str]
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

    @property
    def ranks_documents(self) -> bool:
        """Whether its scores are the section's metrics; others measure the language model."""
        return False

    def resolved(self) -> Task:
        """A copy that also names the contents of the files it reads, so that the artifact's key follows them."""
        return self

    def queries_in(self, counts: Mapping[str, int]) -> int | None:  # noqa: ARG002 - for kinds to override
        """How many queries it asks at most of a data artifact with these counts; None where that cannot be told."""
        return None

    @abstractmethod
    def run(self, evaluation: Evaluation) -> Measured | None:
        """Measure the system; None where it has no such score (BM25 writes nothing)."""


class EvalRuntime(Section):
    """Speed and memory; none of it changes the scores beyond rounding."""

    batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens of queries per forward pass."""


class EvalConfig(Section):
    """What is measured.

    metrics: as mteb names them, `<ndcg|mrr|recall|map|precision|hit_rate>_at_<k>`; the first is the one that plots and
    tables lead with. top_k: documents fetched per query. bootstrap_samples: for the 95% intervals.
    controls: also score against the judgements of other queries, drawn by seed: a sound measurement falls to chance.
    lexical: settings of the BM25 baseline. hybrid: measure a model's ranking fused with that of BM25, too, as `ullme search
    --hybrid` does; through the index where there is one.
    """

    tasks: tuple[Annotated[Task, component("ullme.tasks")], ...] = Field(default_factory=lambda: _default_tasks(), min_length=1)
    metrics: tuple[str, ...] = Field(
        default=("ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100", "map_at_100"), min_length=1
    )
    top_k: int = Field(default=100, ge=1)
    bootstrap_samples: int = Field(default=2000, ge=100)
    controls: bool = True
    lexical: LexicalConfig = LexicalConfig()
    hybrid: bool = False
    runtime: EvalRuntime = EvalRuntime()

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            name, _, cut = metric.rpartition("_at_")
            if name not in METRICS or not cut.isdigit() or int(cut) < 1:
                known = [f"{known}_at_{cut if cut.isdigit() else 10}" for known in METRICS]
                allowed = ", ".join(f"{known}_at_<k>" for known in METRICS)
                raise ValueError(f"unknown metric '{metric}'; allowed: {allowed}{did_you_mean(metric, known)}")
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


def evaluate(section: EvalConfig, inputs: Inputs, draft: Draft, *, open_index: OpenIndex | None = None) -> None:
    """Stage: `data` (and `model` with `embeddings`, and `index`) -> report.

    report.json: system, fingerprint, inputs (digests), scores {task: {metric: value}}, intervals {task: {metric:
    [low, high]}}, index_scores and index_intervals (the same through the index, or null), hybrid_scores and hybrid_intervals (the
    same together with BM25, or null), queries {task: n},
    documents {task: n}, digests {task: {corpus, queries}}, controls {task: {name: value}}, settings.

    Raises:
        ContractError: model without embeddings, vectors of another model, or vectors of another corpus.
    """
    if ("model" in inputs) != ("embeddings" in inputs) or ("index" in inputs and "model" not in inputs):
        raise ContractError(
            "evaluate: expected data alone (BM25), or data, model and embeddings, and perhaps index; "
            f"got {', '.join(sorted(inputs.refs))}"
        )
    store = Store(draft.scratch / "store", reserve_bytes=inputs.store.disk.reserve)
    system: System = (
        VectorSystem(inputs, store, open_index, section.runtime.batch_tokens, lexical=section.lexical if section.hybrid else None)
        if "model" in inputs
        else LexicalSystem(inputs, store, section.lexical)
    )
    evaluation = Evaluation(system, inputs["data"], store, section, draft.seed)
    measured, seconds = {}, {}
    for task in section.tasks:
        started = time.monotonic()
        found = task.run(evaluation)
        if found is None:
            continue
        measured[task.label] = found
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
        **{
            f"{through}_{what}": (of or None)
            for through in ("index", "hybrid")
            for what, of in (
                ("scores", _scores(measured, through)),
                ("intervals", _intervals(measured, through, section.bootstrap_samples, draft.seed)),
            )
        },
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
        "hybrid_scores": report["hybrid_scores"],
    }


def evaluation_space(section: EvalConfig, inputs: Inputs) -> int | None:
    """Bytes of the report, by the number of queries, and of the corpus' words where the store has none and BM25 is measured.

    A corpus that a task encodes for itself is weighed when that begins.
    """
    asked = [task.queries_in(inputs.ref("data").meta) for task in section.tasks]
    if None in asked:
        return None
    rows = sum(count for count in asked if count is not None) * len(section.metrics)
    written = SCORE_BYTES * rows + REPORT_BYTES * len(asked)
    if "model" in inputs and not section.hybrid:
        return written
    there = inputs.store.find(WORDS, section.lexical, {"data": inputs.ref("data")}, seed=0)
    return written if there else written + words_space(section.lexical, inputs)


EVALUATE = Stage("evaluate", "report", 3, evaluate, evaluation_space)
"""Without an index; with one: `dataclasses.replace(EVALUATE, run=partial(evaluate, open_index=...))`."""


def compare(
    a: Path, b: Path, metric: str = "ndcg_at_10", *, task: str | None = None, through: str = "exact", seed: int = 0
) -> Comparison:
    """How much better report artifact `a` is than `b`, by per-query scores.

    task: may be left out when the reports hold one. through: `exact`, `index` or `hybrid`.

    Raises:
        ContractError: not the same task, queries and corpus, or scores that one of them does not have.
        ArtifactError: not a report.
    """
    reports = [_read_report(path) for path in (a, b)]
    name = _common_task(reports, task)
    for part in ("queries", "corpus"):
        first, second = (report["digests"][name][part] for report in reports)
        if first != second:
            raise ContractError(
                f"compare: task '{name}' was measured on different {part} ({first[:12]} and {second[:12]}); "
                "evaluate both on the same data"
            )
    first, second = (_read_per_query(path, name, metric, through) for path in (a, b))
    if first.keys() != second.keys():
        raise ContractError(f"compare: task '{name}' has scores of different queries in the two reports; evaluate both again")
    return _paired(first, second, sorted(first), seed)


def compare_standing(
    a: Path, b: Path, metric: str = "ndcg_at_10", *, task: str | None = None, through: str = "index", seed: int = 0
) -> Comparison:
    """The same as `compare` on the standing queries: those that both reports have, with the same text and judgements.

    The corpora may differ: that is what is compared.

    Raises:
        ContractError: no task or no standing query in common, or scores that one of them does not have.
        ArtifactError: not a report.
    """
    name = _common_task([_read_report(path) for path in (a, b)], task)
    first, second = (_read_per_query(path, name, metric, through) for path in (a, b))
    judged = [_read_judgements(path, name) for path in (a, b)]
    standing = sorted(query for query in first.keys() & second.keys() if judged[0][query] == judged[1][query])
    if not standing:
        raise ContractError(f"compare: task '{name}' has no query that both measurements share with the same judgements")
    return _paired(first, second, standing, seed)


def _common_task(reports: Sequence[Mapping[str, Any]], task: str | None) -> str:
    shared = [name for name in reports[0]["scores"] if name in reports[1]["scores"]]
    named = [task] if task is not None else shared
    if len(named) != 1 or named[0] not in shared:
        both = ", ".join(shared) or "none"
        raise ContractError(
            f"compare: expected one task that both reports have (they share: {both}), got {', '.join(named) or 'none'}"
        )
    return named[0]


def _paired(first: Mapping[str, float], second: Mapping[str, float], order: Sequence[str], seed: int) -> Comparison:
    return paired_randomisation([first[query] for query in order], [second[query] for query in order], seed=seed, level=LEVEL)


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

    names = ("task", "query_id", "metric", "judged")
    schema = pa.schema([*((name, pa.string()) for name in names), *((through, pa.float64()) for through in THROUGH)])
    rows = []
    for label, result in measured.items():
        for metric, values in result.per_query["exact"].items():
            nothing = {metric: np.full(len(values), None)}
            scores = [result.per_query.get(through, nothing)[metric].tolist() for through in THROUGH]
            rows += [
                dict(zip(schema.names, (label, query, metric, judged, *each), strict=True))
                for query, judged, *each in zip(result.query_ids, result.judgements, *scores, strict=True)
            ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def _read_report(path: Path) -> dict[str, Any]:
    file = Path(path) / "report.json"
    if not file.is_file():
        raise ArtifactError(f"{path}: expected a report artifact, but there is no report.json; evaluate again")
    return json.loads(file.read_text(encoding="utf-8"))


def _read_per_query(path: Path, task: str, metric: str, through: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    if through not in THROUGH:
        raise ContractError(f"compare: through must be {', '.join(THROUGH[:-1])} or {THROUGH[-1]}, got '{through}'")
    table = pq.read_table(Path(path) / "per_query.parquet", filters=[("task", "=", task), ("metric", "=", metric)])
    if not table.num_rows:
        raise ContractError(f"compare: {path} has no '{metric}' scores of task '{task}'; add the metric to evaluation.metrics")
    values = table.column(through).to_pylist()
    if None in values:
        raise ContractError(f"compare: {path} was not measured so ({through}) on task '{task}'; compare through exact")
    return dict(zip(table.column("query_id").to_pylist(), values, strict=True))


def _read_judgements(path: Path, task: str) -> dict[str, str]:
    import pyarrow.parquet as pq

    table = pq.read_table(Path(path) / "per_query.parquet", filters=[("task", "=", task)])
    if "judged" not in table.column_names:
        raise ContractError(f"compare: {path} was written by an older version, which did not keep the judgements; evaluate again")
    return dict(zip(table.column("query_id").to_pylist(), table.column("judged").to_pylist(), strict=True))
