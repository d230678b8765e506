"""The mine stage: hard negatives for every train query, and how far their teacher can be trusted.

    negatives.parquet   query_id, doc_ids: list<string>, scores: list<float32>; what the source gave first, then best first;
                        relabelled: list<string>, what the judge took for further positives
    report.json         counts, what was excluded, shortfalls, the teacher's nDCG@10, a histogram, 20 rows to look at
    report.html         the same as a page

Candidates are the documents of train queries and those that no query has judged; an auxiliary data set's queries have those
of their own data set. What a dev or test query is answered by is never a negative (`pool: train_only`): a model must not be
measured on passages it was pushed away from. How a kind of miner chooses is in `ullme.miner`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ullme.artifacts import Draft, Inputs, Stage
from ullme.components import Section, component, resolve
from ullme.data import Dataset, Query
from ullme.documents import DOCUMENTS_FILE, Documents
from ullme.errors import ConfigError, DataError
from ullme.judging import JudgeConfig, judge, merged
from ullme.lexical import LexicalConfig, words_bytes
from ullme.miner import ABOVE_POSITIVE, BLOCK_QUERIES, Miner, Selection
from ullme.mining_context import MiningContext, encoded_vectors
from ullme.mining_page import page
from ullme.rankers import Ranker
from ullme.records import normalise

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["MINE", "MiningConfig", "mine"]

logger = logging.getLogger(__name__)

SHOWN_ROWS, SHOWN_CHARACTERS = 20, 300
ROW_BYTES, SHOWN_BYTES, REPORT_BYTES = 40, 400, 4_000  # an id with its score; a text that is shown; the rest of the report


class MiningRuntime(Section):
    """Speed and memory of miners that encode; none of it changes the vectors beyond rounding."""

    batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens per forward pass."""


class MiningConfig(Section):
    """How negatives are chosen.

    pool: `train_only` leaves out documents that answer a dev or test query and no train query; `all` keeps them.
    teacher_queries: on how many train queries, drawn by seed, the teacher's nDCG@10 is measured. judge: reads what was mined once
    more, together with its query. rounds: mine, train, and mine again with the trained model, so often; each training begins with
    the same model. first: the miner of the first round, where that is another.
    """

    miner: Annotated[Miner, component("ullme.miners")] = Field(default_factory=lambda: _default_miner())
    judge: JudgeConfig | None = None
    rounds: int = Field(default=1, ge=1)
    first: Annotated[Miner, component("ullme.miners")] | None = None
    pool: Literal["train_only", "all"] = "train_only"
    teacher_queries: int = Field(default=1000, ge=1)
    runtime: MiningRuntime = MiningRuntime()

    @model_validator(mode="after")
    def _later_rounds_differ(self) -> MiningConfig:
        if self.rounds > 1 and not self.needs_model:
            raise ValueError(
                f"rounds: {self.rounds} mines again with the trained model, and miner: {self.miner.kind} reads none; use one that "
                "does, such as {kind: perc_pos}, with first: {kind: bm25}"
            )
        if self.first is not None and self.rounds == 1:
            raise ValueError("first: there is one round alone, which miner is for; set rounds: 2 or leave first out")
        return self

    @property
    def needs_model(self) -> bool:
        """Whether the stage has to be given a model."""
        return self.miner.needs_model or (self.judge is not None and self.judge.reranker.needs_model)

    def in_round(self, number: int) -> MiningConfig:
        """What round `number`, from 1, is mined by: one round without the others."""
        miner = self.first if number == 1 and self.first is not None else self.miner
        return self.model_copy(update={"miner": miner, "rounds": 1, "first": None})


def _default_miner() -> Any:
    return resolve("ullme.miners", "bm25")


