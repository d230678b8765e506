"""RunConfig: every section of a run in one frozen value, read from YAML and `--set a.b=c`, all mistakes at once.

This module and everything it imports stay light: a configuration is checked in well under three seconds.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from flows.registry import PromotionConfig
from flows.tracking import TrackingConfig
from indexes.index import IndexKind
from ullme.backbone import BackboneConfig
from ullme.components import Component, Section, component, component_class, did_you_mean, resolve
from ullme.data import DataConfig
from ullme.encoding import EncodeConfig
from ullme.errors import ConfigError
from ullme.evaluation import EvalConfig
from ullme.mining import MiningConfig
from ullme.training import TrainConfig

__all__ = ["RunConfig", "load", "to_yaml", "validate"]

Location = tuple[str | int, ...]


class RunConfig(Section):
    """One run. Each stage receives its own section and a seed, never the whole.

    store: folder of artifacts; a relative path means the working directory of the command, and is made absolute once, on load.
    """

    seed: int = Field(default=0, ge=0)
    store: Path = Path(".store")
    data: DataConfig
    backbone: BackboneConfig
    mining: MiningConfig = Field(default_factory=MiningConfig)
    training: TrainConfig
    encoding: EncodeConfig = EncodeConfig()
    index: Annotated[IndexKind, component("indexes")] = Field(default_factory=lambda: _default_index())
    evaluation: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = TrackingConfig()
    promotion: PromotionConfig = PromotionConfig()

    @model_validator(mode="after")
    def _measured(self) -> RunConfig:
        """What decides the promotion must be something that is measured."""
        labels = [task.label for task in self.evaluation.tasks]
        problems = []
        if self.promotion.metric not in self.evaluation.metrics:
            known = self.evaluation.metrics
            problems.append(
                f"promotion.metric: '{self.promotion.metric}' is not in evaluation.metrics; allowed: {', '.join(known)}"
                + did_you_mean(self.promotion.metric, known)
            )
        if self.promotion.task and self.promotion.task not in labels:
            problems.append(
                f"promotion.task: '{self.promotion.task}' is not in evaluation.tasks; allowed: {', '.join(labels)}"
                + did_you_mean(self.promotion.task, labels)
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self) -> RunConfig:
        """A copy with everything decided that depends on this machine or on the data: what the artifact keys follow from.

        Raises:
            DataError: the source of the data is not there. ConfigError: the backbone is not there.
        """
        return self.model_copy(
            update={
                "data": self.data.resolved(),
                "backbone": self.backbone.resolved(),
                "evaluation": self.evaluation.resolved(),
                "store": self.store.expanduser().resolve(),
            }
        )

    @property
    def decisive_task(self) -> str:
        """The task that decides the promotion: `promotion.task`, else the first that is measured."""
        return self.promotion.task or self.evaluation.tasks[0].label

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
        problems.extend(_lines(error, raw, str(path), overridden))
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
        raise ConfigError(_lines(error, raw, source, [])) from error


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
            f"{file}: expected a mapping of sections ({', '.join(RunConfig.model_fields)}), got {_shown(raw) if raw else 'nothing'}"
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
    location: list[str | int] = []
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        key: Any = part
        if isinstance(here, list):
            key = _position(here, part, name, location)
        elif not isinstance(here, dict):
            raise ConfigError(f"--set {name}: {_dotted(location)} is the value {_shown(here)} and has no '{part}' below it")
        location.append(key)
        if last:
            if part == "kind" and isinstance(here, dict) and here.get("kind") != value:
                here.clear()
            here[key] = value
            break
        child = here[key] if isinstance(here, list) else here.get(key)
        if child is None:
            child = _default_kind(tuple(location), raw)
        elif isinstance(child, str) and _is_component(tuple(location), raw):
            child = {"kind": child}
        here[key] = child
        here = child
    return tuple(location)


def _position(entries: list[Any], part: str, name: str, location: Sequence[str | int]) -> int:
    """The entry of a list that part of an override's path means."""
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    allowed = "it is empty" if not entries else f"allowed: 0{'' if len(entries) == 1 else f' to {len(entries) - 1}'}"
    raise ConfigError(f"--set {name}: {_dotted(location)} is a list, expected the position of an entry, got '{part}'; {allowed}")


def _dotted(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location))


# Mistakes in words

PLAIN = {
    "missing": "required, but not there",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "path_type": "expected a path",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "none_required": "expected null",
}
BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


@dataclass(frozen=True)
class _Mistake:
    location: Location
    text: str
    got: str = ""


