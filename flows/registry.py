"""The MLflow registry: model and index released together as one version, and the alias of the one that is in use.

What is in use is what the alias `champion` points at, and it moves with one call. Around it three tags are written:

    crowned     JSON list of {at, why}: every time that the version became the champion, oldest first
    crowning    the entry that belongs there next, from before the alias moves until it stands in `crowned`
    withdrawn   "TIME: why" of a version that was rolled back

so a process that is killed in between leaves either the former champion, or the new one with its `crowning` still open.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.retriever import Release
from flows.runs import every
from flows.tracking import TrackingConfig, connect, quiet
from ullme.artifacts import ArtifactRef, Store
from ullme.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHALLENGER", "CHAMPION", "Registry", "Version", "verify"]

CHAMPION = "champion"
CHALLENGER = "challenger"
TAG_CHARACTERS = 4_900
KEPT_REIGNS = 8
WHY_CHARACTERS = 500
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # what MLflow says of a name or an alias that is not there


@dataclass(frozen=True)
class Version:
    """A registered version and what it releases.

    crowned: when it became the champion and why, oldest first. withdrawn: when and why it was rolled back, or empty.
    made: when it was registered. aliases: those that it holds.
    """

    name: str
    number: int
    release: Release
    crowned: Sequence[Mapping[str, str]] = ()
    withdrawn: str = ""
    made: str = ""
    aliases: Sequence[str] = ()


class Registry:
    """Releases under one name of an MLflow model registry."""

    def __init__(self, client: MlflowClient, name: str, *, description: str = "") -> None:
        """description: of the versions that are registered from now on."""
        self._client, self.name, self._description = client, name, description

    @classmethod
    def at(cls, config: TrackingConfig, store: Path) -> Registry:
        """The registry that a configuration names.

        Raises:
            ConfigError: it cannot be reached.
        """
        return cls(connect(config.address(store)), config.model_name, description=config.description)

    def holder(self, alias: str) -> Version | None:
        """The version that holds an alias, or None.

        Raises:
            ArtifactError: the version was not made by this project.
        """
        found = self._found(alias)
        return None if found is None else self._version(found, self._aliases())

    def versions(self) -> list[Version]:
        """Every version of the name that this project made, newest first."""
        aliases = self._aliases()
        ours = [self._version(version, aliases) for version in self._versions() if "release" in version.tags]
        return sorted(ours, key=lambda version: -version.number)

    def names(self) -> list[str]:
        """Every name that the registry has."""
        return [model.name for model in every(lambda token: self._client.search_registered_models(page_token=token))]

    def named(self, name: str) -> Registry:
        """The same registry, under another name."""
        return Registry(self._client, name)

    def champion(self) -> Version | None:
        """The version that is in use."""
        return self.holder(CHAMPION)

    def usable_champion(self) -> Release | None:
        """What is in use, if its model can still be opened."""
        champion = self.champion()
        if champion is None:
            return None
        model = champion.release.model
        try:
            Store(model.path.parent.parent).open(model, "model")
        except ArtifactError:
            return None
        return champion.release

    def find(self, release: Release) -> Version | None:
        """The version that releases this model with this index and data, or None."""
        same = [version for version in self._versions() if release.digests.items() <= version.tags.items()]
        return self._version(min(same, key=lambda version: int(version.version)), self._aliases()) if same else None

    def register(self, release: Release, *, run_id: str | None) -> Version:
        """A new version: a models-from-code wrapper with a release.json of references."""
        import mlflow
        from mlflow.exceptions import MlflowException

        bare = release.bare()
        text = bare.model_dump_json(indent=1)
        with tempfile.TemporaryDirectory(prefix="ullme-") as folder, quiet():
            file = Path(folder) / "release.json"
            file.write_text(text, encoding="utf-8")
            with mlflow.start_run(run_id=run_id) if run_id else contextlib.nullcontext():
                logged = mlflow.pyfunc.log_model(
                    name="retriever",
                    python_model=str(Path(__file__).with_name("model.py")),
                    artifacts={"release": str(file)},
                    pip_requirements=["ullme"],
                )
        with contextlib.suppress(MlflowException):
            self._client.create_registered_model(self.name)
        tags = {**release.digests, "release": bare.model_dump_json()[:TAG_CHARACTERS]}
        made = self._client.create_model_version(
            self.name,
            logged.model_uri,
            run_id=run_id,
            tags=tags,
            description=self._description or None,
            model_id=logged.model_id,
            await_creation_for=0,
        )
        return Version(self.name, int(made.version), bare)

    def run_name(self, version: Version) -> str:
        """Name of the run that registered a version, or empty where none did or it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_model_version(self.name, str(version.number)).run_id
            return self._client.get_run(run).info.run_name or "" if run else ""
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return ""

    def challenge(self, version: Version) -> None:
        """Point the alias `challenger` at a version: the newest one that is not in use."""
        self._client.set_registered_model_alias(self.name, CHALLENGER, str(version.number))

    def crown(self, version: Version, *, why: str, left: Version | None = None) -> None:
        """Move the alias `champion` to a version, which is then no longer the challenger, and write down when and why.

        left: the version that this rolls back from.
        """
        self.settle()
        reign = {"at": _now(), "why": why[:WHY_CHARACTERS], **({"left": str(left.number)} if left else {})}
        self._tag(version, "crowning", json.dumps(reign, ensure_ascii=False))
        self._client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
        self.settle()

    def settle(self) -> Mapping[str, str] | None:
        """Finish what was interrupted after the champion had changed; returns its entry, or None where nothing was open."""
        found = self._found(CHAMPION)
        if found is None:
            return None
        champion = self._version(found, {CHAMPION: int(found.version)})
        if "crowning" in found.tags:
            self._tag(champion, "crowned", json.dumps(champion.crowned[-KEPT_REIGNS:], ensure_ascii=False))
            self._client.delete_model_version_tag(self.name, str(champion.number), "crowning")
        challenger = self._found(CHALLENGER)
        if challenger is not None and int(challenger.version) == champion.number:
            self._client.delete_registered_model_alias(self.name, CHALLENGER)
        return champion.crowned[-1] if "crowning" in found.tags else None

    def withdraw(self, version: Version, *, why: str) -> None:
        """Mark a version as rolled back: it does not become the champion again by itself."""
        self._tag(version, "withdrawn", f"{_now()}: {why}"[:WHY_CHARACTERS])

    def reinstate(self, version: Version) -> None:
        """Take the mark of `withdraw` away."""
        self._client.delete_model_version_tag(self.name, str(version.number), "withdrawn")

    def _versions(self) -> Iterator[Any]:
        """What MLflow has under the name."""
        which = f"name='{self.name}'"
        return every(lambda token: self._client.search_model_versions(which, page_token=token))

    def _tag(self, version: Version, name: str, value: str) -> None:
        self._client.set_model_version_tag(self.name, str(version.number), name, value)

    def _found(self, alias: str) -> Any:
        """What MLflow has under an alias, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None

    def _aliases(self) -> Mapping[str, int]:
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return {}
        return {alias: int(number) for alias, number in model.aliases.items()}

    def _version(self, found: Any, aliases: Mapping[str, int]) -> Version:
        number = int(found.version)
        try:
            release = Release.model_validate_json(found.tags["release"])
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"version {number} of '{self.name}' was not released by this project (no tag `release`); choose another "
                "tracking.model_name"
            ) from error
        crowned = json.loads(found.tags.get("crowned", "[]"))
        open_entry = json.loads(found.tags.get("crowning", "null"))
        if open_entry is not None and open_entry not in crowned and aliases.get(CHAMPION) == number:
            crowned.append(open_entry)
        return Version(
            self.name,
            number,
            release,
            crowned,
            found.tags.get("withdrawn", ""),
            made=time.strftime(TIME_FORMAT, time.gmtime(found.creation_timestamp / 1000)),
            aliases=sorted(alias for alias, held in aliases.items() if held == number),
        )


def verify(release: Release) -> None:
    """Make sure that model, index and data of a release can be opened together, without loading the model.

    Raises:
        ArtifactError: one of them is missing or damaged. ContractError: the index was built with another model.
    """
    from indexes.index import Index

    for kind in ("model", "data", "index"):
        ref: ArtifactRef = getattr(release, kind)
        Store(ref.path.parent.parent).open(ref, kind)
    Index.open(release.index.path, fingerprint=release.model.digest)


def _now() -> str:
    return time.strftime(TIME_FORMAT, time.gmtime())
