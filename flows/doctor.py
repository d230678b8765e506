"""What is wrong with an installation, a store and what Prefect and MLflow hold of it; and what of that mends itself.

Each check is one line. The checks are made one after another, so a later one sees what an earlier one has mended.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.garbage import KINDS, RECORDS, RUN_LOCK, half_written, held, is_held, size_of
from flows.machine import Loading, cores, has_nvidia_gpu, memory_bytes, package_problems, required
from flows.pipeline import Pipeline
from flows.registry import Registry
from flows.runs import PastRun, Runs
from flows.stage import STAGES
from flows.tracking import TrackingConfig
from ullme.artifacts import ArtifactRef, Store, read_manifest, set_aside
from ullme.disk import Disk, as_size
from ullme.errors import ArtifactError, ConfigError, UllmeError
from ullme.progress import Progress

if TYPE_CHECKING:
    from flows.config import RunConfig

__all__ = ["Check", "Doctor"]

State = Literal["ok", "warning", "problem"]
LARGE_STORE = 10**9
MEGABYTE = 10**6
ASIDE = ".damaged-"
SETTLED_S = 60
"""A temporary file older than this is nobody's: it has its name for milliseconds."""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what to do. mend: makes it right and says what it did, empty if it could not."""

    name: str
    state: State
    said: str
    mend: Callable[[], str] | None = None


