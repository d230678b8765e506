"""MLflow: a run per pipeline, a child run per stage, live metrics, data sets and plots.

mlflow is imported when a run starts, never before a configuration is found to be right.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from ullme.artifacts import ArtifactRef
from ullme.components import Section
from ullme.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["HOST", "STORE", "StageRun", "Tracker", "TrackingConfig", "connect", "quiet"]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

HOST, STORE = "host", "store"
"""Tags of a pipeline's run: the machine and the store it runs on, for whoever looks whether it still does."""
POLL_S = 2.0
SILENT_S = 60.0
"""After MLflow did not answer, nothing is reported to it for this long: each attempt may wait for its retries."""
PARAMETERS_PER_CALL, METRICS_PER_CALL = 90, 900
PARAMETER_CHARACTERS = 5_000


class TrackingConfig(Section):
    """Where runs are recorded and under which name model and index are released.

    uri: of an MLflow server or database; empty means SQLite inside the store, artifacts beside it. description: what readers should
    know of these releases; it stands in the registry beside every version, and at the end of a run.
    """

    uri: str = ""
    experiment: str = Field(default="ullme", min_length=1)
    model_name: str = Field(default="ullme", min_length=1, pattern=r"^[^/:]+$")
    description: str = ""

    def address(self, store: Path) -> str:
        """The URI, with the default filled in."""
        return self.uri or f"sqlite:///{store / 'mlflow.db'}"


class Link:
    """The way to MLflow. A server that is away loses what it would have recorded meanwhile, never the run that reports to it."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self._silent_until = 0.0

    def attempt(self, what: Callable[[MlflowClient], Answer]) -> Answer | None:
        """The answer, or None where there is none; after a failure nothing is tried for a while."""
        from mlflow.exceptions import MlflowException

        if time.monotonic() < self._silent_until:
            return None
        try:
            return what(self.client)
        except (MlflowException, OSError) as error:
            logger.warning(
                "MLflow does not answer (%s); the run goes on, and its records miss what happens until it does", first_line(error)
            )
            self._silent_until = time.monotonic() + SILENT_S
            return None


class StageRun:
    """The MLflow run of one stage."""

    def __init__(self, link: Link, experiment_id: str, name: str, tags: Mapping[str, str]) -> None:
        self._link = link
        made = link.attempt(lambda client: client.create_run(experiment_id, run_name=name, tags=dict(tags)))
        self.run_id = made.info.run_id if made else ""
        self._experiment = experiment_id
        self._forwarded = 0
        self._lock = threading.Lock()

    def parameters(self, section: Mapping[str, Any]) -> None:
        """The section that the stage was given."""
        self._log(params=list(_flat(section)))

    def finish(self, ref: ArtifactRef, *, seconds: float, reused: bool) -> None:
        """Record what came of it, and the rest of a training's history from the artifact.

        The history of an artifact that is reused is recorded where no run has done so: MLflow was away when it was made.
        """
        history = ref.path / "logs" / "metrics.jsonl"
        if history.is_file() and not (reused and self._recorded(ref)):
            self.forward(history)
        numbers = {"seconds": seconds, **_numbers(ref.meta)}
        self._log(metrics=[(name, value, 0) for name, value in numbers.items()])
        for name, value in {"artifact": str(ref), "digest": ref.digest, "uri": ref.uri, "reused": str(reused).lower()}.items():
            self._attempt(lambda client, name=name, value=value: client.set_tag(self.run_id, name, value))

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
            if self._log(metrics=values):
                self._forwarded = len(rows)

    def close(self, status: str) -> None:
        """End the run."""
        self._attempt(lambda client: client.set_terminated(self.run_id, status))

    def _recorded(self, ref: ArtifactRef) -> bool:
        made_by = f"tags.artifact = '{ref}' and tags.reused = 'false'"
        found = self._attempt(lambda client: client.search_runs([self._experiment], made_by, max_results=1))
        return found is None or len(found) > 0

    def _log(self, *, metrics: Sequence[tuple[str, float, int]] = (), params: Sequence[tuple[str, str]] = ()) -> bool:
        return self._attempt(lambda client: _log(client, self.run_id, metrics=metrics, params=params)) is not None

    def _attempt(self, what: Callable[[MlflowClient], Answer]) -> Answer | None:
        return self._link.attempt(what) if self.run_id else None


class Tracker:
    """The MLflow run of one pipeline. Use as a context manager; an exception marks the run as failed."""

    def __init__(self, client: MlflowClient, experiment_id: str, name: str, store: Path) -> None:
        """Use `Tracker.start`."""
        self._link, self._experiment = Link(client), experiment_id
        made = client.create_run(experiment_id, run_name=name, tags={HOST: socket.gethostname(), STORE: str(store)})
        self.run_id: str = made.info.run_id

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
                return cls(client, found.experiment_id, name, store)
            place = None if config.uri else (store / "mlartifacts").as_uri()
            return cls(client, client.create_experiment(config.experiment, artifact_location=place), name, store)
        except MlflowException as error:
            raise ConfigError(f"tracking.uri: {config.address(store)} cannot be used ({first_line(error)})") from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self._link.attempt(lambda client: client.set_terminated(self.run_id, status))

    def parameters(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration: flat parameters, and a YAML file."""
        import yaml

        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        self._link.attempt(lambda client: _log(client, self.run_id, params=list(_flat(values))))
        self._link.attempt(lambda client: client.log_text(self.run_id, text, "config.yaml"))

    def data(self, ref: ArtifactRef) -> None:
        """The data set that everything follows from, with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(_numbers(ref.meta))
        dataset = Dataset(
            name=str(ref), digest=ref.digest[:32], source_type="local", source=json.dumps({"uri": ref.uri}), profile=profile
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "data")])]
        self._link.attempt(lambda client: client.log_inputs(self.run_id, datasets=inputs))

    @contextlib.contextmanager
    def stage(self, name: str, section: Mapping[str, Any], *, history: Path | None = None) -> Iterator[StageRun]:
        """The child run of a stage. Rows appended to the JSON lines file `history` are forwarded while it lasts."""
        run = StageRun(self._link, self._experiment, name, {"mlflow.parentRunId": self.run_id})
        run.parameters(section)
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
            run.close(status)

    def scores(self, values: Mapping[str, float]) -> None:
        """Final numbers of the pipeline's run."""
        self._link.attempt(lambda client: _log(client, self.run_id, metrics=[(name, value, 0) for name, value in values.items()]))

    def files(self, folder: Path) -> None:
        """Log every file of a folder."""
        self._link.attempt(lambda client: client.log_artifacts(self.run_id, str(folder)))


