"""How many mined negatives are answers that nobody labelled, kind by kind, and what they cost.

    python benchmarks/false_negatives.py --data ../shared/data --work work --json false_negatives.json      under two hours
    python benchmarks/false_negatives.py --data ../shared/data --quick                    few queries and kinds, under 5 minutes

share      nl2bash and squad_sent, 2,000 train queries of each, every train passage in the pool, four negatives a query; teachers
           are BM25 and all-MiniLM-L6-v2. A negative nearly equals a positive of its query where their words overlap by 4/5
           (Jaccard); what equals one (case, punctuation and spacing aside) is never mined here, and `kept out` says how many of
           the four would be if, as elsewhere, only the labelled passage itself were left out.
training   nl2bash, four kinds, three seeds: SmolLM2-135M-Instruct, bidirectional, contrastive learning with two of the mined
           negatives, equal steps from the same warm-up; nDCG@10 on the test queries. p: two-sided paired randomisation against
           `random`.

A run that has ended is kept beside --json and not repeated; a cell whose runs are missing says so.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from encode import NOT_RUN, SMOLLM2
from mine import MINILM
from runs import METRIC, Runs, evaluated, experiment, scores_by_query

from ullme.artifacts import ArtifactRef, Inputs, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.components import resolve
from ullme.data import PREPARE, DataConfig, Dataset
from ullme.encoder import Encoder
from ullme.evaluation import EvalConfig
from ullme.lexical import LexicalConfig, tokenise
from ullme.miner import Miner
from ullme.mining import MINE, MiningConfig
from ullme.mining_context import MiningContext, encoded_vectors
from ullme.statistics import paired_randomisation
from ullme.training import TRAIN, TrainConfig

COLLECTIONS = ("nl2bash", "squad_sent")
NEGATIVES = 4
NEAR = 0.8
SHARE, TRAINING = "share", "training"


@dataclass(frozen=True)
class Effort:
    """How long everything takes."""

    train_queries: int = 2000
    queries: int = 400
    documents: int = 1000
    steps: int = 12
    warm_up_steps: int = 16
    step_queries: int = 16
    tokens: int = 48
    seeds: tuple[int, ...] = (0, 1, 2)
    every_kind: bool = True


QUICK = Effort(100, 40, 100, 2, 2, 4, 48, (0,), every_kind=False)
KINDS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "bm25": {"kind": "bm25"},
    "topk": {"kind": "topk"},
    "perc_pos": {"kind": "perc_pos"},
    "margin_pos": {"kind": "margin_pos"},
    "rank_window": {"kind": "rank_window"},
    "fused": {"kind": "fused"},
}
TRAINED = ("random", "bm25", "topk", "perc_pos")


class Bench:
    """One run, in a store that all runs share."""

    def __init__(self, folder: Path, effort: Effort, data: Path | None) -> None:
        if data is None or not all((data / name / "train_pairs.jsonl").is_file() for name in COLLECTIONS):
            raise SystemExit(f"--data: expected the folder of {' and '.join(COLLECTIONS)}, got {data}")
        self.effort, self.folder = effort, data
        self.store = Store(folder / "store")

    def data(self, collection: str, documents: int | None = None) -> ArtifactRef:
        """The collection; its train pairs beside it. documents: that are searched at most."""
        folder, effort = self.folder / collection, self.effort
        source = {"kind": "beir", "path": str(folder), "train_pairs": [str(folder / "train_pairs.jsonl")]}
        caps = {"max_train_queries": effort.train_queries, "max_test_queries": effort.queries, "max_documents": documents}
        config = DataConfig.model_validate({"source": source, "dev_share": 0, **caps})
        return self.store.produce(PREPARE, config.resolved(), {}, seed=0)

    def model(self, name: str, **fields: Any) -> ArtifactRef:
        """A model as it is."""
        config = BackboneConfig.model_validate({"model": name, "dtype": "float32", **fields})
        return self.store.produce(BACKBONE, config.resolved(), {}, seed=0)

    def run(self, what: str, collection: str, kind: str, seed: int) -> dict[str, Any]:
        """The row."""
        return self.share(collection, kind) if what == SHARE else self.trained(collection, kind, seed)

    def share(self, collection: str, kind: str) -> dict[str, Any]:
        """Of each query: the share of its negatives that nearly equal a positive."""
        refs = {
            "data": self.data(collection, 100 if self.effort == QUICK else None),
            "model": self.model(MINILM, max_tokens=256, prompts={"query": ""}),
        }
        data = Dataset.open(refs["data"].path)
        queries = data.queries("train")
        encoder = Encoder.load(refs["model"].path)
        vectors = encoded_vectors(Inputs(self.store, refs), data.name, lambda: encoder, batch_tokens=16_384)
        folder = self.store.root / "share" / refs["data"].path.name  # vectors are made once for all kinds
        context = MiningContext(queries, data.documents(), seed=0, vectors=vectors, folder=folder)
        miner = resolve("ullme.miners", KINDS[kind])
        assert isinstance(miner, Miner)
        chosen = miner.select(context, [set() for _ in queries]).chosen
        used = {row for rows in chosen for row, _ in rows} | {
            row for query in range(len(queries)) for row in context.positive_rows(query)
        }
        words = {row: set(tokenise(context.documents[row].content, LexicalConfig())) for row in sorted(used)}
        near: dict[str, float] = {}
        for query, rows in enumerate(chosen):
            positives = [words[row] for row in context.positive_rows(query)]
            alike = [any(overlap(words[row], positive) >= NEAR for positive in positives) for row, _ in rows]
            near[queries[query].id] = statistics.fmean(alike) if alike else 0.0
        return {"per_query": near, "train_seconds": None, "kept_out": self._kept_out(context, miner)}

    @staticmethod
    def _kept_out(context: MiningContext, miner: Miner) -> float | None:
        """Of the four best but for the labelled passages, the share that equals one of these; None where nothing is ranked."""
        rankers = miner.rankers(context)
        if not rankers:
            return None
        equal = total = 0
        every = range(len(context.queries))
        for query, rows in zip(every, rankers[0].search(every, NEGATIVES + 50).rows.tolist(), strict=True):
            labelled, forbidden = set(context.positive_rows(query)), context.forbidden_rows(query)
            best = [row for row in rows if row >= 0 and row not in labelled][:NEGATIVES]
            equal, total = equal + sum(row in forbidden for row in best), total + len(best)
        return round(equal / total, 4)

    def trained(self, collection: str, kind: str, seed: int) -> dict[str, Any]:
        """Of each test query: nDCG@10 after training with this kind's negatives."""
        data = self.data(collection, self.effort.documents)
        teacher = self.model(MINILM, max_tokens=256, prompts={"query": ""})
        mining = MiningConfig.model_validate({"miner": {**KINDS[kind], "num_negatives": NEGATIVES}})
        negatives = self.store.produce(MINE, mining, {"data": data, "model": teacher}, seed=0)
        base = self.model(SMOLLM2, attention="bidirectional", max_tokens=self.effort.tokens)
        common = {"data": data, "negatives": negatives}
        random = MiningConfig.model_validate({"miner": {"kind": "random", "num_negatives": 1}})
        first = {"data": data, "negatives": self.store.produce(MINE, random, {"data": data}, seed=0), "model": base}
        warm = self._phase(first, self.effort.warm_up_steps, 0, 1e-3, seed)
        model = self._phase({**common, "model": warm}, self.effort.steps, 2, 3e-4, seed)
        section = EvalConfig.model_validate({"metrics": [METRIC], "bootstrap_samples": 100, "controls": False})
        per_query = scores_by_query(evaluated(self.store, section, {"data": data, "model": model}))
        shutil.rmtree(model.path)
        return {"per_query": per_query, "train_seconds": model.meta["train_seconds"]}

    def _phase(self, inputs: Mapping[str, ArtifactRef], steps: int, negatives: int, rate: float, seed: int) -> ArtifactRef:
        phase = {
            "objective": {"kind": "contrastive", "temperature": 0.05},
            "steps": steps,
            "batch_size": self.effort.step_queries,
            "num_negatives": negatives,
            "learning_rate": rate,
        }
        runtime = {"chunk_tokens": 8192, "checkpoint_every": 4}
        section = TrainConfig.model_validate({"phases": [phase], "adapter": {"rank": 16, "alpha": 32}, "runtime": runtime})
        return self.store.produce(TRAIN, section, inputs, seed=seed)


