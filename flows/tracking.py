"""MLflow: a run per pipeline, a child run per stage, live metrics, data sets and plots.

mlflow is imported when a run starts, never before a configuration is found to be right.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ullme.artifacts import ArtifactRef
from ullme.components import Section
from ullme.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["StageRun", "Tracker", "TrackingConfig", "connect", "quiet"]

logger = logging.getLogger(__name__)

POLL_S = 2.0
PARAMETERS_PER_CALL, METRICS_PER_CALL = 90, 900
PARAMETER_CHARACTERS = 5_000


class TrackingConfig(Section):
    """Where runs are recorded and under which name model and index are released.

    uri: of an MLflow server or database; empty means SQLite inside the store, artifacts beside it.
    """

    uri: str = ""
    experiment: str = Field(default="ullme", min_length=1)
    model_name: str = Field(default="ullme", min_length=1, pattern=r"^[^/:]+$")

    def address(self, store: Path) -> str:
        """The URI, with the default filled in."""
        return self.uri or f"sqlite:///{store / 'mlflow.db'}"


class StageRun:
    """The MLflow run of one stage."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self.run_id = client, run_id
        self._forwarded = 0
        self._lock = threading.Lock()

    def finish(self, ref: ArtifactRef, *, seconds: float, reused: bool) -> None:
        """Record what came of it, and the rest of a training's history from the artifact."""
        if not reused:
            self.forward(ref.path / "logs" / "metrics.jsonl")
        numbers = {"seconds": seconds, **_numbers(ref.meta)}
        _log(self._client, self.run_id, metrics=[(name, value, 0) for name, value in numbers.items()])
        for name, value in {"artifact": str(ref), "digest": ref.digest, "uri": ref.uri, "reused": str(reused).lower()}.items():
            self._client.set_tag(self.run_id, name, value)

    def forward(self, file: Path) -> None:
        """Log the rows of a JSON lines file that were not logged yet: every finite number under its name, by `step`."""
        with self._lock:
            rows = _rows(file)
            if not rows:
                return  # not there yet, or gone: the stage has finished
            if len(rows) < self._forwarded:
                self._forwarded = 0  # the stage started over
            values = [
                (name, value, int(row["step"]))
                for row in rows[self._forwarded :]
                for name, value in _numbers(row).items()
                if name != "step"
            ]
            _log(self._client, self.run_id, metrics=values)
            self._forwarded = len(rows)


class Tracker:
    """The MLflow run of one pipeline. Use as a context manager; an exception marks the run as failed."""

    def __init__(self, client: MlflowClient, experiment_id: str, name: str) -> None:
        """Use `Tracker.start`."""
        self._client, self._experiment = client, experiment_id
        self.run_id: str = client.create_run(experiment_id, run_name=name).info.run_id

    @classmethod
    def start(cls, config: TrackingConfig, store: Path, name: str) -> Tracker:
        """Begin a run.

        Raises:
            ConfigError: the tracking server or database cannot be used.
        """
        from mlflow.exceptions import MlflowException

        client = connect(config.address(store))
        try:
            found = client.get_experiment_by_name(config.experiment)
            if found is not None:
                return cls(client, found.experiment_id, name)
            place = None if config.uri else (store / "mlartifacts").as_uri()
            return cls(client, client.create_experiment(config.experiment, artifact_location=place), name)
        except MlflowException as error:
            raise ConfigError(f"tracking.uri: {config.address(store)} cannot be used ({str(error).splitlines()[0]})") from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        _terminate(self._client, self.run_id, "FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def parameters(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration: flat parameters, and a YAML file."""
        import yaml

        flat = list(_flat(values))
        _log(self._client, self.run_id, params=flat)
        self._client.log_text(self.run_id, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), "config.yaml")

    def data(self, ref: ArtifactRef) -> None:
        """The data set that everything follows from, with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(_numbers(ref.meta))
        dataset = Dataset(
            name=str(ref), digest=ref.digest[:32], source_type="local", source=json.dumps({"uri": ref.uri}), profile=profile
        )
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "data")])])

    @contextlib.contextmanager
    def stage(self, name: str, section: Mapping[str, Any], *, history: Path | None = None) -> Iterator[StageRun]:
        """The child run of a stage. Rows appended to the JSON lines file `history` are forwarded while it lasts."""
        tags = {"mlflow.parentRunId": self.run_id}
        run = StageRun(self._client, self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id)
        _log(self._client, run.run_id, params=list(_flat(section)))
        status = "FAILED"
        try:
            with _forwarded(history, run) if history else contextlib.nullcontext():
                yield run
            status = "FINISHED"
        except Exception:
            raise
        except BaseException:
            status = "KILLED"
            raise
        finally:
            _terminate(self._client, run.run_id, status)

    def scores(self, values: Mapping[str, float]) -> None:
        """Final numbers of the pipeline's run."""
        _log(self._client, self.run_id, metrics=[(name, value, 0) for name, value in values.items()])

    def files(self, folder: Path) -> None:
        """Log every file of a folder."""
        self._client.log_artifacts(self.run_id, str(folder))


@contextlib.contextmanager
def _forwarded(file: Path, run: StageRun) -> Iterator[None]:
    """Forward what is appended to `file`. Trouble with the server loses live metrics, never the training."""
    stop = threading.Event()

    def forward() -> None:
        while not stop.wait(POLL_S):
            try:
                run.forward(file)
            except Exception as error:
                logger.warning("metrics are not forwarded: %s", str(error).splitlines()[0])

    thread = threading.Thread(target=forward, name="forward metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def _terminate(client: MlflowClient, run_id: str, status: str) -> None:
    """Close a run. Where MLflow cannot be written any more, that must not hide why the run ended."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_terminated(run_id, status)
    except MlflowException as error:
        logger.warning("the run's status %s could not be recorded: %s", status, str(error).splitlines()[0])


def _rows(file: Path) -> list[dict[str, Any]]:
    """Complete rows of a JSON lines file that is being written."""
    if not file.is_file():
        return []
    with contextlib.suppress(OSError):
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    return []


def connect(uri: str) -> MlflowClient:
    """A client of a tracking server or database that answers.

    Raises:
        ConfigError: it does not.
    """
    with quiet():
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)  # opens the database, or asks the server
        except (MlflowException, OSError) as error:
            raise ConfigError(f"tracking.uri: {uri} cannot be used ({str(error).splitlines()[0]})") from error
    return client


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """mlflow and alembic tell of every table they make and every model they log; only warnings are for people."""
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)  # mlflow configures its own loggers while it is imported


def _log(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Sequence[tuple[str, float, int]] = (),
    params: Sequence[tuple[str, str]] = (),
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    for start in range(0, len(params), PARAMETERS_PER_CALL):
        batch = [Param(name, value) for name, value in params[start : start + PARAMETERS_PER_CALL]]
        client.log_batch(run_id, params=batch)
    for start in range(0, len(metrics), METRICS_PER_CALL):
        batch = [Metric(name, value, now, step) for name, value, step in metrics[start : start + METRICS_PER_CALL]]
        client.log_batch(run_id, metrics=batch)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    entries = values.items() if isinstance(values, Mapping) else enumerate(values)
    for name, value in entries:
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping | list | tuple) and value:
            yield from _flat(value, path)
        else:
            yield path, str(value)[:PARAMETER_CHARACTERS]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
