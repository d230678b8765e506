"""One stage at a time, as flows: each makes what it needs and the store does not have yet, then itself, and releases nothing."""

from __future__ import annotations

from typing import Any

from prefect import Flow, flow

from flows.config import RunConfig
from flows.pipeline import Model
from flows.tasks import producing, run_name

__all__ = ["STAGE_FLOWS", "encode", "evaluate", "index", "mine", "promote", "train"]


def _stage_flow(stage: str, what: str) -> Flow[..., dict[str, Any]]:
    def run(config: RunConfig, model: Model = "trained") -> dict[str, Any]:
        with producing(config, model=model, until=stage) as produce:
            produce.model()
            produce("encode", "index", "evaluate")
            return produce.released(produce.promote()) if stage == "promote" else produce.finished()

    run.__doc__ = f"{what} model: `trained`, the model of this configuration, or `champion`, the one that is released."
    return flow(name=stage, flow_run_name=run_name, persist_result=False)(run)


mine = _stage_flow("mine", "Hard negatives of the training queries.")
train = _stage_flow("train", "The model.")
encode = _stage_flow("encode", "The corpus as vectors of the model.")
index = _stage_flow("index", "The index of these vectors.")
evaluate = _stage_flow("evaluate", "Every report: the model and what it is compared with. Nothing is released.")
promote = _stage_flow("promote", "Everything, and its release.")

STAGE_FLOWS = {one.name: one for one in (mine, train, encode, index, evaluate, promote)}
"""By name."""
