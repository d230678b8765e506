"""Prefect tasks: launch stages, read back their references, hand them to tracking. Only JSON crosses them, nothing is cached.

The store is the one truth about what is done, so Prefect's own cache is off (`NO_CACHE`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency

from flows.child import run_stages
from flows.pipeline import Pipeline, Planned, names
from flows.registry import Promotion, Registry, promote
from flows.retriever import Release
from flows.stage import StageRequest
from flows.tracking import Tracker
from ullme.artifacts import ArtifactRef

__all__ = ["TRAINING_LIMIT", "Producer", "launch", "release"]

TRAINING_LIMIT = "ullme-training"
"""Global concurrency limit around training. `ullme setup` makes it with one slot; where nobody did, training does not wait."""
OWN_LINE = {"ullme": True}
"""Marks a log record as ours: the terminal shows these and leaves out what Prefect says about itself."""


@task(name="stage", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def launch(
    label: str,  # noqa: ARG001 - names the task run
    store: str,
    requests: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run stages in one child process; returns [{ref, seconds}]."""
    log = get_run_logger()
    stages = [StageRequest.model_validate(request) for request in requests]
    trains = any(stage.stage == "train" for stage in stages)
    with concurrency(TRAINING_LIMIT, strict=False) if trains else contextlib.nullcontext():
        made = run_stages(Path(store), stages, lambda line: log.info("%s", line, extra=OWN_LINE))
    return [{"ref": ref.model_dump(mode="json"), "seconds": seconds} for ref, seconds in made]


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def release(made: dict[str, Any], reports: dict[str, str], tracking: dict[str, Any]) -> dict[str, Any]:
    """Register model and index together; make them the champion if they are better.

    tracking: config, store, rule, pinned, run_id.
    """
    from flows.registry import PromotionConfig
    from flows.tracking import TrackingConfig

    registry = Registry.at(TrackingConfig.model_validate(tracking["config"]), Path(tracking["store"]))
    promotion = promote(
        registry,
        Release.model_validate(made),
        {name: Path(uri) for name, uri in reports.items()},
        rule=PromotionConfig.model_validate(tracking["rule"]),
        pinned=tracking["pinned"],
        run_id=tracking["run_id"],
    )
    return promotion.model_dump(mode="json")


class Producer:
    """Makes the artifacts of a pipeline, stage by stage: what is there is verified and reused, the rest is launched."""

    def __init__(self, pipeline: Pipeline, tracker: Tracker) -> None:
        self.pipeline, self._tracker = pipeline, tracker
        self.stages: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        """A line for the terminal and for the run's page."""
        get_run_logger().info("%s", f"{time.strftime('%H:%M:%S')} {line}", extra=OWN_LINE)

    def announce(self, plan: Sequence[Planned]) -> None:
        """The plan, on the terminal and on the run's page."""
        width = names(plan)
        for planned in plan:
            self.say(f"plan: {planned.step.name:<{width}}  {planned}")
        rows = "\n".join(f"| {planned.step.name} | {planned} |" for planned in plan)
        create_markdown_artifact(
            f"# Plan\n\n| step | |\n|---|---|\n{rows}\n", key="plan", description="What this run would reuse and run"
        )

    def __call__(self, *stages: str) -> None:
        """Make every step of these stages. Those that have to run share one child process."""
        missing = []
        for name in self.pipeline.named(*stages):
            started = time.monotonic()
            planned = self.pipeline.planned(name)
            if planned.ref is None:
                missing.append(name)
            else:
                with self._tracker.stage(name, _plain(planned)) as run:
                    self._done(name, planned.ref, time.monotonic() - started, reused=True)
                    run.finish(planned.ref, seconds=self.stages[name]["seconds"], reused=True)
                self.say(f"{name}: reused {planned.ref}")
        if missing:
            self._launch(missing)

    def _launch(self, missing: Sequence[str]) -> None:
        pipeline = self.pipeline
        requests = [pipeline.request(name) for name in missing]
        with contextlib.ExitStack() as stack:
            runs = [
                stack.enter_context(self._tracker.stage(request.label, request.section, history=self._history(request)))
                for request in requests
            ]
            label = ", ".join(missing)
            found = launch(label, str(pipeline.store.root), [request.model_dump(mode="json") for request in requests])
            for name, entry, run in zip(missing, found, runs, strict=True):
                ref = ArtifactRef.model_validate(entry["ref"])
                self._done(name, ref, entry["seconds"], reused=False)
                run.finish(ref, seconds=entry["seconds"], reused=False)

    def _done(self, name: str, ref: ArtifactRef, seconds: float, *, reused: bool) -> None:
        self.pipeline.made[name] = ref
        self.stages[name] = {"status": "reused" if reused else "ran", "seconds": round(seconds, 2), "artifact": str(ref)}

    def _history(self, request: StageRequest) -> Path | None:
        """Where a training stage appends its metrics while it runs."""
        root = self.pipeline.store.root
        return root / "work" / f"model-{request.key}" / "scratch" / "metrics.jsonl" if request.stage == "train" else None

    def promote(self) -> Promotion:
        """Release what was made."""
        started = time.monotonic()
        config = self.pipeline.config
        settings = {
            "config": config.tracking.model_dump(mode="json"),
            "store": str(config.store),
            "rule": config.promotion.model_copy(update={"task": config.decisive_task}).model_dump(mode="json"),
            "pinned": config.pinned,
            "run_id": self._tracker.run_id,
        }
        reports = {name: ref.uri for name, ref in self.pipeline.reports().items()}
        with self._tracker.stage("promote", settings["rule"]):
            promotion = Promotion.model_validate(release(self.pipeline.release().model_dump(mode="json"), reports, settings))
        status = "ran" if promotion.created or promotion.promoted else "reused"
        self.stages["promote"] = {
            "status": status,
            "seconds": round(time.monotonic() - started, 2),
            "artifact": f"{promotion.name} version {promotion.version}",
        }
        return promotion


def show_scores(rows: list[dict[str, Any]]) -> None:
    """The table of scores on the run's page."""
    create_table_artifact(rows, key="scores", description="Base, tuned and BM25: metric by metric")


def _plain(planned: Planned) -> dict[str, Any]:
    return planned.step.section.model_dump(mode="json", serialize_as_any=True)