def _lines(error: ValidationError, raw: Mapping[str, Any], source: str, overridden: Sequence[Location]) -> list[str]:
    """One line per place; what a union of types would have taken is joined by "or"."""
    lines: dict[Location, list[_Mistake]] = {}
    for entry in error.errors(include_url=False):
        mistake = _mistake(entry, raw)
        lines.setdefault(mistake.location, []).append(mistake)
    found: list[str] = []
    for location, mistakes in lines.items():
        if location and any(other != location and other[: len(location)] == location for other in lines):
            continue  # a list is "too short" where its entries are wrong: the entries are what to mend
        if not location:
            found += [f"{source}: {line}" for mistake in mistakes for line in mistake.text.splitlines()]
            continue
        texts = list(dict.fromkeys(mistake.text for mistake in mistakes))
        joined = " or ".join([texts[0], *(text.removeprefix("expected ") for text in texts[1:])])
        unknown = texts[0].startswith("unknown key")
        from_command = any(
            location[: len(place)] == place or (unknown and place[: len(location)] == location) for place in overridden
        )
        origin = "--set" if from_command else f"{source}:"
        got = next((mistake.got for mistake in mistakes if mistake.got), "")
        found.append(f"{origin} {_dotted(location)}: {joined}{f', got {got}' if got else ''}")
    return found


def _mistake(entry: Any, raw: Mapping[str, Any]) -> _Mistake:
    kind, context = entry["type"], entry.get("ctx", {})
    location = _within(entry["loc"], raw, whole=kind == "missing")
    got = _shown(entry["input"])
    if kind == "extra_forbidden":
        return _Mistake(location, _unknown_key(location, raw))
    if kind == "missing":
        return _Mistake(location, PLAIN[kind])
    if kind == "value_error":
        return _Mistake(location, str(context["error"]))
    if kind in PLAIN:
        return _Mistake(location, PLAIN[kind], got)
    if kind == "literal_error":
        allowed = [word.strip("' ") for word in str(context["expected"]).replace(" or ", ", ").split(",")]
        return _Mistake(location, f"expected one of {', '.join(allowed)}, got {got}{did_you_mean(str(entry['input']), allowed)}")
    if kind in BOUNDS:
        name, sign = BOUNDS[kind]
        return _Mistake(location, f"expected a number {sign} {context[name]:g}", got)
    if kind == "too_short":
        return _Mistake(location, f"expected at least {context['min_length']} entries, got {context['actual_length']}")
    return _Mistake(location, entry["msg"][:1].lower() + entry["msg"][1:], got)


def _within(location: Location, raw: Any, *, whole: bool) -> Location:
    """The part of pydantic's location that lies in the file: it appends the names of the types of a union."""
    if whole:
        return location
    here: Any = raw
    for depth, part in enumerate(location):
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            is_default = depth == 0 or (isinstance(here, Mapping) and _knows(location[:depth], raw, part))
            return location if is_default else location[:depth]
    return location


def _knows(location: Location, raw: Any, key: str | int) -> bool:
    found = _model_at(location, raw)
    return found is not None and key in found.model_fields


def _unknown_key(location: Location, raw: Any) -> str:
    key = str(location[-1])
    found = _model_at(location[:-1], raw)
    if found is None:
        return f"unknown key '{key}'"
    allowed = list(found.model_fields)
    return f"unknown key '{key}'; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"


def _model_at(location: Location, raw: Any) -> type[BaseModel] | None:
    """The model class that reads the mapping at `location`, or None."""
    annotation, value = _annotation_at(location, raw)
    return _model_of(annotation, value)


def _is_component(location: Location, raw: Any) -> bool:
    return _package_of(_annotation_at(location, raw)[0]) is not None


def _default_kind(location: Location, raw: Any) -> dict[str, Any]:
    """What an override below a key that the file does not have starts from: the kind that is the default there."""
    parent = _model_at(location[:-1], raw)
    field = parent.model_fields.get(str(location[-1])) if parent else None
    default = field.get_default(call_default_factory=True, validated_data={}) if field and not field.is_required() else None
    return {"kind": default.kind} if isinstance(default, Component) else {}


def _annotation_at(location: Location, raw: Any) -> tuple[Any, Any]:
    annotation: Any = RunConfig
    value: Any = raw
    for part in location:
        found = _model_of(annotation, value)
        if found is not None and part in found.model_fields:
            field = found.model_fields[str(part)]
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        elif isinstance(part, int) and found is None:
            inner = _plain(annotation)
            annotation = get_args(inner)[0] if get_args(inner) else None
        else:
            return None, None
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return annotation, value


def _model_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    package = _package_of(annotation)
    if package is not None:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        try:
            return component_class(package, kind) if isinstance(kind, str) else None
        except ConfigError:
            return None
    plain = _plain(annotation)
    if get_origin(plain) in (Union, types.UnionType):
        return next((found for option in get_args(plain) if (found := _model_of(option, value)) is not None), None)
    return plain if inspect.isclass(plain) and issubclass(plain, BaseModel) else None


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _package_of(annotation: Any) -> str | None:
    """The package whose kinds an annotation made by `ullme.components.component` chooses from."""
    if get_origin(annotation) is not Annotated:
        return None
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, BeforeValidator) and inspect.isfunction(extra.func):
            package = inspect.getclosurevars(extra.func).nonlocals.get("package")
            if isinstance(package, str):
                return package
    return None


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, Mapping) else f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    return text if len(text) <= 80 else text[:77] + "..."
