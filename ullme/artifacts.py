"""Immutable directories under a digest key: retry, resume and cache are this one mechanism.

    <store>/<kind>/<key>/manifest.json     written last: its existence means the artifact is complete
    <store>/<kind>/<key>/...               the stage's files, each with size and sha256 in the manifest
    <store>/work/<kind>-<key>/             where a stage writes until then; survives a crash, so a stage can resume
    <store>/locks/<kind>-<key>             flock: held by the operating system, so a killed owner leaves none

The key is the digest of everything that went in: stage and its version, section (without `runtime`), digests of the
inputs, seed. The digest of an artifact is that of what came out: its files, except those under `logs/` (times differ
from run to run; results do not).

Before a stage runs, what it says it will write is held against what the disk has. A disk that fills all the same costs
one line, not what is finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ullme.components import Section
from ullme.disk import Disk
from ullme.errors import ArtifactError, LimitExceeded

__all__ = ["ArtifactRef", "Draft", "Inputs", "Stage", "Store", "digest_of", "now", "settle", "sha256_file", "sync", "write_atomic"]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1


class ArtifactRef(BaseModel):
    """Names one immutable directory: what kind it is, where it lies, what it contains, and counts to show people."""

    model_config = ConfigDict(frozen=True)

    kind: str
    uri: str
    digest: str
    meta: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """The directory. Use `Store.open` to get it verified."""
        return Path(self.uri)

    def __str__(self) -> str:
        return f"{self.kind}/{self.path.name}"


@dataclass
class Draft:
    """An artifact being written. `path` becomes the artifact; `scratch` survives a crash and is dropped at commit.

    A stage that can resume looks into both for what an interrupted attempt left; one that cannot calls `restart()`.
    """

    path: Path
    scratch: Path
    seed: int
    meta: dict[str, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget what an interrupted attempt left behind."""
        for folder in (self.path, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)


