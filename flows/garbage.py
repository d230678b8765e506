"""What of a store is needed, and what nothing needs any more.

Needed is what the registry's aliases point at, the last versions that were in use, what the last pipelines made or used, and
what these were made from. Of former versions the embeddings are left out: an index does not need the vectors that it was
built from, and a refresh takes over those that were made last. So is a model that only was the start of a later training.

A deletion that is interrupted never leaves anything that looks finished: the manifest goes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flows.registry import Version
from flows.runs import PastRun
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store, read_manifest, sync
from ullme.errors import ArtifactError
from ullme.words import WORDS

__all__ = [
    "KINDS",
    "RUN_LOCK",
    "Entry",
    "Keep",
    "Needed",
    "Survey",
    "half_written",
    "held",
    "is_held",
    "remove",
    "size_of",
    "survey",
]

KINDS = sorted({work.stage.kind for work in STAGES.values()} | {WORDS.kind})
"""The folders of a store that hold artifacts."""
MANIFEST = "manifest.json"
DELETED = ".deleted"
RUN_LOCK = "run"
"""What a pipeline holds while it runs on a store: `flows.liveness.alone`."""
RECORDS = "runs"
"""The folder in `work/` that no stage writes: `flows.liveness` keeps there who runs."""
DAY_S = 86_400


@dataclass(frozen=True)
class Entry:
    """A folder of the store. written: when it last was, in seconds since 1970. why: it is kept, or may go."""

    path: Path
    bytes: int
    written: float
    why: str

    @property
    def name(self) -> str:
        """`kind/key`."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Keep:
    """How much is kept beside the versions that hold an alias: last runs, former champions, and days of half-written folders."""

    runs: int
    champions: int
    work_days: float


@dataclass(frozen=True)
class Survey:
    """Every folder of a store that holds an artifact, or what may become one. waiting: half-written ones that are kept."""

    kept: Sequence[Entry]
    garbage: Sequence[Entry]
    waiting: Sequence[Entry]


class Needed:
    """Which artifacts of a store are needed, by `kind/key`, each with the first reason."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.why: dict[str, str] = {}

    def versions(self, versions: Sequence[Version], *, champions: int) -> None:
        """Keep what the versions of one name that hold an alias release, and the last `champions` that were in use before.

        One that was rolled back is not needed for that.
        """
        in_use = [version for version in versions if version.aliases]
        crowned = [version for version in versions if version.crowned and not version.aliases and not version.withdrawn]
        former = sorted(crowned, key=lambda version: (version.crowned[-1]["at"], version.number))[::-1][:champions]
        for version in in_use:
            self._keep(_parts(version), f"{version.name} version {version.number} ({', '.join(version.aliases)})", embeddings=True)
        for version in former:
            self._keep(_parts(version), f"{version.name} version {version.number} (former champion)", embeddings=False)
        for version in (*in_use, *former):
            self._keep_vectors(version)

    def runs(self, runs: Sequence[PastRun]) -> None:
        """Keep what these pipelines made or used."""
        for run in runs:
            why = f"run of {time.strftime('%Y-%m-%d %H:%M', time.gmtime(run.started))}"
            self._keep(run.artifacts, why, embeddings=True)

    def reason(self, name: str) -> str | None:
        """Why an artifact is kept, or None; the words of a corpus are kept with it."""
        if name.startswith(f"{WORDS.kind}/"):
            return next((self.why[str(source)] for source in self._inputs(name) if str(source) in self.why), None)
        return self.why.get(name)

    def _keep(self, names: Sequence[str], why: str, *, embeddings: bool) -> None:
        """Keep artifacts and what they were made from; embeddings: also those."""
        waiting, seen = list(names), set()
        while waiting:
            name = waiting.pop(0)
            if name in seen or not (self._store.root / name / MANIFEST).is_file():
                continue
            seen.add(name)
            self.why.setdefault(name, why)
            waiting += [str(source) for source in self._sources(name) if embeddings or source.kind != "embeddings"]

    def _keep_vectors(self, version: Version) -> None:
        """Keep what a refresh of this version's model takes its vectors from."""
        for ref in self._store.finished("embeddings"):
            if ref.meta.get("fingerprint") == version.release.model.digest:
                self.why.setdefault(str(ref), f"{version.name} version {version.number} (vectors for the next refresh)")
                return

    def _sources(self, name: str) -> Iterator[ArtifactRef]:
        """What an artifact was made from, less a trained model that a later training started from."""
        for source in self._inputs(name):
            if not (name.startswith("model/") and source.kind == "model" and self._inputs(str(source))):
                yield source

    def _inputs(self, name: str) -> list[ArtifactRef]:
        try:
            inputs = read_manifest(self._store.root / name).get("provenance", {}).get("inputs", {})
        except ArtifactError:
            return []
        return [ArtifactRef.model_validate(source) for source in inputs.values()]