@contextlib.contextmanager
def _forwarded(file: Path, run: StageRun) -> Iterator[None]:
    """Forward what is appended to `file`, every few seconds."""
    stop = threading.Event()

    def forward() -> None:
        while not stop.wait(POLL_S):
            run.forward(file)

    thread = threading.Thread(target=forward, name="forward metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


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
            raise ConfigError(f"tracking.uri: {uri} cannot be used ({first_line(error)})") from error
    return client


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """mlflow and alembic tell of every table and model, and log a traceback of what they raise; from here on, they only raise."""
    import mlflow  # noqa: F401 - it configures its loggers when it is imported

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield


def _log(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Sequence[tuple[str, float, int]] = (),
    params: Sequence[tuple[str, str]] = (),
) -> bool:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    for start in range(0, len(params), PARAMETERS_PER_CALL):
        batch = [Param(name, value) for name, value in params[start : start + PARAMETERS_PER_CALL]]
        client.log_batch(run_id, params=batch)
    for start in range(0, len(metrics), METRICS_PER_CALL):
        batch = [Metric(name, value, now, step) for name, value, step in metrics[start : start + METRICS_PER_CALL]]
        client.log_batch(run_id, metrics=batch)
    return True


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


def first_line(error: BaseException) -> str:
    """What an error says, without what mlflow and urllib3 put around it."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    reason = re.search(r"\[Errno -?\d+\] [\w ]+", line)
    return reason[0] if reason else line