def mine(section: MiningConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: train queries of `data` (and `model`, `embeddings` for kinds that need vectors) -> negatives.

    Raises:
        DataError: no train queries. ConfigError: the miner needs a model and there is none. ContractError: the
        embeddings are of another model, or the teacher cannot be used.
    """
    data = Dataset.open(inputs["data"])
    queries = data.queries("train")
    if not queries:
        raise DataError("mine: the data set has no train query; look at the data stage's counts")
    documents = _pool(data) if section.pool == "train_only" else data.documents()
    encoder = _loaded(inputs) if "model" in inputs else None
    vectors = encoded_vectors(inputs, data.name, encoder, batch_tokens=section.runtime.batch_tokens) if encoder else None
    parts = []
    for number, name in enumerate(dict.fromkeys(query.dataset for query in queries)):
        asked = [query for query in queries if query.dataset == name]
        pool = documents.where("dataset", equals=name)
        context = MiningContext(asked, pool, draft.seed, vectors, draft.scratch / f"pool-{number}")
        parts.append(_mined(section, context, name, encoder))
    queries = [query for part in parts for query in part.context.queries]
    rows = [row for part in parts for row in part.named()]
    _write(draft, queries, rows, [names for part in parts for names in part.relabelled_names()])
    report = _report(section, data, len(documents), parts, rows, draft.seed)
    (draft.path / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    (draft.path / "report.html").write_text(page(report), encoding="utf-8")
    mined, short, judged = report["negatives"]["mined"], report["shortfall"], report["judge"]
    draft.meta |= {"queries": len(queries), "pool": len(documents), "mined": mined, "short_queries": short["queries"]}
    draft.meta |= {"suspected_false_negatives": report["suspected_false_negatives"]}
    if judged:
        draft.meta |= {f"judge_{name}": judged[name] for name in ("finds_positive", "chance", "suspects")}
    draft.meta |= {f"teacher_ndcg_at_10_{name}": teacher["ndcg_at_10"] for name, teacher in report["teachers"].items()}
    logger.info(
        "mine: %d negatives for %d queries from %d documents, %d from the source; %d score no less than a positive",
        *(mined, len(queries), len(documents), report["negatives"]["from_source"], report["suspected_false_negatives"]),
    )
    if short["queries"]:
        logger.warning(
            "mine: %d of %d queries got fewer than %d negatives (%d missing in all); they stay short",
            *(short["queries"], len(queries), short["wanted"], short["negatives"]),
        )


@dataclass(frozen=True)
class _Mined:
    """What was found for the queries of one data set, each row with its score: `given` by the source, and selected."""

    context: MiningContext
    given: list[list[tuple[int, float]]]
    selection: Selection
    dropped: Counter[str]
    teachers: dict[str, dict[str, Any]]
    dataset: str = ""
    relabelled: list[list[int]] = field(default_factory=list)
    judged: dict[str, Any] | None = None

    def relabelled_names(self) -> list[list[str]]:
        """Per query: ids of the documents that the judge took for further positives."""
        names = self.context.ids(row for rows in self.relabelled for row in rows)
        return [[names[row] for row in rows] for rows in self.relabelled] or [[] for _ in self.context.queries]

    def named(self) -> list[list[tuple[str, float]]]:
        """Per query: (document id, score), the source's own first."""
        rows = [[*own, *mined] for own, mined in zip(self.given, self.selection.chosen, strict=True)]
        names = self.context.ids(row for of in rows for row, _ in of)
        return [[(names[row], score) for row, score in of] for of in rows]


def _loaded(inputs: Inputs) -> Callable[[], Encoder]:
    """Opens the model when it is first asked for."""

    @cache
    def opened() -> Encoder:
        from ullme.encoder import Encoder

        return Encoder.load(inputs["model"])

    return opened


def _mined(section: MiningConfig, context: MiningContext, dataset: str, encoder: Callable[[], Encoder] | None) -> _Mined:
    """Mine for the queries of one data set among its documents. dataset: an auxiliary one's name; empty = the run's own.

    Raises:
        ConfigError: the judge reads with a model, and there is none.
    """
    found = _teachers(section, context, dataset)
    teachers = {f"{name}_{dataset}" if dataset else name: teacher for name, teacher in found.items()}
    given, taken, dropped = _given(context, section.miner)
    mined = _Mined(context, given, section.miner.select(context, taken), dropped, teachers, dataset)
    if section.judge is None:
        return mined
    if section.judge.reranker.needs_model and encoder is None:
        raise ConfigError(f"mining.judge: {section.judge.reranker.kind} reads with a model, and the stage was given none")
    found = judge(section.judge, context, mined.selection.chosen, encoder)
    selection = replace(mined.selection, chosen=found.chosen)
    return replace(mined, selection=selection, relabelled=found.relabelled, judged=found.found)


def _report(
    section: MiningConfig,
    data: Dataset,
    pool: int,
    parts: Sequence[_Mined],
    rows: Sequence[Sequence[tuple[str, float]]],
    seed: int,
) -> dict[str, Any]:
    """What report.json says. rows: of each query, the negatives that were written."""
    queries = [query for part in parts for query in part.context.queries]
    chosen = [mined for part in parts for mined in part.selection.chosen]
    passed_over = sum((part.selection.passed_over for part in parts), Counter[str]())
    suspected = passed_over.pop(ABOVE_POSITIVE, 0)
    missing = [section.miner.wanted - len(mined) for mined in chosen]
    scores = np.array([score for mined in chosen for _, score in mined], dtype=np.float64)
    counts, edges = np.histogram(scores, bins=20) if len(scores) else (np.zeros(0, int), np.zeros(0))
    return {
        "miner": section.miner.model_dump(mode="json", serialize_as_any=True),
        "queries": len(queries),
        "pool": {"rule": section.pool, "documents": pool, "left_out": len(data.documents()) - pool},
        "negatives": {
            "mined": len(scores),
            "from_source": sum(map(len, rows)) - len(scores),
            "source_dropped": dict(sum((part.dropped for part in parts), Counter[str]())),
        },
        "passed_over": dict(passed_over),
        "suspected_false_negatives": suspected,
        "judge": merged([part.judged for part in parts if part.judged]),
        "datasets": {
            part.dataset or data.name: {
                "queries": len(part.context.queries),
                "mined": sum(map(len, part.selection.chosen)),
                "suspected_false_negatives": part.selection.passed_over.get(ABOVE_POSITIVE, 0),
            }
            for part in parts
        },
        "shortfall": {"queries": sum(count > 0 for count in missing), "negatives": sum(missing), "wanted": section.miner.wanted},
        "teachers": {name: found for part in parts for name, found in part.teachers.items()},
        "scores": {"edges": [round(float(edge), 6) for edge in edges], "counts": [int(count) for count in counts]},
        "samples": _samples(data, queries, rows, seed),
    }


def mining_space(section: MiningConfig, inputs: Inputs) -> int | None:
    """Bytes of the pool's words while they are sorted, or of these together with negatives and report, which come later; and of
    vectors, where a model mines. None where the model's width is not known.
    """
    counts = inputs.ref("data").meta
    wanted = section.miner.wanted
    shown = SHOWN_BYTES * SHOWN_ROWS * (wanted + 2)  # the query and a positive beside them
    written = ROW_BYTES * (counts["queries_train"] * (1 + wanted) + counts["negatives"]) + 3 * shown + 3 * REPORT_BYTES
    pool = counts["trainable"] if section.pool == "train_only" else counts["documents"]
    sorting, words = words_bytes(inputs.sizes("data").get(DOCUMENTS_FILE, 0) * pool / counts["documents"])
    written = max(sorting, words + written)
    if not section.miner.needs_model:
        return written
    dim = inputs.ref("model").meta.get("dim") if "model" in inputs else None
    return written + dim * (2 * pool + 4 * counts["queries_train"]) if dim else None


MINE = Stage("mine", "negatives", 3, mine, mining_space)


def _pool(data: Dataset) -> Documents:
    """Documents that training may see: not held out, and no answer to dev or test queries alone (nor a copy of one)."""
    train = {doc for query in data.queries("train") for doc in query.positives}
    judged = {doc for split in ("dev", "test") for query in data.queries(split) for doc in query.positives} - train
    documents = data.documents()
    copies = {hash(normalise(document.content)) for document in documents if document.held_out or document.id in judged}
    kept = [
        not document.held_out and (document.id in train or hash(normalise(document.content)) not in copies)
        for document in documents
    ]
    pool = documents.take(np.flatnonzero(kept))
    if not len(pool):
        raise DataError(
            "mine: every document is held out for dev or test queries; give the data train documents, or set mining.pool: all"
        )
    return pool


def _teachers(section: MiningConfig, context: MiningContext, dataset: str) -> dict[str, dict[str, Any]]:
    """nDCG@10 of each teacher over the pool, on the same sample of train queries, BM25 always among them."""
    rankers: list[Ranker] = section.miner.rankers(context)
    if all(ranker.name != "bm25" for ranker in rankers):
        rankers = [*rankers, context.bm25(LexicalConfig())]
    count = min(section.teacher_queries, len(context.queries))
    sample = np.sort(np.random.default_rng([context.seed, 2]).choice(len(context.queries), count, replace=False)).tolist()
    scores = {ranker.name: round(_ndcg_at_10(ranker, context, sample), 5) for ranker in rankers}
    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    logger.info("mine: nDCG@10 of the teacher on %d train queries%s: %s", count, f" of {dataset}" if dataset else "", shown)
    for name, score in scores.items():
        if name != "bm25" and score < scores["bm25"]:
            logger.warning(
                "mine: the teacher '%s' ranks worse than BM25 (nDCG@10 %.3f against %.3f); its hard negatives are mostly noise, "
                "kind: bm25 mines better ones",
                *(name, score, scores["bm25"]),
            )
    return {name: {"ndcg_at_10": score, "queries": count} for name, score in scores.items()}


def _ndcg_at_10(ranker: Ranker, context: MiningContext, queries: Sequence[int]) -> float:
    """Mean nDCG@10 with linear gains and log2 discounts, as trec_eval computes it."""
    discount = 1 / np.log2(np.arange(2, 12))
    values = []
    for start in range(0, len(queries), BLOCK_QUERIES):
        block = queries[start : start + BLOCK_QUERIES]
        found = ranker.search(block, min(10, len(context.documents)))
        for query, rows in zip(block, found.rows.tolist(), strict=True):
            positives: Mapping[str, int] = context.queries[query].positives
            grades = {context.row_of[name]: grade for name, grade in positives.items() if name in context.row_of}
            gains = [grades.get(row, 0) for row in rows]
            ideal = sorted(positives.values(), reverse=True)[:10]
            values.append(float(np.dot(gains, discount[: len(gains)]) / np.dot(ideal, discount[: len(ideal)])))
    return float(np.mean(values))


def _given(context: MiningContext, miner: Miner) -> tuple[list[list[tuple[int, float]]], list[set[int]], Counter[str]]:
    """The source's own negatives with the teacher's scores, the text keys now taken, and what of them was dropped."""
    kept: list[list[int]] = []
    taken: list[set[int]] = []
    dropped: Counter[str] = Counter()
    for number, query in enumerate(context.queries):
        forbidden, rows = context.forbidden_rows(number), []
        seen: set[int] = set()
        for name in query.negatives:
            row = context.row_of.get(name)
            if row is None:
                dropped["outside of the pool"] += 1
            elif row in forbidden:
                dropped["same text as a positive"] += 1
            elif int(context.keys[row]) in seen:
                dropped["same text as another negative"] += 1
            else:
                seen.add(int(context.keys[row]))
                rows.append(row)
        taken.append(seen)
        kept.append(rows)
    asked = [number for number, rows in enumerate(kept) if rows]
    given: list[list[tuple[int, float]]] = [[] for _ in kept]
    if asked:
        teacher = next(iter(miner.rankers(context)), None)
        rows_of = [kept[number] for number in asked]
        scores = teacher.score(asked, rows_of) if teacher else [np.zeros(len(rows)) for rows in rows_of]
        for number, of in zip(asked, scores, strict=True):
            given[number] = [(row, float(score)) for row, score in zip(kept[number], of, strict=True)]
    return given, taken, dropped


def _write(
    draft: Draft, queries: Sequence[Query], rows: Sequence[Sequence[tuple[str, float]]], relabelled: Sequence[Sequence[str]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "query_id": pa.array([query.id for query in queries], pa.string()),
            "doc_ids": pa.array([[name for name, _ in chosen] for chosen in rows], pa.list_(pa.string())),
            "scores": pa.array([[score for _, score in chosen] for chosen in rows], pa.list_(pa.float32())),
            "relabelled": pa.array(list(map(list, relabelled)), pa.list_(pa.string())),
        }
    )
    pq.write_table(table, draft.path / "negatives.parquet", compression="zstd")


def _samples(
    data: Dataset, queries: Sequence[Query], rows: Sequence[Sequence[tuple[str, float]]], seed: int
) -> list[dict[str, Any]]:
    """A few rows with their texts, for people."""
    count = min(SHOWN_ROWS, len(rows))
    shown = np.sort(np.random.default_rng([seed, 3]).choice(len(rows), count, replace=False)).tolist()
    used = {name for number in shown for name in (*queries[number].positives, *(name for name, _ in rows[number]))}
    texts = {name: document.content[:SHOWN_CHARACTERS] for name, document in data.documents().named(used).items()}
    samples = []
    for number in shown:
        query = queries[number]
        negatives = [{"id": name, "score": round(score, 5), "text": texts[name]} for name, score in rows[number]]
        positives = [{"id": name, "text": texts[name]} for name in query.positives]
        samples.append({"query_id": query.id, "query": query.text, "positives": positives, "negatives": negatives})
    return samples
