"""Locks of runs, held by the operating system, and the record of a run: whose process it is.

<store>/work/runs/<flow run>.json     flock: held by the run's process while it lives
<store>/work/runs/<flow run>.lease    the lease of a Prefect slot that the run holds
<store>/locks/run                     flock: one run of a store at a time
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["OWN_LINE", "Record", "api", "claimed", "folder", "held", "lease_of", "read", "say", "this_run", "turn"]

logger = logging.getLogger(__name__)

OWN_LINE = {"ullme": True}
"""Marks a log record as ours: the terminal shows these and leaves out what Prefect says about itself."""


class Record(BaseModel):
    """Who runs. created: start of the process, in seconds since 1970; api: of the Prefect server, empty for a temporary one;
    attempt: Prefect counts how often a flow run was started."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str = ""
    flow: str = ""
    pid: int = 0
    host: str = ""
    created: float = 0.0
    api: str = ""
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.flow} '{self.name}' (process {self.pid} on {self.host})"


def api() -> str:
    """Address of the Prefect server in use; empty where Prefect starts a temporary one."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url or ""


def this_run() -> Record | None:
    """The record of the flow that is running in this context, if one is."""
    from prefect.runtime import flow_run

    if not flow_run.id:
        return None
    return Record(
        run_id=str(flow_run.id),
        name=flow_run.name or "",
        flow=flow_run.flow_name or "",
        pid=os.getpid(),
        host=socket.gethostname(),
        created=psutil.Process().create_time(),
        api=api(),
        attempt=flow_run.run_count,
    )


def folder(store: Path) -> Path:
    """Where the records of a store's runs lie."""
    return Path(store).expanduser().resolve() / "work" / "runs"


def lease_of(record: Path | None) -> Path | None:
    """Where the run of a record wrote which lease it holds, if it holds one."""
    lease = record.with_suffix(".lease") if record else None
    return lease if lease and lease.is_file() else None


def read(path: Path) -> Record:
    """What is written there; of a file that a crash cut short only whose it is."""
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return Record(run_id=path.stem)


@contextlib.contextmanager
def held(record: Record, path: Path) -> Iterator[None]:
    """Hold a record while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # locked before it has its name: nobody takes it for a dead one
    with partial.open("w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(record.model_dump_json())
        handle.flush()
        partial.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Record | None]:
    """A dead run's record, locked so that nobody else clears it; None where its run lives or it is gone."""
    try:
        handle = path.open("r+", encoding="utf-8")
    except FileNotFoundError:
        yield None
        return
    with handle:
        yield read(path) if _lock(handle) and os.fstat(handle.fileno()).st_nlink else None


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs, waiting for it first; whoever holds it stands in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as handle:
        if not _lock(handle):
            handle.seek(0)
            say(f"waiting for {handle.read() or 'another run'}; both use {path.parent.parent}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(str(this_run() or f"process {os.getpid()} on {socket.gethostname()}"))
        handle.flush()
        yield


def say(line: str) -> None:
    """A line for the terminal and for the run's page."""
    from prefect import get_run_logger
    from prefect.exceptions import MissingContextError

    try:
        get_run_logger().info("%s", line, extra=OWN_LINE)
    except MissingContextError:
        logger.info("%s", line)


def _lock(handle: IO[Any]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
