"""Who is alive: every run holds its record under a lock; what dead ones left behind is found, and cleared.

The locks are the operating system's (`flows.locks`), so a killed process holds none. Prefect itself notices a killed run only
through the worker that launched it. Where that was killed too, the run stays `Running` for good, and its slot of the
deployment stays taken until its lease ends, five minutes later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows import locks
from flows.locks import Record
from ullme.artifacts import write_atomic
from ullme.errors import UllmeError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from rich.console import Console

__all__ = [
    "TRAINING_LIMIT",
    "DeadRun",
    "Finding",
    "HeldSlot",
    "OrphanedServer",
    "alive",
    "alone",
    "clear",
    "findings",
    "one_training",
    "outlive_readers",
    "require_limit",
    "worker_name",
]

logger = logging.getLogger(__name__)

TRAINING_LIMIT = "ullme-training"
"""Prefect's global concurrency limit around training: one at a time on everything that shares a server."""
LEASE_S = 60
"""After so long (the least that Prefect allows) the slot of a killed training is free, should nobody clear it before."""
WAIT_S = 100
"""Longer than a slot can stay taken whose holder is dead: the lease, and the time until Prefect looks for those that ended."""
OWNER = "ULLME_OWNER"
"""Environment variable that names the process, one of `flows.cli`, to which Prefect's temporary server belongs."""


# While a run lives


@contextlib.contextmanager
def alive(store: Path) -> Iterator[None]:
    """Hold the record of the flow that is running; first clear what dead runs left behind. May stand inside itself."""
    record = locks.this_run()
    path = locks.folder(store) / f"{record.run_id}.json" if record else None
    if record is None or path is None or locks.read(path) == record:
        yield
        return
    try:
        for line in clear(findings(store)):
            locks.say(line)
    except Exception as error:  # a run is not given up because another one could not be tidied away
        logger.warning("what dead runs left behind was not cleared: %s", error)
    with locks.held(record, path):
        yield


def outlive_readers() -> None:
    """Go on where nobody reads any more what this run prints: a worker that was killed leaves a broken pipe behind.

    Without this the next line to be printed would end the run (rich, which prints for Prefect, exits there).
    """
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = partial(_to_nobody, handler.console)


def _to_nobody(console: Console) -> None:
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, console.file.fileno())
    os.close(nobody)


@contextlib.contextmanager
def alone(store: Path) -> Iterator[None]:
    """One run of a store at a time, whoever started it: the next one waits, and says for whom."""
    with locks.turn(Path(store).expanduser().resolve() / "locks" / "run"):
        yield


@contextlib.contextmanager
def one_training(store: Path) -> Iterator[None]:
    """One training at a time: on everything that shares a Prefect server or, without one, on everything of this Prefect home.

    A temporary server cannot keep a slot: whoever holds it is forgotten with the server. There the operating system's lock
    stands in.
    """
    from prefect.concurrency.sync import concurrency
    from prefect.settings import get_current_settings

    if not locks.api():
        with locks.turn(get_current_settings().home / "locks" / TRAINING_LIMIT):
            yield
        return
    with _client() as client:
        require_limit(client)
    record = locks.this_run()
    lease = locks.folder(store) / f"{record.run_id}.lease" if record else None
    with contextlib.ExitStack() as stack:
        while True:
            # an API that is away for a minute is no reason to end a training that takes hours
            slot = concurrency(
                TRAINING_LIMIT, lease_duration=LEASE_S, strict=True, timeout_seconds=WAIT_S, raise_on_lease_renewal_failure=False
            )
            try:
                stack.enter_context(slot)
                break
            except TimeoutError:
                for line in [f"waiting for a slot of {TRAINING_LIMIT}", *clear(findings())]:
                    locks.say(line)
        if lease is not None and (held := _lease()):
            write_atomic(lease, held)
            stack.callback(lease.unlink, missing_ok=True)
        yield