def overlap(one: set[str], other: set[str]) -> float:
    """Jaccard's: words of both over words of either."""
    return len(one & other) / max(1, len(one | other))


def everything(runs: Runs, bench: Bench) -> Iterator[dict[str, Any]]:
    """What is known after each part."""
    kinds = tuple(KINDS) if bench.effort.every_kind else ("random", "bm25", "topk")
    result: dict[str, Any] = {SHARE: {}, TRAINING: {}}
    for collection in COLLECTIONS:
        rows = {kind: runs.row(SHARE, collection, kind, 0) for kind in kinds}
        result[SHARE][collection] = {
            kind: NOT_RUN
            if row is None
            else {
                "near": round(statistics.fmean(row["per_query"].values()), 4),
                "queries_with_one": round(float(np.mean([share > 0 for share in row["per_query"].values()])), 4),
                "kept_out": row["kept_out"],
            }
            for kind, row in rows.items()
        }
        yield result
    trained = {
        kind: [runs.row(TRAINING, COLLECTIONS[0], kind, seed) for seed in bench.effort.seeds] for kind in TRAINED if kind in kinds
    }
    baseline = averaged(trained["random"])
    for kind, of in trained.items():
        mine = averaged(of)
        if mine is None or baseline is None:
            result[TRAINING][kind] = NOT_RUN
            continue
        seeds = [statistics.fmean(row["per_query"].values()) for row in of if row is not None]
        compared = paired_randomisation([mine[query] for query in baseline], list(baseline.values()))
        result[TRAINING][kind] = {
            "seeds": [round(seed, 4) for seed in seeds],
            "mean": round(statistics.fmean(seeds), 4),
            "spread": round(statistics.stdev(seeds), 4) if len(seeds) > 1 else None,
            "over_random": round(compared.difference, 4),
            "p": round(compared.p, 4),
        }
    yield result


