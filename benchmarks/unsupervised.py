"""What documents alone bring: `configs/unsupervised.yaml` against every untrained form of its LLM, on questions it has never seen.

    python benchmarks/unsupervised.py --data ../shared/data --work work --json unsupervised.json --write docs/results.md
    python benchmarks/unsupervised.py --data ../shared/data --quick           few steps and documents, under 5 minutes: does it run

The pipeline reads the articles of the validation file of wikitext2, a file each, and nothing else: no question, no label. What it
releases is then measured on the test questions and sentences of squad_sent, as are the untrained forms of the same LLM: causal and
bidirectional with mean pooling, and causal with the last token. p: two-sided paired randomisation over questions, against the best.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encode import NOT_RUN, SMOLLM2
from runs import METRIC, Runs, evaluated, experiment, scores_by_query

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import PREPARE, DataConfig
from ullme.evaluation import EvalConfig
from ullme.statistics import paired_randomisation

HERE = Path(__file__).resolve().parent.parent
CONFIG = HERE / "configs" / "unsupervised.yaml"
TRAINED, BM25 = "trained on documents alone", "BM25"
FORMS = {
    "causal, mean": {"attention": "causal", "pooling": "mean"},
    "bidirectional, mean": {"attention": "bidirectional", "pooling": "mean"},
    "causal, last token": {"attention": "causal", "pooling": "last"},
}


@dataclass(frozen=True)
class Effort:
    """How long everything takes. articles: that are read; steps: of each phase; None: all, and the recipe's."""

    articles: int | None = None
    questions: int | None = None
    sentences: int | None = None
    steps: int | None = None
    seed: int = 0
    dtype: str = "float32"  # on every machine, so that the runs of several may stand in one table


QUICK = Effort(30, 40, 100, 1)


class Bench:
    """The pipeline's run and the untrained forms, measured alike in one store."""

    def __init__(self, folder: Path, effort: Effort, data: Path | None) -> None:
        if data is None:
            raise SystemExit("--data: expected the folder of the collections (wikitext2 to read, squad_sent to measure)")
        self.folder, self.effort, self.data = folder, effort, data
        self.store = Store(folder / "store")

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """The row of one system."""
        source = {"kind": "beir", "path": str(self.data / "squad_sent")}
        caps = {"max_test_queries": self.effort.questions, "max_documents": self.effort.sentences}
        labelled = self.store.produce(PREPARE, DataConfig.model_validate({"source": source, **caps}).resolved(), {}, seed=0)
        fields = {"metrics": [METRIC, "recall_at_100"], "bootstrap_samples": 100, "controls": False}
        section = EvalConfig.model_validate(fields).resolved()
        if name == BM25:
            return {"train_seconds": None, "per_query": scores_by_query(evaluated(self.store, section, {"data": labelled}))}
        model = self._trained(seed) if name == TRAINED else self._untrained(FORMS[name])
        report = evaluated(self.store, section, {"data": labelled, "model": model})
        return {"train_seconds": model.meta.get("train_seconds"), "per_query": scores_by_query(report)}

    def _untrained(self, form: Mapping[str, str]) -> ArtifactRef:
        fields = {"model": SMOLLM2, "dtype": self.effort.dtype, "max_tokens": 128, **form}
        return self.store.produce(BACKBONE, BackboneConfig.model_validate(fields).resolved(), {}, seed=0)

    def _trained(self, seed: int) -> ArtifactRef:
        """What `prefect run train-and-index` releases, from a folder of articles."""
        documents, summary = self.folder / "documents", self.folder / "summary.json"
        documents.mkdir(parents=True, exist_ok=True)
        text = (self.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
        articles = [article for article in re.split(r"(?m)^(?= = [^=].* = *$)", text) if article.strip()]
        for number, article in enumerate(articles[: self.effort.articles]):
            (documents / f"{number:03}.txt").write_text(article, encoding="utf-8")
        changes = {"seed": seed, "store": self.store.root, "data.source.path": documents, "backbone.dtype": self.effort.dtype}
        if self.effort.steps is not None:
            changes |= {f"training.phases.{phase}.steps": self.effort.steps for phase in (0, 1)}
        command = [sys.executable, "-m", "flows", "train-and-index", "--config", str(CONFIG), "--summary", str(summary)]
        for key, value in changes.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run(command, check=True, cwd=HERE)
        released = json.loads(summary.read_text(encoding="utf-8"))["released"]["model"]
        return next(ref for ref in self.store.finished("model") if str(ref) == released)


def everything(runs: Runs, bench: Bench) -> Iterator[dict[str, Any]]:
    """What is known at the end."""
    rows = {name: runs.row(name, bench.effort.seed) for name in (BM25, *FORMS, TRAINED)}
    scores = {name: statistics.fmean(row["per_query"].values()) for name, row in rows.items() if row is not None}
    found: dict[str, Any] = {
        name: NOT_RUN if row is None else {METRIC: round(scores[name], 4), "train_seconds": row["train_seconds"]}
        for name, row in rows.items()
    }
    result: dict[str, Any] = {"questions": max((len(row["per_query"]) for row in rows.values() if row), default=0), "rows": found}
    trained = rows[TRAINED]
    if trained is not None and all(name in scores for name in FORMS):
        best = max(FORMS, key=lambda name: scores[name])
        other = rows[best]
        assert other is not None
        compared = paired_randomisation(
            [trained["per_query"][query] for query in other["per_query"]], list(other["per_query"].values())
        )
        result["over_untrained"] = {
            "best": best,
            "difference": round(compared.difference, 4),
            "interval": [round(compared.low, 4), round(compared.high, 4)],
            "p": round(compared.p, 4),
        }
    yield result


def tables(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = [f"| {result['questions']} questions of squad_sent | nDCG@10 | training |", "|---|---|---|"]
    for name, row in result["rows"].items():
        if row == NOT_RUN:
            lines.append(f"| {name} | {NOT_RUN} | |")
            continue
        seconds = f"{row['train_seconds']:.0f} s" if row["train_seconds"] else ""
        lines.append(f"| {name} | {row[METRIC]:.3f} | {seconds} |")
    if "over_untrained" in result:
        over = result["over_untrained"]
        low, high = over["interval"]
        lines += ["", f"Over {over['best']}, untrained: {over['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p {over['p']:.4f}."]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print, and write JSON."""
    experiment(__file__, __doc__, efforts=(Effort(), QUICK), bench=Bench, everything=everything, tables=tables)


if __name__ == "__main__":
    main()
