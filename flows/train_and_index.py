"""The flow: a real LLM becomes an embedder, a corpus becomes an index, both are measured and released together."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.config import RunConfig
from flows.pipeline import Pipeline
from flows.registry import Registry
from flows.report import page_rows, plot, summarise
from flows.retriever import Release
from flows.tasks import Producer, show_scores
from flows.tracking import Tracker
from ullme.artifacts import Store
from ullme.errors import ArtifactError

__all__ = ["train_and_index"]


def run_name() -> str:
    """`SmolLM2-135M-Instruct pydocs 2026-01-31 14:03`."""
    config = flow_run.parameters["config"]
    plain = config.as_json() if isinstance(config, RunConfig) else config
    model = Path(plain["backbone"]["model"].replace(":", "/")).name.split(".")[0]
    return f"{model} {plain['data']['source']['kind']} {time.strftime('%Y-%m-%d %H:%M')}"


@flow(name="train-and-index", flow_run_name=run_name, persist_result=False)
def train_and_index(config: RunConfig) -> dict[str, Any]:
    """Train an embedder on a corpus, index the corpus with it, measure both, release both. Returns the summary of the run.

    Every step whose artifact is in the store already is reused. A bad `config` is refused before anything starts.
    """
    started = time.monotonic()
    config = config.resolved()
    with Tracker.start(config.tracking, config.store, run_name()) as tracker:
        tracker.parameters(config.as_json())
        produce = Producer(Pipeline(config, present_champion(config)), tracker)
        produce.announce(Pipeline(config, present_champion(config)).plan())

        produce("data")
        tracker.data(produce.pipeline.made["data"])
        produce("backbone")
        produce("mine")
        produce("train")
        produce("encode")
        produce("index")
        produce("evaluate")
        promotion = produce.promote()

        summary = summarise(produce.pipeline, produce.stages, promotion, seconds=time.monotonic() - started)
        tracker.scores(summary_scores(summary))
        with tempfile.TemporaryDirectory(prefix="ullme-") as folder:
            plot(Path(folder), summary, produce.pipeline.made["train"])
            tracker.files(Path(folder))
        show_scores(page_rows(summary))
    return summary


def present_champion(config: RunConfig) -> Release | None:
    """What is released at present, if its model can still be opened; `promote` says so where it cannot."""
    champion = Registry.at(config.tracking, config.store).champion()
    if champion is None:
        return None
    try:
        Store(config.store).open(champion.release.model, "model")
    except ArtifactError:
        return None
    return champion.release


def summary_scores(summary: dict[str, Any]) -> dict[str, float]:
    """Scores under flat names: `tuned/retrieval/ndcg_at_10`."""
    return {
        f"{system}/{task}/{metric}": value
        for system, tasks in summary["scores"].items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }
