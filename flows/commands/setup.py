"""`ullme setup`: what a Prefect profile and its server need once. `ullme worker`: what runs the deployments."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.commands.options import complain

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = ["POOL", "setup_command", "worker_command"]

POOL = "ullme"
"""Work pool of the deployments in prefect.yaml."""
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Where a server should keep who holds which slot. In memory, its default, a restart forgets it: slots stay taken, and
deployed flows that run at that moment are ended."""
NO_SERVER = """no Prefect server: PREFECT_API_URL is not set. `ullme run` needs none, deployments do:
  prefect server start
  prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"""


def setup_command() -> int:
    """Prepare the Prefect profile in use and its server. May be repeated.

    Turns `prefect run` on everywhere, and lets a server of this profile remember who holds which slot when it is started
    anew. On the server that PREFECT_API_URL names, makes the work pool of the deployments and the limit of training.
    """
    from prefect.settings import PREFECT_API_URL, update_current_profile

    update_current_profile({"PREFECT_PLUGINS_ENABLED": True, "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES})
    print("profile: `prefect run` is on in every folder; a server of this profile keeps its leases on disk")
    if not (address := PREFECT_API_URL.value()):
        print(f"{NO_SERVER}\nand then, for the work pool and the limit of training: ullme setup")
        return 0
    with _server(address) as client:
        return _prepare(client, address)


def worker_command() -> int:
    """Clear what killed runs left behind, then run the deployments of prefect.yaml until it is ended.

    Becomes `prefect worker start --pool ullme`. Let systemd or the like start it again whenever it ends.
    """
    from prefect.settings import PREFECT_API_URL

    from flows.liveness import clear, findings, worker_name

    if not (address := PREFECT_API_URL.value()):
        complain(NO_SERVER)
        return 2
    with _server(address):
        for line in clear(findings()):
            print(line)
    # Prefect's own word on what it does is wanted here
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"}
    command = ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", worker_name()]
    sys.stdout.flush()
    return os.execve(sys.executable, [sys.executable, *command], environment)


@contextlib.contextmanager
def _server(address: str) -> Iterator[SyncPrefectClient]:
    """A client of the server in use.

    Raises:
        UllmeError: it does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client

    from ullme.errors import UllmeError

    try:
        with get_client(sync_client=True) as client:
            client.hello()
            yield client
    except httpx.TransportError as error:
        raise UllmeError(
            f"the Prefect server at {address} does not answer ({error}); `prefect server start` starts one, "
            "`prefect config unset PREFECT_API_URL` does without"
        ) from error


def _prepare(client: SyncPrefectClient, address: str) -> int:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    from flows.liveness import TRAINING_LIMIT, require_limit

    try:
        pool, made = client.read_work_pool(POOL), "is there"
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        made = "is made"
    if pool.type != "process":
        complain(f"work pool {POOL}: expected type process, got {pool.type}; delete it (`prefect work-pool delete {POOL}`)")
        return 1
    print(f"{address}: work pool {POOL} {made}")
    limit = "is made: one training at a time" if require_limit(client) else "is there"
    print(f"{address}: concurrency limit {TRAINING_LIMIT} {limit}")
    if client.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"].endswith(".memory"):
        print(
            f"{address}: keeps its leases in memory. Start it again with this profile, or with\n"
            f"  PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={LEASES}\n"
            "so that a later restart of it ends no running flow and leaves no slot taken"
        )
    return 0
