"""Who is alive: locks that a killed process does not keep; what dead runs left behind is found and cleared, on a real server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect_stack import BIN, PrefectStack, until

from flows import liveness, locks
from flows.liveness import DeadRun, HeldSlot, OrphanedServer, clear, findings
from flows.locks import Record
from ullme.errors import UllmeError

WEEKLY = "train-and-index/weekly-train-and-index"
HOLD = """
import sys, time
from pathlib import Path
from flows import locks
with locks.held(locks.Record(run_id="r", name="night", flow="refresh"), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
COME_AND_GO = """
import sys
from pathlib import Path
from flows import locks
for number in range(400):
    with locks.held(locks.Record(run_id="r", attempt=number), Path(sys.argv[1])):
        pass
"""
TAKE_TURN = """
import sys, time, logging
from pathlib import Path
from flows import locks
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with locks.turn(Path(sys.argv[1])):
    print("my turn", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def child(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_record_belongs_to_its_process_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with child(HOLD, str(path)) as process:
        assert line(process) == "held"
        with locks.claimed(path) as record:
            assert record is None
        process.kill()
        process.wait()
        with locks.claimed(path) as record:
            assert record == Record(run_id="r", name="night", flow="refresh")
            with locks.claimed(path) as again:
                assert again is None  # who clears it is alone


def test_a_living_run_is_never_taken_for_a_dead_one_while_it_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    seen = 0
    with child(COME_AND_GO, str(path)) as process:
        while process.poll() is None:
            seen += path.exists()
            with locks.claimed(path) as record:
                assert record is None
    assert process.returncode == 0
    assert seen > 10
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_a_crash_cut_short_still_tells_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_text('{"run_id": "a')
    with locks.claimed(tmp_path / "abc.json") as record:
        assert record == Record(run_id="abc")


def test_a_second_run_of_a_store_waits_says_for_whom_and_goes_on_when_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "run"
    with child(TAKE_TURN, str(path)) as first:
        assert line(first) == "my turn"
        with child(TAKE_TURN, str(path)) as second:
            assert line(second) == f"waiting for process {first.pid} on {os.uname().nodename}; both use {tmp_path}"
            time.sleep(0.5)
            assert second.poll() is None
            first.kill()
            assert line(second) == "my turn"


def test_a_temporary_server_is_ended_once_its_owner_is_gone_and_not_before() -> None:
    sleep = "import time; time.sleep(600)"
    with (
        child(sleep) as owner,
        child(sleep, "prefect.server.api.server:create_app", env={"ULLME_OWNER": str(owner.pid)}) as server,
    ):

        def orphaned() -> list[OrphanedServer]:
            return [found for found in liveness._orphans() if found.pid == server.pid]

        until(lambda: "create_app" in " ".join(psutil.Process(server.pid).cmdline()), timeout=10)
        assert orphaned() == []
        owner.kill()  # and not reaped: a zombie owns nothing
        found = until(orphaned, timeout=10)
        assert clear(found) == [f"cleared: a temporary Prefect server (process {server.pid}) whose run is gone"]
        assert not psutil.pid_exists(server.pid)
        assert clear(found) == []


# On a real server


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, plain_config: Mapping[str, Any]) -> Iterator[PrefectStack]:
    """A server and deployments of a training that takes minutes, unless it is killed."""
    stack = PrefectStack(tmp_path_factory.mktemp("liveness"))
    phase = {**plain_config["training"]["phases"][0], "steps": 20_000}
    try:
        stack.start_server()
        stack.deploy({**plain_config, "store": ".store", "training": {**plain_config["training"], "phases": [phase]}})
        yield stack
    finally:
        stack.close()


@pytest.fixture
def here(stack: PrefectStack) -> Iterator[PrefectStack]:
    """The server, as the one that this process uses; no run is unfinished afterwards."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: stack.env["PREFECT_API_URL"]}):
        yield stack
    for run in stack.call("POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}):
        stack.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def running(stack: PrefectStack, store: Path, *, starts: int = 1, attempt: int = 1) -> tuple[str, Path]:
    """A run that Prefect takes for running and has started so often, and its record of an attempt, which nobody holds."""
    flow = stack.call("POST", "/flows/", {"name": "refresh"})["id"]
    run_id = stack.call("POST", "/flow_runs/", {"flow_id": flow, "name": "night", "parameters": {"config": "c.yaml"}})["id"]
    for _ in range(starts):
        for state in ("RUNNING",) if starts == 1 else ("SCHEDULED", "RUNNING"):
            stack.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": state}, "force": True})
    assert stack.run(run_id)["run_count"] == starts
    path = locks.folder(store) / f"{run_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    api = stack.env["PREFECT_API_URL"]
    path.write_text(
        Record(run_id=run_id, name="night", flow="refresh", pid=7, host="h", api=api, attempt=attempt).model_dump_json()
    )
    return run_id, path


@pytest.mark.slow
def test_a_dead_run_is_set_to_crashed_and_a_living_one_is_left_alone(here: PrefectStack, tmp_path: Path) -> None:
    dead, _ = running(here, tmp_path)
    living, path = running(here, tmp_path)
    with locks.held(locks.read(path), path):
        found = findings(tmp_path)
        assert [str(finding) for finding in found] == ["refresh 'night' (process 7 on h) is dead, and Prefect still says Running"]
        assert clear(found) == ["cleared: refresh 'night' (process 7 on h) was killed; Prefect said Running, now Crashed"]
        assert here.run(dead)["state"]["name"] == "Crashed"
        assert here.run(dead)["state"]["message"] == "process 7 on h was killed"
        assert here.run(living)["state"]["name"] == "Running"
        assert clear(found) == []
        assert findings(tmp_path) == []


@pytest.mark.slow
def test_a_run_that_was_started_again_since_is_left_alone_and_only_the_old_record_goes(here: PrefectStack, tmp_path: Path) -> None:
    run_id, path = running(here, tmp_path, starts=2, attempt=1)
    assert clear(findings(tmp_path)) == ["cleared: refresh 'night' (process 7 on h) was killed"]
    assert here.run(run_id)["state"]["name"] == "Running"
    assert not path.exists()


@pytest.mark.slow
def test_a_dead_run_gives_back_the_slot_of_its_lease_and_no_other(here: PrefectStack, tmp_path: Path) -> None:
    here.call("PATCH", "/v2/concurrency_limits/ullme-training", {"limit": 2})
    take = {"names": ["ullme-training"], "slots": 1, "lease_duration": 600}
    leases = [here.call("POST", "/v2/concurrency_limits/increment-with-lease", take)["lease_id"] for _ in range(2)]
    _, path = running(here, tmp_path)
    path.with_suffix(".lease").write_text(leases[0])
    assert len(clear(findings(tmp_path))) == 1
    assert here.slots() == {"ullme-training": 1}
    assert list(path.parent.iterdir()) == []
    here.call("POST", "/v2/concurrency_limits/decrement-with-lease", {"lease_id": leases[1]})
    assert here.slots() == {}
    here.call("PATCH", "/v2/concurrency_limits/ullme-training", {"limit": 1})


@pytest.mark.slow
def test_a_slot_that_the_server_forgot_is_given_back_once_nobody_can_hold_it(
    here: PrefectStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, path = running(here, tmp_path)
    here.call("PATCH", "/v2/concurrency_limits/ullme-training", {"active_slots": 1})
    with locks.held(locks.read(path), path):
        assert findings(tmp_path) == []
    here.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "COMPLETED"}, "force": True})
    assert findings(tmp_path) == []  # its lease may yet end by itself
    monkeypatch.setattr(liveness, "WAIT_S", -1)  # as if that were long ago
    assert findings(tmp_path) == [HeldSlot(1)]
    assert clear([HeldSlot(1), HeldSlot(1)]) == ["cleared: 1 of ullme-training taken, and no run is unfinished"]
    assert here.slots() == {}


