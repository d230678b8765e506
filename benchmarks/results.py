"""Which strategy helps: contrastive learning, SFT, DPO and GRL by generation score and temperature, on one model and equal steps.

    python benchmarks/results.py --data ../shared/data --work work --json strategies.json --write docs/results.md      some 6 hours
    python benchmarks/results.py --quick                  few queries, steps and strategies, under 5 minutes: does it run

Every run that has ended is kept beside --json and not repeated; a cell whose runs are missing says so. SmolLM2-135M-Instruct,
bidirectional, mean pooling, texts of at most 64 tokens, LoRA of rank 16. Every seed is first warmed up by contrastive learning with
in-batch negatives alone; each strategy goes on from there, with the same queries, passages and BM25 negatives in the same order,
for the same number of steps.

    screen         pydocs, one seed, every strategy. Scored on one half of the test queries, by the hash of their ids.
    confirmation   pydocs and squad_sent, three seeds: contrastive, plain ULLME, + SFT, + DPO, and the GRL that was best in the
                   screen. Scored on the other half of pydocs, and on all queries of squad_sent.

p: two-sided paired randomisation over queries, each query's score averaged over the seeds.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from encode import NOT_RUN, SMOLLM2
from runs import METRIC, Runs, evaluated, experiment, scores_by_query

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import PREPARE, DataConfig
from ullme.evaluation import EvalConfig
from ullme.mining import MINE, MiningConfig
from ullme.records import hash_share
from ullme.statistics import paired_randomisation
from ullme.training import TRAIN, TrainConfig

SEEDS = (0, 1, 2)
WARM_UP, BASE, BM25 = "warm-up alone", "untrained", "BM25"


@dataclass(frozen=True)
class Effort:
    """How long everything takes. queries and documents: of a collection, at most."""

    queries: int = 500
    documents: int = 600
    warm_up_steps: int = 24
    warm_up_queries: int = 24
    steps: int = 10
    step_queries: int = 12
    tokens: int = 64
    every_strategy: bool = True
    dtype: str = "float32"  # on every machine, so that the runs of several may stand in one table

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the confirmation."""
        return SEEDS if self.every_strategy else SEEDS[:1]


QUICK = Effort(40, 60, 2, 6, 2, 4, every_strategy=False)


@dataclass(frozen=True)
class Strategy:
    """What the second phase minimises."""

    name: str
    objective: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)


def with_term(kind: str, weight: float) -> dict[str, Any]:
    """Contrastive learning and a generation term beside it."""
    own = {"per_token": True} if kind == "sft" else {"beta": 0.1}
    parts = [{"objective": {"kind": "contrastive", "temperature": 0.05}}, {"objective": {"kind": kind, **own}, "weight": weight}]
    return {"kind": "sum", "parts": parts}


def grl(score: str, temperature: float, *, preference: float = 0.5, kl: float = 1.0, teacher: str = "live") -> Strategy:
    """GRL with a generation score at a temperature; the other weights are ULLME's."""
    notes = [f"{score} at {temperature:g}"]
    notes += [f"preference {preference:g}"] * (preference != 0.5) + [f"kl {kl:g}"] * (kl != 1.0) + [teacher] * (teacher != "live")
    objective = {"kind": "grl", "generation_temperature": temperature, "preference_weight": preference, "kl_weight": kl}
    return Strategy(f"GRL, {', '.join(notes)}", objective, {"score": score, "teacher": teacher})


CL = Strategy("CL", {"kind": "contrastive", "temperature": 0.05})
SFT, DPO = Strategy("CL + SFT", with_term("sft", 0.5)), Strategy("CL + DPO", with_term("preference", 0.5))
ULLME = replace(grl("passage_given_query", 1.0), name="GRL, plain ULLME")
SCREEN = (
    CL,
    ULLME,
    grl("passage_given_query", 0.1),
    grl("sum", 0.1),
    grl("sum", 0.3),
    grl("pmi", 0.1),
    grl("query_given_passage", 0.1),
    grl("sum", 0.1, preference=0.1, kl=0.1),
    grl("sum", 0.1, preference=0.0),
    SFT,
    DPO,
    Strategy("CL + SFT, weight 0.1", with_term("sft", 0.1)),
    Strategy("CL + DPO, weight 0.1", with_term("preference", 0.1)),
)


@dataclass(frozen=True)
class Collection:
    """A data set, its stages' settings, and which of its test queries count in the confirmation."""

    name: str
    data: dict[str, Any]
    halves: bool

    def counted(self, queries: Sequence[str], *, screening: bool) -> list[str]:
        """Queries of the screen, or of the confirmation."""
        if not self.halves:
            return sorted(queries)
        return sorted(query for query in queries if (hash_share(query, "screen") < 0.5) == screening)


