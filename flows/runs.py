"""What MLflow has recorded of the pipelines that ran on a store."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.tracking import HOST, STORE, TrackingConfig, connect

__all__ = ["PastRun", "Runs", "every"]

PAGE = 500
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class PastRun:
    """A pipeline's run. started: seconds since 1970. artifacts: `kind/key` of what its stages made or reused."""

    run_id: str
    name: str
    started: float
    artifacts: Sequence[str] = ()


class Runs:
    """The pipelines' runs, in every experiment of a tracking server or database."""

    def __init__(self, client: Any) -> None:
        """client: an MlflowClient."""
        self._client = client

    @classmethod
    def at(cls, config: TrackingConfig, store: Path) -> Runs:
        """The runs that a configuration's are recorded among.

        Raises:
            ConfigError: the tracking server or database cannot be used.
        """
        return cls(connect(config.address(store)))

    def latest(self, count: int, *, holds: Callable[[str], bool]) -> list[PastRun]:
        """The newest `count` pipelines of each experiment that had to do with a store.

        holds: whether the store has, or had, an artifact `kind/key`.
        """
        found: list[PastRun] = []
        for experiment in self._experiments():
            mine: dict[str, None] = {}
            for run in self._pages(experiment.experiment_id, "tags.artifact != ''"):
                parent = run.data.tags.get(PARENT)
                if parent and parent not in mine and holds(run.data.tags["artifact"]):
                    if len(mine) == count:
                        break
                    mine[parent] = None
            found += [self._whole(experiment.experiment_id, parent) for parent in mine]
        return found

    def unfinished(self, store: Path) -> list[PastRun]:
        """Pipelines of this machine on a store that MLflow takes for running, and stages that it takes for running after them."""
        found = []
        for experiment in self._experiments():
            for run in self._pages(experiment.experiment_id, "attributes.status = 'RUNNING'"):
                parent = self._client.get_run(run.data.tags[PARENT]) if PARENT in run.data.tags else run
                ended = parent is not run and parent.info.status != "RUNNING"
                tags = parent.data.tags
                if (tags.get(HOST), tags.get(STORE)) == (socket.gethostname(), str(store)) and (parent is run or ended):
                    found.append(PastRun(run.info.run_id, run.info.run_name, run.info.start_time / 1000))
        return found

    def kill(self, run: PastRun) -> None:
        """Mark a run, and those of its stages that have not ended, as killed."""
        experiment = self._client.get_run(run.run_id).info.experiment_id
        for stage in self._pages(experiment, f"tags.`{PARENT}` = '{run.run_id}'"):
            if stage.info.status == "RUNNING":
                self._client.set_terminated(stage.info.run_id, "KILLED")
        self._client.set_terminated(run.run_id, "KILLED")

    def _whole(self, experiment: str, run_id: str) -> PastRun:
        info = self._client.get_run(run_id).info
        stages = self._pages(experiment, f"tags.`{PARENT}` = '{run_id}' and tags.artifact != ''")
        return PastRun(run_id, info.run_name, info.start_time / 1000, sorted({run.data.tags["artifact"] for run in stages}))

    def _experiments(self) -> Iterator[Any]:
        return every(lambda token: self._client.search_experiments(max_results=PAGE, page_token=token))

    def _pages(self, experiment: str, which: str) -> Iterator[Any]:
        """Runs of an experiment, newest first."""
        order = ["attributes.start_time DESC"]
        return every(
            lambda token: self._client.search_runs([experiment], which, max_results=PAGE, order_by=order, page_token=token)
        )


def every(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """All that a search of MLflow finds, page by page. search: called with the token of the page, None for the first."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return