def test_a_server_that_does_not_answer_is_one_line() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(UllmeError, match=r"9/api does not answer"):
        findings()


@pytest.mark.slow
def test_killed_with_its_worker_a_run_blocks_nothing_once_the_worker_is_back_and_without_it_it_goes_on(
    here: PrefectStack,
) -> None:
    stack = here.start_worker()
    first = stack.trigger(WEEKLY)
    trains(stack, first)
    engine, stage = stack.engine(first), stack.stage(first)
    assert set(stack.slots().values()) == {1}
    assert len(stack.slots()) == 2  # of the deployment, and of training
    stack.kill_worker()
    engine.kill()
    second = stack.trigger(WEEKLY)
    stack.start_worker()
    assert stack.run(first)["state"]["name"] == "Crashed"
    until(lambda: not stage.is_running(), timeout=10)
    stack.wait(second, "RUNNING", timeout=40)
    trains(stack, second)
    assert any(line.startswith("cleared: train-and-index") for line in stack.lines(second))
    assert stack.run(first)["state"]["name"] == "Crashed"

    # the worker alone: the run goes on, and the new worker starts no second one beside it
    engine = stack.engine(second)
    stack.kill_worker()
    stack.start_worker()
    time.sleep(5)
    assert stack.stage(second).is_running()
    assert [run["state"]["name"] for run in stack.runs(WEEKLY)] == ["Crashed", "Running"]
    assert findings() == []

    # then the run, which no worker watches any more
    engine.kill()
    found = until(findings, timeout=10)
    assert [finding.record.run_id for finding in found if isinstance(finding, DeadRun)] == [second]
    assert len(clear(found)) == 1
    assert stack.run(second)["state"]["name"] == "Crashed"
    stack.stop_worker()


def trains(stack: PrefectStack, run_id: str) -> None:
    until(lambda: any("train: step" in line for line in stack.lines(run_id)), timeout=120, message=lambda: stack.log("worker"))


@pytest.mark.slow
def test_without_a_server_the_next_run_clears_what_a_killed_one_left(stack: PrefectStack, tmp_path: Path) -> None:
    env = {**stack.env, "PREFECT_API_URL": "", "PREFECT_HOME": str(tmp_path / "home")}
    command = [str(BIN / "ullme"), "run", "train", "--config", "configs/tiny.yaml", "--set", f"store={tmp_path}/store"]
    command += ["--set", "training.phases.0.steps=300"]
    output = tmp_path / "output"
    with output.open("w") as log, subprocess.Popen(command, cwd=stack.project, env=env, stdout=log, stderr=log) as run:
        until(lambda: "train: step 2/" in output.read_text(), timeout=120, message=output.read_text)
        run.kill()

    def servers() -> list[psutil.Process]:
        return [process for process in processes(tmp_path / "home") if any("create_app" in word for word in process.cmdline())]

    assert len(servers()) == 1
    done = subprocess.run(command, cwd=stack.project, env=env, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    cleared = [text for text in done.stdout.splitlines() if text.startswith("cleared")]
    assert len(cleared) == 2, done.stdout
    assert cleared[0].endswith("was killed; Prefect said Running, now Crashed")
    assert cleared[1].endswith("whose run is gone")
    assert servers() == []
    assert list((tmp_path / "store" / "work" / "runs").iterdir()) == []


def processes(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PREFECT_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