def collections(effort: Effort, data: Path | None) -> list[Collection]:
    """pydocs, and squad_sent where its folder is there."""
    pydocs = {"source": {"kind": "pydocs", "candidates": "test"}, "max_test_queries": effort.queries}
    found = [Collection("pydocs", {**pydocs, "max_documents": effort.documents}, halves=True)]
    folder = data / "squad_sent" if data else None
    if folder is not None and (folder / "corpus.jsonl").is_file():
        source = {"kind": "beir", "path": str(folder), "train_pairs": [str(folder / "train_pairs.jsonl")]}
        caps = {"max_test_queries": effort.queries, "max_documents": effort.documents, "max_train_queries": 4000}
        found.append(Collection("squad_sent", {"source": source, **caps}, halves=False))
    return found


# One run, in a process of its own


class Bench:
    """The stages of one run, in a store that all runs share."""

    def __init__(self, folder: Path, effort: Effort, data: Path | None) -> None:
        self.effort = effort
        self.store = Store(folder / "store")
        self.collections = {collection.name: collection for collection in collections(effort, data)}

    def common(self, collection: str) -> dict[str, ArtifactRef]:
        """Data, base model and negatives, the same for every run."""
        section = DataConfig.model_validate(self.collections[collection].data).resolved()
        base = BackboneConfig.model_validate(
            {"model": SMOLLM2, "dtype": self.effort.dtype, "attention": "bidirectional", "max_tokens": self.effort.tokens}
        )
        mining = MiningConfig.model_validate({"miner": {"kind": "bm25", "num_negatives": 4}})
        data = self.store.produce(PREPARE, section, {}, seed=0)
        negatives = self.store.produce(MINE, mining, {"data": data}, seed=0)
        return {"data": data, "negatives": negatives, "model": self.store.produce(BACKBONE, base.resolved(), {}, seed=0)}

    def warm_up(self, common: Mapping[str, ArtifactRef], seed: int) -> ArtifactRef:
        """The model that every strategy of this seed goes on from."""
        phase = {
            "objective": CL.objective,
            "steps": self.effort.warm_up_steps,
            "batch_size": self.effort.warm_up_queries,
            "num_negatives": 0,
            "learning_rate": 1e-3,
        }
        return self._trained(phase, common, seed)

    def strategy(self, strategy: Strategy, common: Mapping[str, ArtifactRef], seed: int) -> ArtifactRef:
        """The second phase, on a LoRA of its own."""
        phase = {
            "objective": strategy.objective,
            "steps": self.effort.steps,
            "batch_size": self.effort.step_queries,
            "num_negatives": 2,
            "learning_rate": 3e-4,
            "generation": {"passage_tokens": self.effort.tokens, **strategy.generation},
        }
        return self._trained(phase, {**common, "model": self.warm_up(common, seed)}, seed)

    def _trained(self, phase: Mapping[str, Any], inputs: Mapping[str, ArtifactRef], seed: int) -> ArtifactRef:
        runtime = {"chunk_tokens": 8192, "checkpoint_every": 4}
        section = TrainConfig.model_validate({"phases": [phase], "adapter": {"rank": 16, "alpha": 32}, "runtime": runtime})
        return self.store.produce(TRAIN, section, inputs, seed=seed)

    def run(self, collection: str, strategy: str, seed: int) -> dict[str, Any]:
        """Train, encode, evaluate; the row. What only this run needs is deleted."""
        common = self.common(collection)
        section = EvalConfig.model_validate({"metrics": [METRIC, "recall_at_100"], "bootstrap_samples": 100, "controls": False})
        if strategy == BM25:
            return self._row(evaluated(self.store, section, {"data": common["data"]}), None)
        if strategy == BASE:
            model = common["model"]
        elif strategy == WARM_UP:
            model = self.warm_up(common, seed)
        else:
            model = self.strategy(next(one for one in SCREEN if one.name == strategy), common, seed)
        row = self._row(evaluated(self.store, section, {"data": common["data"], "model": model}), model)
        if strategy not in (BASE, WARM_UP):
            shutil.rmtree(model.path)
        return row

    @staticmethod
    def _row(report: ArtifactRef, model: ArtifactRef | None) -> dict[str, Any]:
        teacher = model.path / "logs" / "teacher.json" if model else None
        found = json.loads(teacher.read_text(encoding="utf-8")) if teacher and teacher.is_file() else []
        return {
            "train_seconds": model.meta.get("train_seconds") if model else None,
            "teacher": {name: round(found[0][name], 3) for name in ("accuracy", "chance", "entropy", "most")} if found else None,
            "per_query": scores_by_query(report),
        }


# All runs


def mean_of(row: Mapping[str, Any], queries: Sequence[str]) -> float:
    """Mean score of these queries."""
    return statistics.fmean(row["per_query"][query] for query in queries)


