"""The MLflow registry: model and index released together as one version, and the rule that decides which one is in use."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.retriever import Release
from flows.tracking import TrackingConfig, connect, quiet
from ullme.components import Section
from ullme.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Promotion", "PromotionConfig", "Registry", "Version", "promote"]

CHAMPION, CHALLENGER = "champion", "challenger"
TAG_CHARACTERS = 4_900


class PromotionConfig(Section):
    """When the released champion changes: better than the present one on the same queries and corpus, by more than chance.

    task: empty means the first of `evaluation.tasks`. through: compare exact search, or search through the index.
    alpha: largest p of the paired randomisation test.
    """

    metric: str = "ndcg_at_10"
    task: str = ""
    through: Literal["exact", "index"] = "exact"
    alpha: float = Field(default=0.05, gt=0, lt=1)


class Promotion(BaseModel):
    """What became of a release.

    promoted: the alias `champion` was moved to it. champion: it holds the alias now. created: it is a new version, not one
    that was there with the same model, index and data.
    """

    model_config = ConfigDict(frozen=True)

    promoted: bool
    champion: bool
    created: bool
    name: str
    version: int
    why: str
    difference: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Version:
    """A registered version and what it releases."""

    name: str
    number: int
    release: Release


class Registry:
    """Releases under one name of an MLflow model registry."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client, self.name = client, name

    @classmethod
    def at(cls, config: TrackingConfig, store: Path) -> Registry:
        """The registry that a configuration names.

        Raises:
            ConfigError: it cannot be reached.
        """
        return cls(connect(config.address(store)), config.model_name)

    def holder(self, alias: str) -> Version | None:
        """The version that holds an alias, or None.

        Raises:
            ArtifactError: the version was not made by this project.
        """
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version_by_alias(self.name, alias)
        except MlflowException:
            return None
        return self._version(found)

    def champion(self) -> Version | None:
        """The version that is in use."""
        return self.holder(CHAMPION)

    def find(self, release: Release) -> Version | None:
        """The version that releases this model with this index and data, or None."""
        found = self._client.search_model_versions(f"name='{self.name}'")
        same = [version for version in found if release.digests.items() <= version.tags.items()]
        return self._version(min(same, key=lambda version: int(version.version))) if same else None

    def register(self, release: Release, *, run_id: str | None) -> Version:
        """A new version: a models-from-code wrapper with a release.json of references. It becomes the challenger."""
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
            self.name, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id, await_creation_for=0
        )
        self._client.set_registered_model_alias(self.name, CHALLENGER, made.version)
        return Version(self.name, int(made.version), bare)

    def crown(self, version: Version) -> None:
        """Move the alias `champion` to a version; it is no longer the challenger."""
        self._client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
        challenger = self.holder(CHALLENGER)
        if challenger is not None and challenger.number == version.number:
            self._client.delete_registered_model_alias(self.name, CHALLENGER)

    def _version(self, found: Any) -> Version:
        try:
            release = Release.model_validate_json(found.tags["release"])
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"version {found.version} of '{self.name}' was not released by this project (no tag `release`); choose another "
                "tracking.model_name"
            ) from error
        return Version(self.name, int(found.version), release)


def promote(
    registry: Registry,
    release: Release,
    reports: Mapping[str, Path],
    *,
    rule: PromotionConfig,
    pinned: bool = True,
    run_id: str | None = None,
) -> Promotion:
    """Register a release, and make it the champion if it is better than what is in use.

    It is compared with the present champion, or where there is none with its own base model, by per-query scores on the
    same queries and corpus. The same model, index and data are never registered twice.

    Args:
        registry: where.
        release: model, index and data.
        reports: report artifacts: `tuned`, `base`, and `champion` where the champion is another model.
        rule: what decides.
        pinned: False forbids a promotion: the base model may change under its name.
        run_id: MLflow run that the version belongs to.

    Raises:
        ContractError: the reports are not of the same queries and corpus.
    """
    from ullme.evaluation import compare

    version = registry.find(release)
    created = version is None
    if version is None:
        version = registry.register(release, run_id=run_id)
    champion = registry.champion()

    def outcome(why: str, *, promoted: bool = False, difference: float | None = None, p: float | None = None) -> Promotion:
        if promoted:
            registry.crown(version)
        holds = promoted or (champion is not None and champion.number == version.number)
        return Promotion(
            promoted=promoted,
            champion=holds,
            created=created,
            name=version.name,
            version=version.number,
            why=why,
            difference=difference,
            p=p,
        )

    if champion is not None and champion.number == version.number:
        return outcome(f"version {version.number} is the champion already: same model, index and data")
    if not pinned:
        return outcome("backbone.revision is not set, so the base model may change between runs; pin it to allow a promotion")
    if champion is None:
        rival, other = "its base model (there is no champion yet)", reports["base"]
    elif champion.release.model.digest == release.model.digest:
        rival, other = f"champion version {champion.number}, which is the same model with another index or data", reports["tuned"]
    elif "champion" in reports:
        rival, other = f"champion version {champion.number}", reports["champion"]
    else:
        return outcome(
            f"champion version {champion.number} could not be measured, its artifacts are gone; "
            "move the alias by hand if that is right"
        )
    found = compare(reports["tuned"], other, rule.metric, task=rule.task or None, through=rule.through)
    better = found.p < rule.alpha and found.difference > 0
    verdict = "better than" if better else "worse than" if found.p < rule.alpha else "a tie (no more than chance) with"
    numbers = (
        f"{rule.metric} {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], p {found.p:.4f}, {found.queries} queries"
    )
    return outcome(f"{verdict} {rival}: {numbers}", promoted=better, difference=found.difference, p=found.p)
