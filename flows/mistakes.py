"""What a configuration class allows at each place of a file, and mistakes in it as lines for people."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ullme.components import Component, Kind, component_class, did_you_mean
from ullme.errors import ConfigError

__all__ = ["Location", "Schema", "dotted", "lines", "shown"]

Location = tuple[str | int, ...]
"""Keys and positions from the top of a file down to a value."""

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


class Schema:
    """Finds which class reads each place of a plain configuration."""

    def __init__(self, root: type[BaseModel], raw: Any) -> None:
        """root: class of the whole file. raw: the file's plain form."""
        self._root, self._raw = root, raw

    def model_at(self, location: Location) -> type[BaseModel] | None:
        """The model class that reads the mapping at `location`, or None."""
        annotation, value = self._annotation_at(location)
        return _model_of(annotation, value)

    def is_component(self, location: Location) -> bool:
        """Whether the value at `location` is chosen by `kind`."""
        return _package_of(self._annotation_at(location)[0]) is not None

    def default_kind(self, location: Location) -> dict[str, Any]:
        """What an override below a key that the file does not have starts from: the kind that is the default there."""
        parent = self.model_at(location[:-1])
        field = parent.model_fields.get(str(location[-1])) if parent else None
        default = field.get_default(call_default_factory=True, validated_data={}) if field and not field.is_required() else None
        return {"kind": default.kind} if isinstance(default, Component) else {}

    def within(self, location: Location, *, whole: bool) -> Location:
        """The part of pydantic's location that lies in the file: it appends the names of the types of a union."""
        if whole:
            return location
        here: Any = self._raw
        for depth, part in enumerate(location):
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                is_default = depth == 0 or (isinstance(here, Mapping) and self._knows(location[:depth], part))
                return location if is_default else location[:depth]
        return location

    def _knows(self, location: Location, key: str | int) -> bool:
        found = self.model_at(location)
        return found is not None and key in found.model_fields

    def _annotation_at(self, location: Location) -> tuple[Any, Any]:
        annotation: Any = self._root
        value: Any = self._raw
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
    return next((extra.package for extra in get_args(annotation)[1:] if isinstance(extra, Kind)), None)


@dataclass(frozen=True)
class _Mistake:
    location: Location
    text: str
    got: str = ""


def lines(error: ValidationError, schema: Schema, source: str, overridden: Sequence[Location]) -> list[str]:
    """One line per place; what a union of types would have taken is joined by "or".

    source: name of the file. overridden: places that the command line set.
    """
    by_place: dict[Location, list[_Mistake]] = {}
    for entry in error.errors(include_url=False):
        mistake = _mistake(entry, schema)
        by_place.setdefault(mistake.location, []).append(mistake)
    found: list[str] = []
    for location, mistakes in by_place.items():
        if location and any(other != location and other[: len(location)] == location for other in by_place):
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
        found.append(f"{origin} {dotted(location)}: {joined}{f', got {got}' if got else ''}")
    return found


def _mistake(entry: Any, schema: Schema) -> _Mistake:
    kind, context = entry["type"], entry.get("ctx", {})
    location = schema.within(entry["loc"], whole=kind == "missing")
    got = shown(entry["input"])
    if kind == "extra_forbidden":
        return _Mistake(location, _unknown_key(location, schema))
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


def _unknown_key(location: Location, schema: Schema) -> str:
    key = str(location[-1])
    found = schema.model_at(location[:-1])
    if found is None:
        return f"unknown key '{key}'"
    allowed = list(found.model_fields)
    return f"unknown key '{key}'; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"


def dotted(location: Sequence[str | int]) -> str:
    """`training.phases.0.steps`."""
    return ".".join(map(str, location))


def shown(value: Any) -> str:
    """A value in at most 80 characters."""
    text = repr(value) if not isinstance(value, Mapping) else f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    return text if len(text) <= 80 else text[:77] + "..."