def require_limit(client: SyncPrefectClient) -> bool:
    """Make the limit of training where it is missing; whether it was. Its number of slots is the user's to change."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(TRAINING_LIMIT)
    except ObjectNotFound:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=TRAINING_LIMIT, limit=1))
        return True
    return False


def worker_name() -> str:
    """Name of the worker that this process becomes. Prefect writes it beside each run that the worker launches."""
    return f"ullme {socket.gethostname()} {os.getpid()}"


# What dead ones left


@dataclass(frozen=True)
class DeadRun:
    """A run whose process is gone. path: of its record, if it came to write one; state: what Prefect says, empty: nothing."""

    record: Record
    path: Path | None
    state: str

    def __str__(self) -> str:
        return f"{self.record} is dead" + (f", and Prefect still says {self.state}" if self.state else "")

    def clear(self) -> str:
        """Set it to Crashed, give its slots back, remove its record."""
        from prefect.states import Crashed

        with contextlib.ExitStack() as stack:
            if self.path is not None and stack.enter_context(locks.claimed(self.path)) is None:
                return ""  # somebody else has cleared it, or it lives again
            lease = locks.lease_of(self.path)
            if self.state or lease:
                client = stack.enter_context(_client(self.record.api))
                if run := _unfinished(client, self.record):
                    message = f"process {self.record.pid} on {self.record.host} was killed"
                    client.set_flow_run_state(run.id, Crashed(message=message), force=True)  # gives the deployment's slot back
                if lease:
                    client.release_concurrency_slots_with_lease(UUID(lease.read_text(encoding="utf-8")))
                    lease.unlink(missing_ok=True)
            if self.path is not None:
                self.path.unlink(missing_ok=True)
        return f"cleared: {self.record} was killed" + (f"; Prefect said {self.state}, now Crashed" if self.state else "")


@dataclass(frozen=True)
class HeldSlot:
    """Slots of the limit of training that nobody can hold, since no run is unfinished or ended just now: the server forgot whose
    they were, as one does that keeps its leases in memory and is started anew."""

    slots: int

    def __str__(self) -> str:
        return f"{self.slots} of {TRAINING_LIMIT} taken, and no run is unfinished"

    def clear(self) -> str:
        """Give them back, unless that is done by now."""
        from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

        with _client() as client:
            if not client.read_global_concurrency_limit_by_name(TRAINING_LIMIT).active_slots:
                return ""
            client.update_global_concurrency_limit(TRAINING_LIMIT, GlobalConcurrencyLimitUpdate(active_slots=0))
        return f"cleared: {self}"


@dataclass(frozen=True)
class OrphanedServer:
    """A temporary Prefect server whose run is gone. created: its start, in seconds since 1970."""

    pid: int
    created: float

    def __str__(self) -> str:
        return f"a temporary Prefect server (process {self.pid}) whose run is gone"

    def clear(self) -> str:
        """End it: politely, then for certain."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.created:
                return ""
            process.terminate()
            try:
                process.wait(5)
            except psutil.TimeoutExpired:
                process.kill()
        except psutil.NoSuchProcess:
            return ""
        return f"cleared: {self}"


Finding = DeadRun | HeldSlot | OrphanedServer


def findings(store: Path | None = None) -> list[Finding]:
    """What dead runs left: of this store, on the Prefect server in use, and on this machine.

    Raises:
        UllmeError: the Prefect server does not answer.
    """
    import httpx

    try:
        dead = _dead(store) if store is not None else []
        return [*dead, *_on_server(dead), *_orphans()]
    except httpx.TransportError as error:
        raise UllmeError(
            f"the Prefect server at {locks.api()} does not answer ({error}); start it, or unset PREFECT_API_URL to run without one"
        ) from error


def clear(found: Sequence[Finding]) -> list[str]:
    """Clear them in order; returns a line for each that was. Whatever lives again by now is left alone."""
    return [line for finding in found if (line := finding.clear())]


