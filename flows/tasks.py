"""Prefect tasks: launch stages, read back their references, hand them to tracking. Only JSON crosses them, nothing is cached.

The store is the one truth about what is done, so Prefect's own cache is off (`NO_CACHE`).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.child import run_stages
from flows.config import RunConfig
from flows.limits import LimitsConfig
from flows.liveness import alive, alone, one_training, outlive_readers
from flows.locks import OWN_LINE
from flows.pipeline import Model, Pipeline, Planned, names
from flows.promotion import Promotion, promote
from flows.registry import Registry
from flows.report import page_rows, plot, summarise
from flows.retriever import Release
from flows.stage import StageRequest
from flows.tracking import Tracker
from ullme.artifacts import ArtifactRef, now
from ullme.errors import ConfigError, StageFailed

__all__ = ["Producer", "launch", "nothing_new", "producing", "release", "run_name"]


@task(name="stage", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def launch(
    label: str,  # noqa: ARG001 - names the task run
    store: str,
    requests: list[dict[str, Any]],
    limits: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run stages in one child process, within limits (the plain form of a `LimitsConfig`); returns [{ref, seconds}]."""
    log = get_run_logger()
    bounds = LimitsConfig.model_validate(limits or {})
    stages = [StageRequest.model_validate(request) for request in requests]
    trains = any(stage.stage == "train" for stage in stages)
    with one_training(Path(store)) if trains else contextlib.nullcontext():
        made = run_stages(Path(store), stages, lambda line: log.info("%s", line, extra=OWN_LINE), limits=bounds)
    return [{"ref": ref.model_dump(mode="json"), "seconds": seconds} for ref, seconds in made]


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def release(made: dict[str, Any], reports: dict[str, str], tracking: dict[str, Any]) -> dict[str, Any]:
    """Register model and index together; make them the champion if they are better.

    tracking: config, store, rule, pinned, run_id.
    """
    from flows.promotion import PromotionConfig
    from flows.tracking import TrackingConfig

    config = TrackingConfig.model_validate(tracking["config"])
    try:
        registry = Registry.at(config, Path(tracking["store"]))
    except ConfigError as error:  # it answered when the run began
        what = f"{error}; everything that was made is in the store: bring it back and run the same command"
        raise StageFailed("promote", 1, (), cause="MlflowException", message=what) from error
    promotion = promote(
        registry,
        Release.model_validate(made),
        {name: Path(uri) for name, uri in reports.items()},
        rule=PromotionConfig.model_validate(tracking["rule"]),
        pinned=tracking["pinned"],
        run_id=tracking["run_id"],
    )
    return promotion.model_dump(mode="json")


def run_name() -> str:
    """`SmolLM2-135M-Instruct pydocs 2026-01-31 14:03`, of the flow that is running."""
    given = flow_run.parameters["config"]
    config = given if isinstance(given, RunConfig) else RunConfig.model_validate(given)
    model = Path(config.backbone.model.replace(":", "/")).name.split(".")[0]
    return f"{model} {config.data.source.kind} {time.strftime('%Y-%m-%d %H:%M')}"


def nothing_new(config: RunConfig) -> str:
    """One line where a refresh would change nothing, else empty.

    Raises:
        ArtifactError: nothing is released.
    """
    config = config.resolved()
    registry = Registry.at(config.tracking, config.store)
    pipeline = Pipeline(config, registry.usable_champion(), model="champion")
    champion = registry.champion()
    if champion is None or not pipeline.nothing_new():
        return ""
    return f"nothing new: {champion.name} version {champion.number} (champion) holds these documents already, nothing was run"