class Doctor:
    """Looks at this machine and one store."""

    def __init__(self, store: Path, tracking: TrackingConfig, config: RunConfig | None = None) -> None:
        """config: with it, the plan's need of disk is looked at, too."""
        self.store, self._tracking, self._config = Store(store), tracking, config
        self._resumed: dict[str, str] = {}

    def checks(self) -> Iterator[Check]:
        """Every check, in order."""
        loading = Loading()
        try:
            yield Check("python", "ok", f"{platform.python_version()}, {cores()} cores, {as_size(memory_bytes())} of memory")
            yield from self.packages()
            yield from self.mlflow()
            yield from self.disk()
            yield from self.artifacts()
            yield from self.work()
            yield from self.runs()
            yield from self.released()
            yield from self.prefect()
            yield from self.libraries(loading)
        finally:
            loading.end()

    # This machine

    def packages(self) -> Iterator[Check]:
        """Whether they fit together."""
        try:
            problems = package_problems()
            count = len(required())
        except PackageNotFoundError:
            yield Check("packages", "problem", "ullme itself is not installed; pip install -c constraints.txt -e '.[cpu]'")
            return
        for problem in problems:
            yield Check("packages", "problem", problem)
        if not problems:
            yield Check("packages", "ok", f"{count} packages, each in a version that does, one faiss")

    def libraries(self, loading: Loading) -> Iterator[Check]:
        """Whether the large ones can be imported, and what they find."""
        found = loading.result()
        for name, error in found.errors.items():
            yield Check("imports", "problem", f"{name} cannot be imported ({error}); install it anew from constraints.txt")
        if not found.errors:
            yield Check("imports", "ok", ", ".join(f"{name} {version}" for name, version in found.versions.items()))
        if found.gpus:
            each = "; ".join(f"{gpu.name}, {as_size(gpu.free)} of {as_size(gpu.total)} free" for gpu in found.gpus)
            searches = f"faiss searches on {found.faiss_gpus}" if found.faiss_gpus else "faiss searches on the CPU"
            yield Check("gpu", "ok", f"{each}; {searches}")
        elif has_nvidia_gpu():
            version = found.versions.get("torch", "")
            yield Check("gpu", "warning", f"there is one, but torch {version} cannot use it; install the CUDA build of torch")
        else:
            yield Check("gpu", "ok", "none; everything runs on the CPU")

    def disk(self) -> Iterator[Check]:
        """What it has, against what the plan writes."""
        disk = Disk(self.store.root, self._config.limits.reserve_bytes if self._config is not None else None)
        free, reserve = disk.free_bytes, disk.reserve_bytes
        told = f"{as_size(free)} free at {self.store.root}"
        if self._config is None:
            short = free <= reserve
            yield Check("disk", "problem" if short else "ok", told + ("; `ullme gc` says what can go" if short else ""))
            return
        from flows.limits import estimate

        try:
            registry, _ = self._registry
            champion = registry.usable_champion() if registry is not None else None
            pipeline = Pipeline(self._config.resolved(), champion)
            plan = pipeline.plan()
        except UllmeError as error:
            yield Check("plan", "problem", str(error).splitlines()[0])
            return
        self.store = pipeline.store  # it has verified what the plan reuses
        self._resumed = _keys(pipeline)
        needed = estimate(pipeline, plan)
        known = {name: size for name, size in needed.items() if size is not None}
        total = sum(known.values())
        writes = f"train-and-index writes up to {as_size(total)} for {', '.join(known) or 'what can be told'}"
        if len(needed) > len(known):
            writes += f", more for {len(needed) - len(known)} later steps"
        if not needed:
            yield Check("disk", "ok", f"{told}; train-and-index has nothing left to make")
        elif total > free - reserve:
            said = f"{told}, of which {as_size(reserve)} stay in reserve; {writes}; `ullme gc` says what can go"
            yield Check("disk", "problem", said)
        else:
            yield Check("disk", "ok", f"{told}; {writes}")

    # The store

    def artifacts(self) -> Iterator[Check]:
        """Every file of every artifact, and what does not belong there."""
        folders = self._folders()
        finished = [path for path in folders if ASIDE not in path.name and (path / "manifest.json").is_file()]
        sizes = {path: size_of(path) for path in finished}
        total, damaged = sum(sizes.values()), 0
        progress = Progress(total // MEGABYTE, "verify", unit="MB") if total > LARGE_STORE else None
        for path in finished:
            error = self._error_of(path)
            if progress is not None:
                progress.advance(sizes[path] // MEGABYTE)
            if error:
                damaged += 1
                yield Check("store", "problem", error, partial(self._set_aside, path))
        if progress is not None:
            progress.__exit__(None, None, None)
        if not damaged:
            yield Check("store", "ok", f"{len(finished)} artifacts, {as_size(total)}, every file as it was written")
        for path in folders:
            if ASIDE not in path.name and path not in sizes:
                what = "is not finished: its deletion was interrupted, `ullme gc --delete` ends it" if path.is_dir() else ""
                yield Check("store", "warning", f"{_short(path)} {what or 'does not belong there; move it away'}")
        if aside := [path for path in self._folders() if ASIDE in path.name]:  # also what was only now
            size = as_size(sum(size_of(path) for path in aside))
            yield Check("store", "warning", f"{len(aside)} damaged, set aside, {size}; `ullme gc --delete` removes them")

    def _folders(self) -> list[Path]:
        return [path for kind in KINDS for path in sorted((self.store.root / kind).glob("*"))]

    def _error_of(self, path: Path) -> str:
        """What is wrong with an artifact, or empty."""
        try:
            manifest = read_manifest(path)
            self.store.open(ArtifactRef(kind=path.parent.name, uri=str(path), digest=manifest["digest"]))
        except ArtifactError as error:
            return str(error)
        return ""

    def _set_aside(self, path: Path) -> str:
        with held(self.store, f"{path.parent.name}-{path.name}") as free:
            if not free:
                return ""
            return f"{_short(path)} is set aside as {set_aside(path).name}; the next run makes it anew"

    def work(self) -> Iterator[Check]:
        """What was interrupted."""
        for entry in half_written(self.store):
            size = as_size(entry.bytes)
            if entry.why:
                yield Check("work", "ok", f"{entry.path.name} {entry.why}, {size} so far")
            elif entry.path.name.endswith(".deleted"):
                yield Check("work", "warning", f"{entry.path.name}: its deletion was interrupted, `ullme gc --delete` ends it")
            else:
                who = self._resumed.get(entry.path.name, "")
                by = f"the next run of this configuration goes on with it ({who})" if who else "the same command goes on with it"
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.written))
                yield Check("work", "warning", f"{entry.path.name}, {size}, was interrupted at {when}; {by}")
        for path in self._temporary():
            yield Check("work", "problem", f"{path} was never finished and has no use", partial(_unlink, path))

    def _temporary(self) -> list[Path]:
        """Files that a killed process was about to give their names."""
        root = self.store.root
        found = [*root.glob("*.partial"), *(root / "work" / RECORDS).glob("*.[0-9]*")]
        found += [path for kind in KINDS for path in (root / kind).rglob("*.partial")]
        return sorted(path for path in found if path.is_file() and time.time() - path.stat().st_mtime > SETTLED_S)

    # Runs and releases

    @cached_property
    def _registry(self) -> tuple[Registry | None, str]:
        """What can be reached, if anything was ever recorded; else why not."""
        if not self._tracking.uri and not (self.store.root / "mlflow.db").is_file():
            return None, ""
        try:
            return Registry.at(self._tracking, self.store.root), ""
        except ConfigError as error:
            return None, str(error)

    def mlflow(self) -> Iterator[Check]:
        """Whether it can be reached. What it holds is looked at later."""
        registry, error = self._registry
        if error:
            yield Check("mlflow", "problem", error)
        elif registry is None:
            yield Check("mlflow", "ok", f"nothing was recorded in {self.store.root} yet")
        else:
            yield Check("mlflow", "ok", f"{self._tracking.address(self.store.root)} answers")

    def runs(self) -> Iterator[Check]:
        """What killed runs left behind, here, in Prefect and in MLflow."""
        from flows.liveness import clear, findings

        running = self._running()
        if running:
            yield Check("runs", "ok", f"{running} is running on this store")
        found = []
        try:
            for finding in findings(self.store.root):
                found.append(Check("runs", "problem", str(finding), lambda finding=finding: "; ".join(clear([finding]))))
        except UllmeError as error:
            found.append(Check("runs", "problem", str(error)))
        if self._registry[0] is not None:
            runs = Runs.at(self._tracking, self.store.root)
            for run in self._dead(runs, bool(running)):
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
                said = f"MLflow still says RUNNING of '{run.name}' of {when}, whose process is gone"
                found.append(Check("runs", "problem", said, partial(_kill, runs, run)))
        yield from found
        if not found and not running:
            yield Check("runs", "ok", "none is running, and no killed one left anything behind")

    def _running(self) -> str:
        """Who runs on the store now, or empty."""
        if not is_held(self.store, RUN_LOCK):
            return ""
        return (self.store.root / "locks" / RUN_LOCK).read_text(encoding="utf-8") or "a pipeline"

    def _dead(self, runs: Runs, running: bool) -> list[PastRun]:
        """One runs at a time on a store: if one does now, it is the newest."""
        unfinished = sorted(runs.unfinished(self.store.root), key=lambda run: run.started)
        return unfinished[:-1] if running else unfinished

    def released(self) -> Iterator[Check]:
        """Whether the champion can be opened, all of it."""
        registry, _ = self._registry
        if registry is None:
            return
        try:
            champion = registry.champion()
            if champion is None:
                yield Check("release", "ok", f"no version of '{registry.name}' is the champion yet")
                return
            release = champion.release
            for kind in ("model", "index", "data"):
                self.store.open(getattr(release, kind), kind)
            card = json.loads((release.index.path / "index.json").read_text(encoding="utf-8"))
        except ArtifactError as error:
            said = f"the champion cannot be opened: {error}; `ullme rollback` goes back to the one before"
            yield Check("release", "problem", said)
            return
        named = f"{champion.name} version {champion.number}"
        if card["fingerprint"] != release.model.digest:
            yield Check("release", "problem", f"{named}: its index was made with another model; `ullme rollback` goes back")
        elif champion.withdrawn:
            yield Check(
                "release", "warning", f"{named} is the champion, and withdrawn: `ullme rollback` was interrupted; repeat it"
            )
        else:
            yield Check("release", "ok", f"{named} is the champion; model, index and data belong together")

    # Prefect

    def prefect(self) -> Iterator[Check]:
        """The plugin, and the server where there is one."""
        from prefect.cli._app import _app
        from prefect.settings import get_current_settings

        on = "run" in _app
        yield Check(
            "prefect",
            "ok" if on else "warning",
            "`prefect run` is on here" if on else "`prefect run` is off in this folder; `ullme setup` turns it on everywhere",
        )
        address = get_current_settings().api.url
        if not address:
            yield Check(
                "prefect", "ok", "no server: every run starts one for itself; deployments need PREFECT_API_URL and `ullme setup`"
            )
            return
        yield from _server(address)