def averaged(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, float] | None:
    """Each query's score over the seeds; None while one is missing."""
    there = [row["per_query"] for row in rows if row is not None]
    if len(there) < len(rows):
        return None
    return {query: statistics.fmean(scores[query] for scores in there) for query in there[0]}


def tables(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = []
    for collection, rows in result[SHARE].items():
        lines += [f"| {collection}, mined by | nearly equal a positive | queries with one | kept out |", "|---|---|---|---|"]
        for kind, row in rows.items():
            if row == NOT_RUN:
                lines.append(f"| {kind} | {NOT_RUN} | | |")
                continue
            out = "" if row["kept_out"] is None else f"{row['kept_out']:.1%}"
            lines.append(f"| {kind} | {row['near']:.1%} | {row['queries_with_one']:.1%} | {out} |")
        lines.append("")
    lines += [f"| {COLLECTIONS[0]}, trained with | nDCG@10 | spread | over random | p |", "|---|---|---|---|---|"]
    for kind, row in result[TRAINING].items():
        if row == NOT_RUN:
            lines.append(f"| {kind} | {NOT_RUN} | | | |")
            continue
        spread = "" if row["spread"] is None else f"{row['spread']:.3f}"
        lines.append(f"| {kind} | {row['mean']:.3f} | {spread} | {row['over_random']:+.3f} | {row['p']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print, and write JSON."""
    experiment(__file__, __doc__, efforts=(Effort(), QUICK), bench=Bench, everything=everything, tables=tables)


if __name__ == "__main__":
    main()
