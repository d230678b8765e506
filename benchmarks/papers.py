"""Do the patterns of LLM2Vec and GEM appear on a small LLM? Retrieval and what is left of the language, side by side.

    python benchmarks/papers.py --data ../shared/data --work work --json papers.json --write docs/results.md
    python benchmarks/papers.py --quick                  few steps and systems, under 5 minutes: does it run

Some 3 hours where the machine multiplies bfloat16 natively. Every run that has ended is kept beside --json and not repeated.
SmolLM2-135M-Instruct in bfloat16, texts of at most 128 tokens, LoRA of rank 16, merged after each phase; a dose is the tokens of
documents that a phase reads. Trained on the functions of the training modules of pydocs, without any question but in the phase
`pairs`. Measured: questions of the test modules (retrieval), perplexity of wikitext2's test file, last words of lambada, choices of
mmlu by the probability of their text (language, in causal mode).

    LLM2Vec (arXiv 2404.05961)   bidirectional: MNTP in three doses, each going on from the one before; SimCSE after the first of
                                 them and alone, pairs after both and alone
    GEM (arXiv 2506.04344)       special tokens: next tokens, then with the contrastive term; 1 and 5 tokens; a frozen trunk

p: two-sided paired randomisation over queries against the system it is compared with, scores averaged over seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encode import NOT_RUN, SMOLLM2
from runs import METRIC, Runs, evaluated, experiment, scores_by_query

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import PREPARE, DataConfig, read_texts
from ullme.evaluation import EvalConfig
from ullme.mining import MINE, MiningConfig
from ullme.statistics import paired_randomisation
from ullme.training import TRAIN, TrainConfig

LANGUAGE = {"perplexity": "perplexity", "last_word": "accuracy", "multiple_choice": "accuracy"}
BATCH = 32


@dataclass(frozen=True)
class Effort:
    """How long everything takes. doses (of MNTP), simcse_dose, gem_dose: tokens of documents that a phase reads."""

    queries: int = 300
    documents: int = 500
    doses: tuple[int, ...] = (100_000, 250_000, 500_000)
    simcse_dose: int = 50_000
    gem_dose: int = 50_000
    pair_steps: int = 24
    windows: int = 40
    passages: int = 200
    questions: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    every_system: bool = True
    dtype: str = "bfloat16"


QUICK = Effort(20, 40, (4_000,), 4_000, 4_000, 1, 1, 6, 3, (0,), every_system=False)
LORA = {"rank": 16, "alpha": 32}
LLM2VEC = {"attention": "bidirectional", "pooling": "mean"}
MNTP = {"objective": {"kind": "mntp"}, "learning_rate": 3e-4}
SIMCSE = {"objective": {"kind": "simcse"}, "learning_rate": 1e-4}
PAIRS = {"objective": {"kind": "contrastive", "temperature": 0.05}, "learning_rate": 1e-3, "num_negatives": 0}
NTP = {"objective": {"kind": "gem", "alpha": [0.0, 0.0]}, "learning_rate": 3e-4}


def gem(count: int, *, head: bool = False) -> dict[str, Any]:
    """The backbone of GEM."""
    return {"attention": "causal", "pooling": "special", "special": {"count": count, "head": head}}


@dataclass(frozen=True)
class System:
    """A way to an embedder. phases: (settings, tokens of documents, or None for the pairs' own number of steps), in order.

    against: the system it is compared with. frozen: only special tokens and head are trained.
    """

    name: str
    backbone: Mapping[str, Any]
    phases: tuple[tuple[Mapping[str, Any], int | None], ...] = ()
    against: str = ""
    repeated: bool = False
    frozen: bool = False


def systems(effort: Effort) -> list[System]:
    """All of them, each after what it is compared with."""
    further = [(MNTP, dose - before) for before, dose in zip((0, *effort.doses), effort.doses, strict=False)]
    first, simcse = f"MNTP {effort.doses[0]:,} tokens", (SIMCSE, effort.simcse_dose)
    rising_alpha = {"alpha": [0.0, 1.0], "alpha_after": 0, "alpha_steps": steps_of(effort.gem_dose) // 2}
    rising = {"objective": {"kind": "gem", **rising_alpha}, "learning_rate": 3e-4}
    causal, bidirectional = {"attention": "causal", "pooling": "mean"}, "bidirectional, untrained"
    found = [
        System("causal, untrained", causal),
        System("causal, last token, untrained", {"attention": "causal", "pooling": "last"}),
        System(bidirectional, LLM2VEC, against="causal, untrained"),
        *(
            System(f"MNTP {dose:,} tokens", LLM2VEC, tuple(further[: place + 1]), bidirectional)
            for place, dose in enumerate(effort.doses)
        ),
        System("SimCSE alone", LLM2VEC, (simcse,), bidirectional),
        System("MNTP + SimCSE", LLM2VEC, (further[0], simcse), first, repeated=True),
        System("pairs alone", LLM2VEC, ((PAIRS, None),), bidirectional, repeated=True),
        System("MNTP + SimCSE + pairs", LLM2VEC, (further[0], simcse, (PAIRS, None)), "pairs alone", repeated=True),
    ]
    for count in (1, 5):
        called = f"GEM, {count} token{'s' * (count > 1)}"
        backbone, after = gem(count), ((NTP, effort.gem_dose), (rising, effort.gem_dose))
        found += [
            System(f"{called}, untrained", backbone, against="causal, last token, untrained"),
            System(f"{called}, next tokens", backbone, after[:1], f"{called}, untrained"),
            System(f"{called}, + contrastive", backbone, after, f"{called}, next tokens", repeated=count == 1),
        ]
    fixed = ((rising, effort.gem_dose),)
    found.append(System("GEM, frozen trunk", gem(1, head=True), fixed, "GEM, 1 token, untrained", repeated=True, frozen=True))
    return found if effort.every_system else [found[2], found[3], found[-4], found[-1]]


def steps_of(dose: int, mean_length: float = 100.0) -> int:
    """Optimisation steps that read about so many tokens of documents."""
    return max(1, round(dose / BATCH / mean_length))


class Bench:
    """The stages of one run, in a store that all runs share."""

    def __init__(self, folder: Path, effort: Effort, data: Path | None) -> None:
        self.effort, self.data = effort, data
        self.store = Store(folder / "store")

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train, encode, evaluate; the row."""
        system = next(one for one in systems(self.effort) if one.name == name)
        section = {"source": {"kind": "pydocs", "candidates": "test"}, "max_test_queries": self.effort.queries}
        config = DataConfig.model_validate({**section, "max_documents": self.effort.documents}).resolved()
        data = self.store.produce(PREPARE, config, {}, seed=0)
        fields = {"model": SMOLLM2, "dtype": self.effort.dtype, "max_tokens": 128, **system.backbone}
        base = BackboneConfig.model_validate(fields)
        model = self.store.produce(BACKBONE, base.resolved(), {}, seed=0)
        texts = read_texts(data.path)
        length = statistics.fmean(self._lengths(model, [text.query for text in texts[:1000]]))
        seconds = []
        for number, (phase, dose) in enumerate(system.phases):
            steps = self.effort.pair_steps if dose is None else steps_of(dose, length)
            draw = seed + number * len(self.effort.seeds)  # phases of one seed read the texts in different orders
            model = self._trained(system, {**phase, "steps": steps, "batch_size": BATCH}, data, model, draw)
            seconds.append(model.meta["train_seconds"])
        report = evaluated(self.store, self._measured(), {"data": data, "model": model})
        scores = json.loads((report.path / "report.json").read_text(encoding="utf-8"))["scores"]
        language = {task: scores[task][metric] for task, metric in LANGUAGE.items() if task in scores}
        return {"train_seconds": seconds, "language": language, "per_query": scores_by_query(report)}

    def _lengths(self, model: ArtifactRef, texts: Sequence[str]) -> list[int]:
        from ullme.encoder import Encoder

        return [len(row) for row in Encoder.load(model.path, device="cpu").tokenise(texts, "document")]

    def _trained(self, system: System, phase: Mapping[str, Any], data: ArtifactRef, model: ArtifactRef, seed: int) -> ArtifactRef:
        learning = {"adapter": None, "frozen_trunk": True} if system.frozen else {"adapter": LORA}
        runtime = {"chunk_tokens": 8192, "checkpoint_every": 10}
        section = TrainConfig.model_validate({"phases": [phase], **learning, "runtime": runtime})
        inputs = {"data": data, "model": model}
        if section.reads_pairs:
            mining = MiningConfig.model_validate({"miner": {"kind": "bm25", "num_negatives": 1}})
            inputs["negatives"] = self.store.produce(MINE, mining, {"data": data}, seed=0)
        return self.store.produce(TRAIN, section, inputs, seed=seed)

    def _measured(self) -> EvalConfig:
        tasks: list[dict[str, Any]] = [{"kind": "retrieval"}]
        if self.data is not None:
            tasks += [
                {"kind": "perplexity", "path": str(self.data / "wikitext2" / "test.txt"), "max_windows": self.effort.windows},
                {"kind": "last_word", "path": str(self.data / "lambada" / "test.jsonl"), "max_texts": self.effort.passages},
                {
                    "kind": "multiple_choice",
                    "path": str(self.data / "mmlu" / "test_mini.jsonl"),
                    "answers": "text",
                    "max_questions": self.effort.questions,
                },
            ]
        fields = {"tasks": tasks, "metrics": [METRIC, "recall_at_100"], "bootstrap_samples": 100, "controls": False}
        return EvalConfig.model_validate(fields).resolved()


def everything(runs: Runs, bench: Bench) -> Iterator[dict[str, Any]]:
    """What is known at the end."""
    effort = bench.effort
    rows: dict[str, Any] = {}
    averaged: dict[str, list[float]] = {}
    counted: list[str] = []
    for system in systems(effort):
        tried = [runs.row(system.name, seed) for seed in (effort.seeds if system.repeated else effort.seeds[:1])]
        found = [row for row in tried if row is not None]
        if len(found) < len(tried):
            rows[system.name] = NOT_RUN
            continue
        counted = sorted(found[0]["per_query"])
        averaged[system.name] = [statistics.fmean(row["per_query"][query] for row in found) for query in counted]
        scores = [statistics.fmean(row["per_query"].values()) for row in found]
        row: dict[str, Any] = {
            "seeds": [round(score, 4) for score in scores],
            METRIC: round(statistics.fmean(scores), 4),
            "language": {
                task: [round(one["language"][task], 4) for one in found] if task in found[0]["language"] else NOT_RUN
                for task in LANGUAGE
            },
            "train_seconds": [one["train_seconds"] for one in found],
        }
        if system.against in averaged:
            compared = paired_randomisation(averaged[system.name], averaged[system.against])
            row |= {"against": system.against, "difference": round(compared.difference, 4), "p": round(compared.p, 4)}
        rows[system.name] = row
    yield {"queries": len(counted), "rows": rows}


def tables(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"| {result['queries']} questions of pydocs | nDCG@10 | against | difference | p | perplexity | last word | choices |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if row == NOT_RUN:
            lines.append(f"| {name} | {NOT_RUN} | | | | | | |")
            continue
        spread = f" ({min(row['seeds']):.3f} .. {max(row['seeds']):.3f})" if len(row["seeds"]) > 1 else ""
        against = [row["against"], f"{row['difference']:+.3f}", f"{row['p']:.4f}"] if "against" in row else ["", "", ""]
        language = [values if values == NOT_RUN else f"{statistics.fmean(values):.3g}" for values in row["language"].values()]
        lines.append(f"| {' | '.join([name, f'{row[METRIC]:.3f}{spread}', *against, *language])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print, and write JSON."""
    experiment(__file__, __doc__, efforts=(Effort(), QUICK), bench=Bench, everything=everything, tables=tables)


if __name__ == "__main__":
    main()