def screen(runs: Runs, bench: Bench) -> dict[str, Any]:
    """Every strategy once. The best GRL is known when all of its rows are."""
    collection = bench.collections["pydocs"]
    found: dict[str, Any] = {}
    counted: list[str] = []
    strategies = SCREEN if bench.effort.every_strategy else (CL, ULLME, SCREEN[-1])
    for name in (BM25, BASE, WARM_UP, *(strategy.name for strategy in strategies)):
        row = runs.row("pydocs", name, 0)
        if row is None:
            found[name] = NOT_RUN
            continue
        counted = collection.counted(list(row["per_query"]), screening=True)
        found[name] = {METRIC: round(mean_of(row, counted), 4), "train_seconds": row["train_seconds"], "teacher": row["teacher"]}
    ways = [strategy.name for strategy in strategies if strategy.objective["kind"] == "grl"]
    missing = any(found[name] == NOT_RUN for name in ways)
    return {
        "queries": len(counted),
        "rows": found,
        "best_grl": None if missing else max(ways, key=lambda name: found[name][METRIC]),
    }


def confirm(runs: Runs, seeds: Sequence[int], collection: Collection, chosen: str) -> dict[str, Any] | str:
    """The compared strategies with every seed: mean, spread over seeds, and how they differ from contrastive learning.

    NOT_RUN where contrastive learning itself lacks a seed.
    """
    names = list(dict.fromkeys([WARM_UP, CL.name, ULLME.name, chosen, SFT.name, DPO.name]))
    tried = {name: [runs.row(collection.name, name, 0)] for name in (BM25, BASE)}
    for seed in seeds:
        for name in names:
            tried.setdefault(name, []).append(runs.row(collection.name, name, seed))
    rows = {name: [row for row in of if row is not None] for name, of in tried.items() if None not in of}
    if CL.name not in rows:
        return NOT_RUN
    queries = collection.counted(list(rows[CL.name][0]["per_query"]), screening=False)
    averaged = {name: [statistics.fmean(row["per_query"][query] for row in of) for query in queries] for name, of in rows.items()}
    found: dict[str, Any] = dict.fromkeys(tried, NOT_RUN)
    for name, of in rows.items():
        scores = [mean_of(row, queries) for row in of]
        compared = paired_randomisation(averaged[name], averaged[CL.name])
        found[name] = {
            "seeds": [round(score, 4) for score in scores],
            "mean": round(statistics.fmean(scores), 4),
            "spread": round(statistics.stdev(scores), 4) if len(scores) > 1 else None,
            "over_cl": None if name == CL.name else round(compared.difference, 4),
            "interval": None if name == CL.name else [round(compared.low, 4), round(compared.high, 4)],
            "p": None if name == CL.name else round(compared.p, 4),
            "train_seconds": [row["train_seconds"] for row in of],
        }
    return {"queries": len(queries), "rows": found}


def everything(runs: Runs, bench: Bench) -> Iterator[dict[str, Any]]:
    """What is known after each part."""
    screened = screen(runs, bench)
    confirmed: dict[str, Any] = dict.fromkeys(("pydocs", "squad_sent"), NOT_RUN)
    result = {"screen": screened, "confirmation": confirmed}
    yield result
    best = screened["best_grl"]
    for name in confirmed if best else ():
        if name in bench.collections:
            confirmed[name] = confirm(runs, bench.effort.seeds, bench.collections[name], best)
            yield result


# For people


def tables(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    rows = result["screen"]["rows"]
    lines = ["| pydocs, seed 0 | nDCG@10 | teacher finds the positive | entropy |", "|---|---|---|---|"]
    for name, row in rows.items():
        if row == NOT_RUN:
            lines.append(f"| {name} | {NOT_RUN} | | |")
            continue
        teacher = row["teacher"]
        found = f"{teacher['accuracy']:.0%} (chance {teacher['chance']:.0%})" if teacher else ""
        entropy = f"{teacher['entropy']:.2f} of {teacher['most']:.2f}" if teacher else ""
        lines.append(f"| {name} | {row[METRIC]:.3f} | {found} | {entropy} |")
    for collection, part in result.get("confirmation", {}).items():
        if part == NOT_RUN:
            lines += ["", f"{collection}: not run here."]
            continue
        lines += [
            "",
            f"| {collection}, {part['queries']} queries | nDCG@10 | spread | over CL | 95% | p |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in part["rows"].items():
            if row == NOT_RUN:
                lines.append(f"| {name} | {NOT_RUN} | | | | |")
                continue
            spread = "" if row["spread"] is None else f"{row['spread']:.3f}"
            over = "" if row["over_cl"] is None else f"{row['over_cl']:+.3f}"
            between = "" if row["interval"] is None else f"{row['interval'][0]:+.3f} .. {row['interval'][1]:+.3f}"
            chance = "" if row["p"] is None else f"{row['p']:.4f}"
            lines.append(f"| {name} | {row['mean']:.3f} | {spread} | {over} | {between} | {chance} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print, and write JSON."""
    experiment(__file__, __doc__, efforts=(Effort(), QUICK), bench=Bench, everything=everything, tables=tables)


if __name__ == "__main__":
    main()
