"""RunConfig: every section of a run in one frozen value, read from YAML and `--set a.b=c`, all mistakes at once.

This module and everything it imports stay light: a configuration is checked in well under three seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from flows.limits import LimitsConfig
from flows.mistakes import Location, Schema, dotted, lines, shown
from flows.promotion import PromotionConfig
from flows.tracking import TrackingConfig
from indexes.kind import IndexKind
from ullme.backbone import BackboneConfig
from ullme.components import Section, component, did_you_mean, resolve
from ullme.data import DataConfig
from ullme.encoding import EncodeConfig
from ullme.errors import ConfigError
from ullme.evaluation import EvalConfig
from ullme.mining import MiningConfig
from ullme.synthetic import SyntheticConfig
from ullme.training import TrainConfig

__all__ = ["RunConfig", "load", "to_yaml", "validate"]


class RunConfig(Section):
    """One run. Each stage receives its own section and a seed, never the whole.

    store: folder of artifacts; a relative path means the working directory of the command, and is made absolute once, on load.
    """

    seed: int = Field(default=0, ge=0)
    store: Path = Path(".store")
    data: DataConfig
    backbone: BackboneConfig
    synthetic: SyntheticConfig | None = None
    """Queries that the LLM writes for documents, to train on; null: none."""
    mining: MiningConfig = Field(default_factory=MiningConfig)
    training: TrainConfig
    encoding: EncodeConfig = EncodeConfig()
    index: Annotated[IndexKind, component("indexes")] = Field(default_factory=lambda: _default_index())
    evaluation: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = TrackingConfig()
    promotion: PromotionConfig = PromotionConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        """A deployment's parameter may be the path of a YAML file."""
        if isinstance(value, (str, Path)):
            try:
                return _read(Path(value))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        file = {"type": "string", "minLength": 1, "description": "path of a YAML file"}
        return {"anyOf": [handler(schema), file]}

    @model_validator(mode="after")
    def _measured(self) -> RunConfig:
        """What decides the promotion must be something that is measured."""
        labels = [task.label for task in self.evaluation.tasks if task.ranks_documents]
        known = self.evaluation.metrics
        named = {"metric": [self.promotion.metric], "must_not_drop": self.promotion.must_not_drop}
        problems = [
            f"promotion.{key}: '{metric}' is not in evaluation.metrics; allowed: {', '.join(known)}{did_you_mean(metric, known)}"
            for key, metrics in named.items()
            for metric in metrics
            if metric not in known
        ]
        if not labels:
            problems.append("evaluation.tasks: expected one that ranks documents and decides the promotion; add {kind: retrieval}")
        elif self.promotion.task and self.promotion.task not in labels:
            problems.append(
                f"promotion.task: '{self.promotion.task}' is not in evaluation.tasks; allowed: {', '.join(labels)}"
                + did_you_mean(self.promotion.task, labels)
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _mixed_from_what_there_is(self) -> RunConfig:
        """A mixture names data sets of this run."""
        known = [self.data.called, *self.data.auxiliary]
        problems = [
            f"training.phases.{number}.mixture.datasets: '{name}' is no data set of this run; allowed: {', '.join(known)}"
            + did_you_mean(name, known)
            for number, phase in enumerate(self.training.phases)
            for name in phase.mixture.datasets
            if name not in known
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _special_tokens_where_they_are_read(self) -> RunConfig:
        """What reads texts through special tokens needs a model that has them."""
        problems = [
            f"training.phases.{number}.objective: '{phase.objective.kind}' reads texts through special tokens; set "
            "backbone.pooling: special and backbone.attention: causal"
            for number, phase in enumerate(self.training.phases)
            if phase.objective.uses_special_tokens and self.backbone.pooling != "special"
        ]
        if self.training.frozen_trunk and self.backbone.pooling not in ("special", "latent_attention"):
            problems.append(
                f"training.frozen_trunk: pooling: {self.backbone.pooling} has no weights of its own, so nothing would learn; set "
                "backbone.pooling: special"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self) -> RunConfig:
        """A copy with everything decided that depends on this machine or on the data: what the artifact keys follow from.

        Raises:
            DataError: the source of the data is not there. ConfigError: the backbone or a guide is not there.
        """
        return self.model_copy(
            update={
                "data": self.data.resolved(),
                "backbone": self.backbone.resolved(),
                "training": self.training.resolved(),
                "evaluation": self.evaluation.resolved(),
                "store": self.store.expanduser().resolve(),
            }
        )

    @property
    def decisive_task(self) -> str:
        """The task that decides the promotion: `promotion.task`, else the first that ranks documents."""
        return self.promotion.task or next(task.label for task in self.evaluation.tasks if task.ranks_documents)

    @property
    def pinned(self) -> bool:
        """False for a hub model without a revision: it may change between runs, and cannot be promoted."""
        return not self.backbone.source_digest.endswith("@None")

    def as_json(self) -> dict[str, Any]:
        """The plain form: dictionaries, lists, text and numbers."""
        return self.model_dump(mode="json", serialize_as_any=True)


def _default_index() -> Any:
    return resolve("indexes", "hnsw")


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration: YAML, then `a.b.0.c=value` overrides in order, then validation.

    Setting `x.kind` to another kind drops the fields of the former one.

    Raises:
        ConfigError: every mistake, one line each: `file: key: what was expected, what came, what is allowed`.
    """
    file = Path(path)
    raw = _read(file)
    problems: list[str] = []
    overridden: list[Location] = []
    for override in overrides:
        try:
            overridden.append(_apply(raw, override))
        except ConfigError as error:
            problems.extend(error.problems)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems.extend(lines(error, Schema(RunConfig, raw), str(path), overridden))
    if config is None or problems:
        raise ConfigError(problems)
    return config.model_copy(update={"store": config.store.expanduser().resolve()})


def validate(raw: Mapping[str, Any], source: str = "config") -> RunConfig:
    """A run's configuration from its plain form.

    Raises:
        ConfigError: every mistake, one line each.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(lines(error, Schema(RunConfig, raw), source, [])) from error


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `load` reads back to the same value."""
    return yaml.safe_dump(config.as_json(), sort_keys=False, allow_unicode=True, width=120)


# Reading


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(other.name for other in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        hint = did_you_mean(file.name, near) or (f"; {file.parent} has {', '.join(near)}" if near else "")
        raise ConfigError(f"{file}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"{mark.line + 1}:{mark.column + 1}" if mark else "?"
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{file}: expected a mapping of sections ({', '.join(RunConfig.model_fields)}), got {shown(raw) if raw else 'nothing'}"
        )
    return raw


def _apply(raw: dict[str, Any], override: str) -> Location:
    """Set one value; returns where."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected a.b.c=value, as in --set training.phases.0.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {name}: {text!r} is not valid YAML; quote it") from None
    here: Any = raw
    schema = Schema(RunConfig, raw)
    location: list[str | int] = []
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        key: Any = part
        if isinstance(here, list):
            key = _position(here, part, name, location)
        elif not isinstance(here, dict):
            raise ConfigError(f"--set {name}: {dotted(location)} is the value {shown(here)} and has no '{part}' below it")
        location.append(key)
        if last:
            if part == "kind" and isinstance(here, dict) and here.get("kind") != value:
                here.clear()
            here[key] = value
            break
        child = here[key] if isinstance(here, list) else here.get(key)
        if child is None:
            child = schema.default_kind(tuple(location))
        elif isinstance(child, str) and schema.is_component(tuple(location)):
            child = {"kind": child}
        here[key] = child
        here = child
    return tuple(location)


def _position(entries: list[Any], part: str, name: str, location: Sequence[str | int]) -> int:
    """The entry of a list that part of an override's path means."""
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    allowed = "it is empty" if not entries else f"allowed: 0{'' if len(entries) == 1 else f' to {len(entries) - 1}'}"
    raise ConfigError(f"--set {name}: {dotted(location)} is a list, expected the position of an entry, got '{part}'; {allowed}")