def _dead(store: Path) -> list[DeadRun]:
    """Runs of a store whose record nobody holds."""
    found = []
    for path in sorted(locks.folder(store).glob("*.json")):
        with locks.claimed(path) as record:
            if record is None:
                continue
            state = ""
            if record.api or not locks.api():  # what a temporary server thinks does not matter to the server in use
                with _client(record.api) as client:
                    run = _unfinished(client, record)
                    state = run.state_name or "" if run else ""
            found.append(DeadRun(record, path, state))
    return found


def _on_server(dead: Sequence[DeadRun]) -> list[Finding]:
    """Runs that a dead worker of ours launched on this machine and that live no more, and slots that nobody can hold."""
    from prefect.exceptions import ObjectNotFound

    if not locks.api():
        return []
    known = {finding.record.run_id for finding in dead}
    with _client() as client:
        unfinished = _runs(client, state={"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}})
        living = _command_lines()
        found: list[Finding] = [
            DeadRun(record, None, run.state_name or "Running")
            for run in unfinished
            if str(run.id) not in known and (record := _lost(run, living))
        ]
        me = locks.this_run()
        others = [run for run in unfinished if me is None or str(run.id) != me.run_id]
        just_now = datetime.now(UTC) - timedelta(seconds=WAIT_S)  # a lease of theirs may be left, and gives the slot back itself
        if not others and not _runs(client, end_time={"after_": just_now}):
            with contextlib.suppress(ObjectNotFound):
                if slots := client.read_global_concurrency_limit_by_name(TRAINING_LIMIT).active_slots:
                    found.append(HeldSlot(slots))
    return found


def _runs(client: SyncPrefectClient, **chosen: Any) -> list[FlowRun]:
    """Runs of ours on the server, by the fields of Prefect's filter."""
    from prefect.client.schemas.filters import FlowRunFilter

    found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(chosen), limit=200)
    return [run for run in found if "config" in run.parameters]


def _lost(run: FlowRun, living: Sequence[tuple[str, str]]) -> Record | None:
    """The record of a run that a worker of ours launched on this machine, if neither of the two lives any more.

    living: command line and flow run, if any, of each process.
    """
    worker = str(run.labels.get("prefect.worker.name", ""))
    name = re.fullmatch(r"ullme (\S+) (\d+)", worker)
    if name is None or name[1] != socket.gethostname():
        return None
    if any(worker in line or (run_id == str(run.id) and "prefect." in line) for line, run_id in living):
        return None
    process = run.infrastructure_pid or name[2]
    return Record(run_id=str(run.id), name=run.name, flow="run", pid=int(process), host=name[1], api=locks.api())


def _command_lines() -> list[tuple[str, str]]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((" ".join(process.cmdline()), process.environ().get("PREFECT__FLOW_RUN_ID", "")))
    return found


def _orphans() -> list[OrphanedServer]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            if "prefect.server.api.server:create_app" in process.cmdline():
                owner, created = process.environ().get(OWNER), process.create_time()
                if owner and not _lives_since(int(owner), created):
                    found.append(OrphanedServer(process.pid, created))
    return found


def _lives_since(pid: int, moment: float) -> bool:
    """Whether the process that had this number then still lives; not another that has it now."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= moment and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Prefect


def _client(api: str | None = None) -> SyncPrefectClient:
    """To the server in use, or to another one."""
    from prefect.client.orchestration import SyncPrefectClient, get_client

    return SyncPrefectClient(api) if api and api != locks.api() else get_client(sync_client=True)


def _unfinished(client: SyncPrefectClient, record: Record) -> FlowRun | None:
    """The run of a dead process, where Prefect takes it for unfinished and has not started it again since."""
    from prefect.exceptions import ObjectNotFound

    try:
        run = client.read_flow_run(UUID(record.run_id))
    except (ObjectNotFound, ValueError):
        return None
    again = record.attempt and (run.run_count != record.attempt or run.state_type in ("PENDING", "SCHEDULED"))
    return None if again or run.state is None or run.state.is_final() else run


def _lease() -> str:
    """The lease that this task holds."""
    from prefect.concurrency.context import ConcurrencyContext

    context = ConcurrencyContext.get()
    return str(context.cleanup_lease_ids[-1]) if context and context.cleanup_lease_ids else ""