@contextlib.contextmanager
def producing(config: RunConfig, *, model: Model = "trained", until: str = "promote") -> Iterator[Producer]:
    """The producer of a run's artifacts, with its plan announced; its MLflow run ends with the block.

    Raises:
        ConfigError, DataError: the backbone, the data or the tracking server is not there.
        ArtifactError: the champion's model is asked for, and there is none.
    """
    started = time.monotonic()
    outlive_readers()
    with alive(config.store), alone(config.store):
        config = config.resolved()
        champion = Registry.at(config.tracking, config.store).usable_champion()
        pipeline = Pipeline(config, champion, model=model, until=until)
        with Tracker.start(config.tracking, config.store, run_name()) as tracker:
            tracker.parameters(config.as_json())
            produce = Producer(pipeline, tracker, started)
            produce.announce(Pipeline(config, champion, model=model, until=until).plan())
            yield produce


class Producer:
    """Makes the artifacts of a pipeline, stage by stage: what is there is verified and reused, the rest is launched."""

    def __init__(self, pipeline: Pipeline, tracker: Tracker, started: float) -> None:
        """started: when, by `time.monotonic()`."""
        self.pipeline, self._tracker, self._started = pipeline, tracker, started
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
            if name in self.stages:
                continue
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

    def model(self) -> None:
        """Make the model and what it learns from, in rounds of mining and training.

        BM25 is measured first: an evaluation that cannot be done is better known before the training.
        """
        learning = [name for name, step in self.pipeline.steps.items() if step.stage in ("mine", "train")]
        self("data", "evaluate bm25", "backbone", "synthesise", *learning[:1])
        for name in learning[1:]:
            self(name)

    def _launch(self, missing: Sequence[str]) -> None:
        pipeline = self.pipeline
        requests = [pipeline.request(name) for name in missing]
        with contextlib.ExitStack() as stack:
            runs = [
                stack.enter_context(self._tracker.stage(request.label, request.section, history=self._history(request)))
                for request in requests
            ]
            label = ", ".join(missing)
            began = now()
            plain = [request.model_dump(mode="json") for request in requests]
            found = launch(label, str(pipeline.store.root), plain, pipeline.config.limits.model_dump(mode="json"))
            for name, entry, run in zip(missing, found, runs, strict=True):
                ref = ArtifactRef.model_validate(entry["ref"])
                reused = pipeline.store.manifest(ref)["created"] < began  # the inputs came out as they had been before
                self._done(name, ref, entry["seconds"], reused=reused)
                run.finish(ref, seconds=entry["seconds"], reused=reused)

    def _done(self, name: str, ref: ArtifactRef, seconds: float, *, reused: bool) -> None:
        self.pipeline.made[name] = ref
        if name == "data":
            self._tracker.data(ref)
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

    def released(self, promotion: Promotion) -> dict[str, Any]:
        """The summary of a run that released something; its scores and plots go to the run's pages."""
        summary = summarise(self.pipeline, self.stages, promotion, seconds=time.monotonic() - self._started)
        self._tracker.scores(_flat_scores(summary["scores"]))
        with tempfile.TemporaryDirectory(prefix="ullme-") as folder:
            plot(Path(folder), summary, self.pipeline.made[self.pipeline.released_model])
            self._tracker.files(Path(folder))
        create_table_artifact(page_rows(summary), key="scores", description="Base, tuned and BM25: metric by metric")
        return summary

    def finished(self) -> dict[str, Any]:
        """The summary of a run that stopped before a release: its stages, and the scores as far as measured."""
        scores = {system: ref.meta["scores"] for system, ref in self.pipeline.reports().items()}
        self._tracker.scores(_flat_scores(scores))
        return {
            "stages": self.stages,
            "scores": scores,
            "counts": {name: ref.meta for name, ref in self.pipeline.made.items() if name in self.stages},
            "store": str(self.pipeline.config.store),
            "seconds": round(time.monotonic() - self._started, 1),
        }


def _flat_scores(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Scores under flat names: `tuned/retrieval/ndcg_at_10`."""
    return {
        f"{system}/{task}/{metric}": value
        for system, tasks in scores.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }


def _plain(planned: Planned) -> dict[str, Any]:
    return planned.step.section.model_dump(mode="json", serialize_as_any=True)
