"""`ullme gc`: delete what nothing in the store needs any more."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from flows.commands.options import OptionalConfig, Overrides, release_place
from flows.commands.table import aligned
from ullme.disk import as_size
from ullme.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from flows.garbage import Entry, Keep, Needed
    from flows.tracking import TrackingConfig
    from ullme.artifacts import Store

__all__ = ["gc_command"]

MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400
AT_LEAST_0 = validators.Number(gte=0)


def gc_command(
    *,
    config: OptionalConfig = None,
    set_: Overrides = None,
    runs: Annotated[int, Parameter(validator=AT_LEAST_0, help="How many of the last runs keep what they made or used.")] = 3,
    champions: Annotated[
        int, Parameter(validator=AT_LEAST_0, help="How many former champions are kept beside the versions that hold an alias.")
    ] = 2,
    work_days: Annotated[
        float, Parameter(validator=AT_LEAST_0, help="After how many days a half-written folder is not resumed any more.")
    ] = 7,
    delete: Annotated[bool, Parameter(negative=(), help="Delete; without this, only say what would go.")] = False,
) -> int:
    """List what the store keeps and why, and what nothing needs; delete that with --delete.

    Kept are the versions that hold an alias, the last champions, what the last runs made or used, and what these were made
    from. Nothing is deleted while a pipeline runs on the store.
    """
    from flows.garbage import Keep
    from ullme.artifacts import Store

    root, tracking = release_place(config, set_ or (), None)
    store = Store(root)
    with _alone(store):
        return _collect(store, tracking, Keep(runs, champions, work_days), delete=delete)


def _collect(store: Store, tracking: TrackingConfig, keep: Keep, *, delete: bool) -> int:
    from flows.garbage import remove, survey

    needed = _needed(store, tracking, keep)
    found = survey(store, needed, work_days=keep.work_days)
    if found.garbage and not needed.why:
        raise ConfigError(
            f"neither the registry nor the recorded runs of {tracking.address(store.root)} know anything of {store.root}, so "
            "everything in it would go; name the --config of its runs"
        )
    _show_kept(found.kept, found.waiting)
    if not found.garbage:
        print(f"nothing to delete in {store.root}")
        return 0
    total = _bytes(found.garbage)
    print(f"\n{'deleting' if delete else 'would be deleted'}: {_folders(len(found.garbage))}, {as_size(total)}")
    lines = aligned([_cells(entry) for entry in found.garbage], right=(1, 2))
    left = 0
    for entry, line in zip(found.garbage, lines, strict=True):
        if delete and not remove(store, entry):
            left += entry.bytes
            line += "; not deleted, a process is writing it now"
        print(f"  {line}", flush=True)
    if delete:
        print(f"freed {as_size(total - left)}; {as_size(store.disk.free_bytes)} are free on the disk of {store.root}")
    else:
        print(f"nothing was deleted; --delete frees {as_size(total)}")
    return 0


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """No pipeline runs on the store while the block lasts: one that starts meanwhile waits.

    Raises:
        ArtifactError: one is running.
    """
    from flows.garbage import RUN_LOCK, held

    holder = store.root / "locks" / RUN_LOCK
    with held(store, RUN_LOCK) as free:
        if not free:
            who = holder.read_text(encoding="utf-8") or "a pipeline"
            raise ArtifactError(f"{who} is running on {store.root}; run gc when it has ended")
        holder.write_text(f"gc (process {os.getpid()} on {socket.gethostname()})", encoding="utf-8")
        yield


def _needed(store: Store, tracking: TrackingConfig, keep: Keep) -> Needed:
    """Of every name and experiment, not only the configuration's: several may share a store."""
    from flows.garbage import Needed
    from flows.registry import Registry
    from flows.runs import Runs

    needed = Needed(store)
    registry = Registry.at(tracking, store.root)
    for name in registry.names():
        needed.versions(registry.named(name).versions(), champions=keep.champions)
    needed.runs(Runs.at(tracking, store.root).latest(keep.runs, holds=lambda name: (store.root / name).is_dir()))
    return needed


def _show_kept(kept: Sequence[Entry], waiting: Sequence[Entry]) -> None:
    """One line per reason."""
    whys: dict[str, list[Entry]] = {}
    for entry in (*kept, *waiting):
        whys.setdefault(entry.why, []).append(entry)
    print(f"kept: {_folders(len(kept) + len(waiting))}, {as_size(_bytes((*kept, *waiting)))}")
    rows = [[why, as_size(_bytes(entries)), ", ".join(_kinds(entry.path for entry in entries))] for why, entries in whys.items()]
    for line in aligned(rows, right=(1,)) if rows else ():
        print(f"  {line}")


def _kinds(paths: Iterable[Path]) -> list[str]:
    """`2 model`, `index`: how many of each kind."""
    kinds = [path.name.partition("-")[0] if path.parent.name == "work" else path.parent.name for path in paths]
    return [f"{kinds.count(kind)} {kind}" if kinds.count(kind) > 1 else kind for kind in dict.fromkeys(kinds)]


def _cells(entry: Entry) -> list[str]:
    return [entry.name, as_size(entry.bytes), _age(time.time() - entry.written), entry.why]


def _age(seconds: float) -> str:
    """`3 days`, of the time since something was written."""
    for size, unit in ((DAY_S, "day"), (HOUR_S, "hour"), (MINUTE_S, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)}"
    return "now"


def _folders(count: int) -> str:
    return f"{count} folder{'s' * (count != 1)}"


def _bytes(entries: Sequence[Entry]) -> int:
    return sum(entry.bytes for entry in entries)