@dataclass(frozen=True)
class Inputs:
    """The references a stage was given, opened (and verified) when it asks for one by name."""

    store: Store
    refs: Mapping[str, ArtifactRef]

    def __contains__(self, name: str) -> bool:
        return name in self.refs

    def __getitem__(self, name: str) -> Path:
        """Directory of the input called `name`, its files verified."""
        if name not in self.refs:
            raise ArtifactError(f"this stage needs an input called '{name}'; it was given {sorted(self.refs) or 'none'}")
        return self.store.open(self.refs[name])

    def ref(self, name: str) -> ArtifactRef:
        """The reference itself: its digest is the fingerprint of a model or a data set."""
        return self.refs[name]

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of an input, as its manifest says; the files themselves are not looked at."""
        return {file: entry["size"] for file, entry in self.store.manifest(self.ref(name))["files"].items()}


@dataclass(frozen=True)
class Stage:
    """`(section, refs) -> ref`. Raise `version` when the same section would now give another result.

    space: the bytes that a run writes at most, scratch included, told from the section and from counts and sizes of the
    inputs without reading them; it returns None where that cannot be told.
    """

    name: str
    kind: str
    version: int
    run: Callable[[Any, Inputs, Draft], None]
    space: Callable[[Any, Inputs], int | None] | None = None


class Store:
    """A POSIX folder of artifacts."""

    def __init__(self, root: Path | str, *, reserve_bytes: int | None = None) -> None:
        """reserve_bytes: what stays free on the disk; None: a hundredth of it, at most 1 GB."""
        self.root = Path(root).expanduser().resolve()
        self.disk = Disk(self.root, reserve_bytes)
        self._verified: dict[str, str] = {}

    def key(self, stage: Stage, section: Section, refs: Mapping[str, ArtifactRef], *, seed: int) -> str:
        """Digest of everything that goes in: 20 hexadecimal digits."""
        payload = {
            "format": FORMAT,
            "stage": [stage.name, stage.version],
            "section": section.identity(),
            "inputs": {name: [ref.kind, ref.digest] for name, ref in sorted(refs.items())},
            "seed": seed,
        }
        return digest_of(payload)[:20]

    def find(self, stage: Stage, section: Section, refs: Mapping[str, ArtifactRef], *, seed: int) -> ArtifactRef | None:
        """The finished artifact for these inputs, or None. Reads the manifest only; `open` verifies the files."""
        path = self.root / stage.kind / self.key(stage, section, refs, seed=seed)
        return self._read(path) if (path / MANIFEST).is_file() else None

    def finished(self, kind: str) -> list[ArtifactRef]:
        """Every finished artifact of a kind, newest first. Reads manifests only; one that cannot be read is left out."""
        found = []
        for manifest in (self.root / kind).glob(f"*/{MANIFEST}"):
            if ".damaged-" in manifest.parent.name:
                continue
            with contextlib.suppress(ArtifactError):
                found.append((read_manifest(manifest.parent).get("created", ""), str(manifest.parent), self._read(manifest.parent)))
        return [ref for _, _, ref in sorted(found, key=lambda entry: entry[:2], reverse=True)]

    def produce(self, stage: Stage, section: Section, refs: Mapping[str, ArtifactRef], *, seed: int) -> ArtifactRef:
        """Run `stage` unless its artifact exists, and return the reference to it.

        A finished artifact whose files no longer match its manifest is set aside (`<key>.damaged-<n>`) and made again.
        A second process asking for the same artifact waits for the first and then finds it done.

        Raises:
            LimitExceeded: the disk has no room for what the stage will write, or became full. Besides, what the stage raises.
        """
        key = self.key(stage, section, refs, seed=seed)
        final = self.root / stage.kind / key
        work = self.root / "work" / f"{stage.kind}-{key}"
        with self._lock(f"{stage.kind}-{key}"):
            if (final / MANIFEST).is_file():
                try:
                    found = self._read(final)
                    self.open(found)
                    shutil.rmtree(work, ignore_errors=True)  # what a crash right after the commit left
                    return found
                except ArtifactError as error:
                    logger.warning("%s: doing that now, the old files are kept as %s", error, set_aside(final).name)
            self.disk.require(stage.name, self.space(stage, section, refs), work)
            draft = Draft(path=work / "artifact", scratch=work / "scratch", seed=seed)
            for folder in (draft.path, draft.scratch):
                folder.mkdir(parents=True, exist_ok=True)
            provenance = {
                "stage": stage.name,
                "version": stage.version,
                "section": section.model_dump(mode="json", serialize_as_any=True),
                "inputs": {name: ref.model_dump(mode="json") for name, ref in refs.items()},
                "seed": seed,
            }
            try:
                stage.run(section, Inputs(self, refs), draft)
                ref = self._commit(draft, stage.kind, final, provenance)
            except Exception as error:
                if isinstance(error, LimitExceeded) or not self.disk.filled_by(error):
                    raise
                raise self.disk.full(error, work) from error
            shutil.rmtree(work, ignore_errors=True)
            return ref

    def open(self, ref: ArtifactRef, kind: str | None = None) -> Path:
        """The directory of `ref` after checking its kind, its digest and the sha256 of every file.

        Raises:
            ArtifactError: missing, another kind, files missing, added or changed. Once per process and artifact.
        """
        if kind is not None and ref.kind != kind:
            raise ArtifactError(f"{ref}: expected an artifact of kind '{kind}', got '{ref.kind}'")
        if self._verified.get(ref.uri) == ref.digest:
            return ref.path
        manifest = read_manifest(ref.path)
        if manifest["kind"] != ref.kind:
            raise ArtifactError(f"{ref}: the reference says kind '{ref.kind}', its manifest says '{manifest['kind']}'")
        if manifest["digest"] != ref.digest:
            raise ArtifactError(
                f"{ref}: the reference's digest is {ref.digest[:12]}, the directory's is {manifest['digest'][:12]}; "
                "it is not the artifact that was meant"
            )
        if _content_digest(manifest["kind"], manifest["files"]) != manifest["digest"]:
            raise ArtifactError(
                f"{ref}: manifest.json was edited (its digest does not follow from its files); run again to rebuild"
            )
        for name, entry in manifest["files"].items():
            file = ref.path / name
            if not file.is_file():
                raise ArtifactError(f"{ref}: file {name} is missing; run again to rebuild it")
            if file.stat().st_size != entry["size"] or sha256_file(file) != entry["sha256"]:
                raise ArtifactError(
                    f"{ref}: file {name} is damaged (size or sha256 differs from the manifest); run again to rebuild it"
                )
        extra = sorted(set(_list_files(ref.path)) - set(manifest["files"]))
        if extra:
            raise ArtifactError(f"{ref}: unexpected file {extra[0]} in an immutable directory; remove it or run again to rebuild")
        self._verified[ref.uri] = ref.digest
        return ref.path

    def manifest(self, ref: ArtifactRef) -> dict[str, Any]:
        """What is written beside the files: provenance, sizes, digests, times."""
        return read_manifest(ref.path)

    def _read(self, path: Path) -> ArtifactRef:
        manifest = read_manifest(path)
        return ArtifactRef(kind=manifest["kind"], uri=str(path), digest=manifest["digest"], meta=manifest["meta"])

    def _commit(self, draft: Draft, kind: str, final: Path, provenance: dict[str, Any]) -> ArtifactRef:
        files = {}
        for name in _list_files(draft.path):
            file = draft.path / name
            files[name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
            sync(file)
        for folder in (path for path in draft.path.rglob("*") if path.is_dir()):
            sync(folder)
        digest = _content_digest(kind, files)
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "digest": digest,
            "files": files,
            "meta": draft.meta,
            "provenance": provenance,
            "created": now(),
        }
        write_atomic(draft.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        final.parent.mkdir(parents=True, exist_ok=True)
        sync(self.root)
        if final.exists():
            set_aside(final)
        draft.path.rename(final)
        sync(final.parent)
        self._verified[str(final)] = digest
        return ArtifactRef(kind=kind, uri=str(final), digest=digest, meta=draft.meta)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def space(self, stage: Stage, section: Section, refs: Mapping[str, ArtifactRef]) -> int | None:
        """The bytes that a run of `stage` writes at most, or None where that cannot be told."""
        return stage.space(section, Inputs(self, refs)) if stage.space else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        ArtifactError: no such directory, unfinished, or unreadable.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such artifact; it was moved or deleted, run the flow again to rebuild it")
    if not file.is_file():
        raise ArtifactError(f"{path}: no {MANIFEST}, so it was never finished; run the flow again")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ArtifactError(f"{path}: artifact format {manifest['format']}, this version reads format {FORMAT}")
        if not {"kind", "digest", "files", "meta"} <= manifest.keys():
            raise KeyError("a field is missing")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: {MANIFEST} cannot be read ({error}); delete the directory and run again") from error
    return manifest


def now() -> str:
    """The time as manifests have it: UTC, to the second, in an order that text has too."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def digest_of(payload: Any) -> str:
    """sha256 of the canonical JSON form."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write through a temporary file, fsync and rename: a reader sees the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
    settle(partial, path)


def settle(partial: Path, final: Path) -> None:
    """Make a file that is written durable, then give it its name."""
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> Path:
    """Rename a damaged directory out of the way; nothing is deleted."""
    number = 0
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(target)


def _content_digest(kind: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    return digest_of([kind, sorted((name, entry["sha256"]) for name, entry in files.items() if not name.startswith("logs/"))])


def _list_files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
