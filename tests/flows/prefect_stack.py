"""A real Prefect: server, work pool, deployments and process worker, each in processes of their own and on a home of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 3
"""Other tests run beside."""
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
QUICK = {
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}
"""Prefect looks every second where it would every fifteen."""


def until(what: Callable[[], Any], *, timeout: float, message: Callable[[], str] = lambda: "it did not come") -> Any:
    """The first true value of `what`, asked for again and again. timeout: seconds on a machine that does nothing else."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not (found := what()):
        assert time.monotonic() < deadline, f"after {timeout:.0f} s: {message()}"
        time.sleep(0.2)
    return found


class PrefectStack:
    """Everything that a deployment needs, in a folder. `project` is where `prefect deploy` is called, with prefect.yaml in it."""

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.folder, self.project, self.home = folder, folder / "project", folder / "prefect"
        (self.project / "configs").mkdir(parents=True)
        self.home.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "COV_", "ULLME_"))}
        self.env = {
            **mine,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **QUICK,
            **(settings or {}),
        }
        self.client = httpx.Client(
            base_url=self.env["PREFECT_API_URL"], timeout=90
        )  # while its database is busy the server answers after a minute
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    # Processes

    def start_server(self) -> Self:
        """`ullme setup`, for the profile, and a server of this profile."""
        assert self.command("ullme", "setup", env={"PREFECT_API_URL": ""}).returncode == 0
        self.server = self._start("server", ["prefect", "server", "start", "--port", str(self.port), "--no-ui"])
        until(self._healthy, timeout=120, message=lambda: self.log("server"))
        return self

    def start_worker(self, *command: str) -> Self:
        """`ullme worker`, or another command that becomes a worker of the pool."""
        self.worker = self._start("worker", command or ["ullme", "worker"])
        until(lambda: "started!" in self.log("worker"), timeout=60, message=lambda: self.log("worker"))
        return self

    def stop_server(self) -> None:
        self._end(self.server, signal.SIGTERM)

    def kill_server(self) -> None:
        self._end(self.server, signal.SIGKILL)

    def stop_worker(self) -> None:
        self._end(self.worker, signal.SIGTERM)

    def kill_worker(self) -> None:
        """The worker alone; what it launched lives on."""
        self._end(self.worker, signal.SIGKILL)

    def engine(self, run_id: str) -> psutil.Process:
        """The process of a flow run that a worker launched."""
        return until(lambda: self._of_run(run_id, "prefect.engine"), timeout=180, message=lambda: self._situation(run_id))

    def stage(self, run_id: str) -> psutil.Process:
        """The process of the stage that a flow run is at."""
        return until(lambda: self._of_run(run_id, "flows.stage"), timeout=180, message=lambda: self._situation(run_id))

    def processes(self) -> list[psutil.Process]:
        """Every process of this stack that lives."""
        return [process for process, env in _environments() if env.get("PREFECT_HOME") == str(self.home)]

    def close(self) -> None:
        """End every process. The worker first, so that nothing starts another."""
        self.client.close()
        for process in (self.worker, self.server):
            self._end(process, signal.SIGTERM)
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        until(lambda: not self.processes(), timeout=20, message=lambda: str(self.processes()))

    # Commands

    def command(self, *words: str, timeout: float = 180, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in the project to its end."""
        return subprocess.run(
            words,
            cwd=self.project,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE * timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def deploy(self, config: Mapping[str, Any], *, cron: str | None = None) -> str:
        """`ullme setup` and `prefect deploy --all` of the repository's prefect.yaml for this configuration; what was printed.

        cron: of every schedule; None: nothing runs by itself.
        """
        (self.project / "configs" / "tiny.yaml").write_text(yaml.safe_dump(dict(config)))
        text = (ROOT / "prefect.yaml").read_text().replace("configs/quickstart.yaml", "configs/tiny.yaml")
        plan = yaml.safe_load(text)
        for deployment in plan["deployments"]:
            for schedule in deployment["schedules"]:
                schedule |= {"cron": cron or schedule["cron"], "active": cron is not None}
        (self.project / "prefect.yaml").write_text(yaml.safe_dump(plan))
        printed = ""
        for words in (["ullme", "setup"], ["prefect", "deploy", "--all"]):
            done = self.command(*words)
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout
        return printed

    # The API

    def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.ask(method, path, body)
        assert answer.is_success, f"{answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The server's answer. It says 503 while its database is busy; asked again, as Prefect's own client does."""
        for _ in range(20):
            answer = self.client.request(method, path, json=body)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        return answer

    def deployment(self, name: str) -> dict[str, Any]:
        """`flow/deployment`."""
        return self.call("GET", f"/deployments/name/{name}")

    def trigger(self, name: str, **parameters: Any) -> str:
        """Queue a run of a deployment; its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.call("POST", path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"]

    def run(self, run_id: str) -> dict[str, Any]:
        return self.call("GET", f"/flow_runs/{run_id}")

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Every run of a deployment, in the order in which they were to start."""
        chosen = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        return self.call("POST", "/flow_runs/filter", chosen)

    def wait(self, run_id: str, *states: str, timeout: float = 180) -> dict[str, Any]:
        """The run, as soon as its state has one of these types or names; without any, as soon as it has ended."""

        def reached() -> dict[str, Any] | None:
            run = self.run(run_id)
            return run if {run["state"]["type"], run["state"]["name"]} & set(states or FINAL) else None

        return until(reached, timeout=timeout, message=lambda: self._situation(run_id))

    def states(self, run_id: str) -> list[str]:
        """Names of the states that a run went through, in order."""
        states = self.call("GET", f"/flow_run_states/?flow_run_id={run_id}")
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def lines(self, run_id: str) -> list[str]:
        """What the run wrote to its page."""
        chosen = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return [entry["message"] for entry in self.call("POST", "/logs/filter", chosen)]

    def slots(self) -> dict[str, int]:
        """Taken slots of every limit that has some."""
        limits = self.call("POST", "/v2/concurrency_limits/filter", {})
        return {limit["name"]: limit["active_slots"] for limit in limits if limit["active_slots"]}

    def log(self, name: str) -> str:
        """What the server or the worker printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # Inside

    def _situation(self, run_id: str) -> str:
        """The states of a run, and the ends of the logs: what one looks at when nothing comes."""
        return f"{self.states(run_id)}\nworker: {self.log('worker')[-3000:]}\nserver: {self.log('server')[-1500:]}"

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.project,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
        if process is not None and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _healthy(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, self.log("server")
        try:
            return self.client.get("/health").is_success
        except httpx.TransportError:
            return False

    def _of_run(self, run_id: str, module: str) -> psutil.Process | None:
        for process, env in _environments():
            if env.get("PREFECT__FLOW_RUN_ID") == run_id:
                with contextlib.suppress(psutil.Error, OSError):
                    if module in process.cmdline():
                        return process
        return None


def _environments() -> list[tuple[psutil.Process, dict[str, str]]]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, process.environ()))
    return found