def _server(address: str) -> Iterator[Check]:
    """What deployments need of a Prefect server."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.commands.setup import POOL
    from flows.liveness import TRAINING_LIMIT

    wanted = {
        f"work pool {POOL}": lambda client: client.read_work_pool(POOL),
        f"concurrency limit {TRAINING_LIMIT}": lambda client: client.read_global_concurrency_limit_by_name(TRAINING_LIMIT),
    }
    missing = []
    try:
        with get_client(sync_client=True) as client:
            client.hello()
            for what, read in wanted.items():
                try:
                    read(client)
                except ObjectNotFound:
                    missing.append(what)
            leases = client.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"]
    except httpx.TransportError as error:
        yield Check("prefect", "problem", f"{address} does not answer ({error}); start it, or unset PREFECT_API_URL")
        return
    for what in missing:
        yield Check("prefect", "warning", f"{address} has no {what}; `ullme setup` makes it")
    forgets = leases.endswith(".memory")
    if forgets:
        yield Check(
            "prefect", "warning", f"{address}, once restarted, forgets who holds which slot; `ullme setup` says how it does not"
        )
    if not missing and not forgets:
        yield Check("prefect", "ok", f"{address} answers and has {' and '.join(wanted)}")


def _keys(pipeline: Pipeline) -> dict[str, str]:
    """Folder in `work/` -> name of the step that would go on with it, as far as can be told."""
    found = {}
    for name, step in pipeline.steps.items():
        if name not in pipeline.made and all(source in pipeline.made for source in step.inputs.values()):
            found[f"{STAGES[step.stage].stage.kind}-{pipeline.request(name).key}"] = name
    return found


def _kill(runs: Runs, run: PastRun) -> str:
    runs.kill(run)
    return f"MLflow: '{run.name}' is marked as KILLED"


def _unlink(path: Path) -> str:
    path.unlink(missing_ok=True)
    return f"removed {path}"


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
