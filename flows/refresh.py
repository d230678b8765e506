"""The flow of every night: the released model, the documents as they are now, a new index, released when it is not worse."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.states import Completed

from flows.config import RunConfig
from flows.liveness import alive
from flows.locks import say
from flows.tasks import nothing_new, producing, run_name

__all__ = ["refresh"]


@flow(name="refresh", flow_run_name=run_name, persist_result=False)
def refresh(config: RunConfig) -> dict[str, Any] | State[dict[str, Any]]:
    """Encode what is new or changed with the champion's model, index, measure, release. Returns the summary of the run.

    Texts that were encoded before are not encoded again, and deleted documents are gone. Where neither the documents nor
    the configuration changed, nothing runs: the summary is `{"nothing_new": "why"}`, and the run's state says so.
    """
    with alive(config.store):
        if line := nothing_new(config):
            say(line)
            return Completed(message=line, data={"nothing_new": line})
        with producing(config, model="champion") as produce:
            produce("data")
            produce("encode")
            produce("index")
            produce("evaluate")
            return produce.released(produce.promote())
