"""An MLflow server that goes away in the middle: the run goes on, says so once, and nothing is lost for good."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import tracking
from flows.tracking import Tracker, TrackingConfig, connect
from ullme.artifacts import Draft, Inputs, Stage, Store
from ullme.components import Section
from ullme.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Server:
    """A real MLflow server that can be stopped and started again with its database."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder)]
        log = (self.folder / "server.log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
        log.close()
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.3)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.chdir(tmp_path)
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


class Nothing(Section):
    """An empty section."""


def trained(store: Store) -> object:
    """An artifact with a training's history."""

    def write(section: Nothing, inputs: Inputs, draft: Draft) -> None:
        (draft.path / "weights").write_text("w")
        (draft.path / "logs").mkdir()
        rows = [json.dumps({"step": step, "loss": 3.0 - step}) for step in (1, 2)]
        (draft.path / "logs" / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    return store.produce(Stage("train", "model", 1, write), Nothing(), {}, seed=0)


@pytest.mark.slow
def test_a_server_that_goes_away_costs_records_and_not_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, store = TrackingConfig(uri=server.uri, experiment="away"), Store(tmp_path / "store")
    ref = trained(store)
    with caplog.at_level(logging.WARNING, "flows.tracking"), Tracker.start(config, store.root, "first") as tracker:
        with tracker.stage("data", {"source": "x"}) as stage:
            stage.finish(ref, seconds=1.0, reused=True)
        server.kill()
        with tracker.stage("train", {"steps": 2}) as stage:
            stage.finish(ref, seconds=2.0, reused=False)
        tracker.scores({"ndcg": 0.5})
    told = [record.getMessage() for record in caplog.records if "MLflow does not answer" in record.getMessage()]
    assert len(told) == 1
    assert "\n" not in told[0]
    assert "the run goes on" in told[0]
    with pytest.raises(ConfigError, match=r"tracking\.uri: http://127\.0\.0\.1:\d+ cannot be used"):
        connect(server.uri)

    server.start()
    monkeypatch.setattr(tracking, "SILENT_S", 0.0)
    with Tracker.start(config, store.root, "second") as tracker, tracker.stage("train", {"steps": 2}) as stage:
        stage.finish(ref, seconds=0.1, reused=True)
    client = connect(server.uri)
    history = client.get_metric_history(stage.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


def test_the_history_of_an_artifact_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path)
    ref = trained(store)
    with Tracker.start(TrackingConfig(), store.root, "first") as tracker, tracker.stage("train", {}) as made:
        made.finish(ref, seconds=1.0, reused=False)
    with Tracker.start(TrackingConfig(), store.root, "second") as tracker, tracker.stage("train", {}) as again:
        again.finish(ref, seconds=0.1, reused=True)
    client = connect(TrackingConfig().address(store.root))
    assert len(client.get_metric_history(made.run_id, "loss")) == 2
    assert client.get_metric_history(again.run_id, "loss") == []
    assert client.get_run(again.run_id).data.tags["reused"] == "true"


@pytest.mark.slow
def test_a_run_whose_server_goes_away_in_the_middle_keeps_everything_and_is_released_by_the_next(
    server: Server, tmp_path: Path, plain_config: Mapping[str, Any]
) -> None:
    training = {**plain_config["training"], "phases": [{**plain_config["training"]["phases"][0], "steps": 60}]}
    config = {**plain_config, "training": training, "store": str(tmp_path / "store"), "tracking": {"uri": server.uri}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "flows", "train-and-index", "--config", str(file)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "COV_"))}
    env = {**kept, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1"}

    log = tmp_path / "first.log"
    with log.open("w") as handle:
        run = subprocess.Popen(command, env=env, stdout=handle, stderr=subprocess.STDOUT, cwd=tmp_path)
        deadline = time.monotonic() + 180
        while "train: step 2/" not in log.read_text() and run.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        server.kill()
        assert run.wait(300) == 1
    told = log.read_text()
    assert "Traceback" not in told
    away = [line for line in told.splitlines() if "MLflow does not answer" in line]
    assert len(away) == 1, told[-3000:]
    assert "the run goes on" in away[0]
    last = told.strip().splitlines()[-1]
    assert "stage promote failed: tracking.uri" in last, told[-3000:]
    assert "bring it back and run the same command" in last

    server.start()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "released: ullme version 1" in done.stdout
    stages = [line.split() for line in done.stdout.splitlines() if " reused " in line or " ran " in line]
    assert [words[0] for words in stages if "ran" in words and words[0] != "plan:"] == ["promote"], done.stdout[-3000:]