def survey(store: Store, needed: Needed, *, work_days: float) -> Survey:
    """What is kept and what may go. work_days: how long a half-written folder is kept after it was last written to."""
    kept, garbage = [], []
    for kind in KINDS:
        for path in _folders(store.root / kind):
            if ".damaged-" in path.name:
                garbage.append(_entry(path, "set aside as damaged"))
            elif not (path / MANIFEST).is_file():
                garbage.append(_entry(path, "its deletion was interrupted"))
            elif why := needed.reason(f"{kind}/{path.name}"):
                kept.append(_entry(path, why))
            else:
                garbage.append(_entry(path, "nothing needs it"))
    waiting = []
    for entry in half_written(store):
        if entry.why:
            waiting.append(entry)
        elif entry.path.name.endswith(DELETED):
            garbage.append(replace(entry, why="its deletion was interrupted"))
        elif time.time() - entry.written > work_days * DAY_S:
            garbage.append(replace(entry, why="half-written, then left"))
        else:
            waiting.append(replace(entry, why="half-written"))
    return Survey(kept, garbage, waiting)


def half_written(store: Store) -> list[Entry]:
    """What stages left in `work/`; `why` is empty unless a process is writing there now."""
    entries = []
    for path in (folder for folder in _folders(store.root / "work") if folder.name != RECORDS):
        files = [path, *path.rglob("*")]
        written = max((file.lstat().st_mtime for file in files if file.exists()), default=0.0)
        entries.append(Entry(path, size_of(path), written, "is being written" if is_held(store, _lock_of(path)) else ""))
    return entries


def remove(store: Store, entry: Entry) -> bool:
    """Delete a folder, unless a process holds its lock; the manifest goes first, a half-written folder loses its name first."""
    path = entry.path
    with held(store, _lock_of(path)) as free:
        if not free:
            return False
        if path.parent.name == "work" and not path.name.endswith(DELETED):
            deleted = path.with_name(path.name + DELETED)
            if deleted.exists():
                shutil.rmtree(deleted)
            path = path.rename(deleted)
        (path / MANIFEST).unlink(missing_ok=True)
        sync(path)
        shutil.rmtree(path)
        sync(path.parent)
    return True


@contextlib.contextmanager
def held(store: Store, name: str) -> Iterator[bool]:
    """Hold a lock, such as an artifact's `kind-key`, while the block lasts; False where another process has it."""
    path = store.root / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_held(store: Store, name: str) -> bool:
    """Whether a process holds a lock now."""
    if not (store.root / "locks" / name).exists():
        return False
    with held(store, name) as free:
        return not free


def size_of(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def _entry(path: Path, why: str) -> Entry:
    manifest = path / MANIFEST
    return Entry(path, size_of(path), (manifest if manifest.is_file() else path).stat().st_mtime, why)


def _lock_of(path: Path) -> str:
    if path.parent.name == "work":
        return path.name.removesuffix(DELETED)
    return f"{path.parent.name}-{path.name.partition('.damaged-')[0]}"


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []


def _parts(version: Version) -> list[str]:
    release = version.release
    return [str(ref) for ref in (release.model, release.index, release.data, *release.reports.values())]
