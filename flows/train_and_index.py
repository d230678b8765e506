"""The flow: a real LLM becomes an embedder, a corpus becomes an index, both are measured and released together."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.config import RunConfig
from flows.tasks import producing, run_name

__all__ = ["train_and_index"]


@flow(name="train-and-index", flow_run_name=run_name, persist_result=False)
def train_and_index(config: RunConfig) -> dict[str, Any]:
    """Train an embedder on a corpus, index the corpus with it, measure both, release both. Returns the summary of the run.

    Every step whose artifact is in the store already is reused. A bad `config` is refused before anything starts; it may
    be the path of a YAML file.
    """
    with producing(config) as produce:
        produce.model()
        produce("encode", "index", "evaluate")
        return produce.released(produce.promote())
