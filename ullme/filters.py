"""Filters on the metadata of documents: equality, a set of values, a range; all conditions must hold.

    {"language": "en"}                        is it, or is in it where the document has a list
    {"language": ["en", "de"]}                one of them
    {"year": {"min": 2020, "max": 2024}}      within, the ends included; either may be absent
    year=2020..2024, language=en,de           the same as people type them

A document without the field never matches. Numbers are compared as numbers, texts (dates such as 2026-01-31 too) by their
characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ullme.components import did_you_mean
from ullme.errors import ConfigError

__all__ = ["Filter", "Scalar"]

Scalar = str | int | float | bool
TRUTH = {"true": True, "false": False}
EXPECTED = 'expected FIELD=VALUE, FIELD=ONE,OTHER, FIELD=FROM..TO or a JSON object such as {"year": {"min": 2020}}'


@dataclass(frozen=True)
class _Condition:
    """One field. values: any of them; least and most: the ends of a range, None = open."""

    field: str
    values: tuple[Scalar, ...] = ()
    least: Scalar | None = None
    most: Scalar | None = None

    def holds(self, value: Any) -> bool:
        """Whether a document whose field has this value (None: it has no such field) is meant."""
        if isinstance(value, list | tuple):
            return any(self.holds(one) for one in value)
        if value is None:
            return False
        if self.values:
            return any(_alike(wanted, value) == value for wanted in self.values)
        return (self.least is None or value >= _alike(self.least, value)) and (
            self.most is None or value <= _alike(self.most, value)
        )

    def check(self, value: Any) -> None:
        """Raises:
        ConfigError: the condition cannot be compared with what the documents have there.
        """
        for one in value if isinstance(value, list | tuple) else [value]:
            for wanted in (*self.values, self.least, self.most):
                if wanted is not None and one is not None:
                    try:
                        _alike(wanted, one)
                    except ValueError:
                        raise ConfigError(
                            f"filter: expected a {_name(one)} for '{self.field}', as its documents have ({one!r}), got {wanted!r}"
                        ) from None


@dataclass(frozen=True)
class Filter:
    """Which documents may be found."""

    conditions: tuple[_Condition, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any] | Sequence[str] | Filter | None) -> Filter:
        """From a mapping, or from conditions as people type them.

        Raises:
            ConfigError: not understood.
        """
        if isinstance(given, Filter):
            return given
        if given is None or isinstance(given, Mapping):
            return cls(tuple(_of_value(field, value) for field, value in (given or {}).items()))
        return cls(tuple(condition for text in given for condition in _typed(text)))

    def rows(self, metadata: Iterable[Mapping[str, Any]]) -> np.ndarray:
        """Int64[n]: positions of the documents for which every condition holds.

        Raises:
            ConfigError: no document has a field that is asked for, or none with values that can be compared with it.
        """
        found: list[int] = []
        fields: dict[str, Any] = {}
        for row, of in enumerate(metadata):
            for name, value in of.items():
                if name not in fields and value not in (None, [], ()):
                    fields[name] = value
                    for condition in self.conditions:
                        if condition.field == name:
                            condition.check(value)
            if all(self._holds(condition, of.get(condition.field)) for condition in self.conditions):
                found.append(row)
        for condition in self.conditions:
            if condition.field not in fields:
                known, near = ", ".join(sorted(fields)) or "none", did_you_mean(condition.field, fields)
                raise ConfigError(f"filter: no document has a field '{condition.field}'; they have: {known}{near}")
        return np.array(found, dtype=np.int64)

    @staticmethod
    def _holds(condition: _Condition, value: Any) -> bool:
        try:
            return condition.holds(value)
        except (ValueError, TypeError):  # a document whose value is of another type than those of the others
            return False


def _typed(text: str) -> list[_Condition]:
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"filter '{text}': {EXPECTED}; it is no JSON ({error.msg} at column {error.colno})") from error
        return [_of_value(field, value) for field, value in given.items()]
    field, sign, value = (part.strip() for part in text.partition("="))
    if not field or not sign or not value:
        raise ConfigError(f"filter '{text}': {EXPECTED}")
    if ".." in value:
        least, _, most = (part.strip() for part in value.partition(".."))
        return [_range(field, least or None, most or None)]
    return [_Condition(field, tuple(part.strip() for part in value.split(",") if part.strip()))]


def _of_value(field: str, value: Any) -> _Condition:
    if isinstance(value, Mapping):
        if not value or value.keys() - {"min", "max"}:
            raise ConfigError(f"filter: expected {{min: .., max: ..}} for '{field}', got {dict(value)}")
        return _range(field, value.get("min"), value.get("max"))
    values = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
    if not values or not all(isinstance(one, Scalar) for one in values):
        raise ConfigError(f"filter: expected a value, a list of values or {{min: .., max: ..}} for '{field}', got {value!r}")
    return _Condition(field, values)


def _range(field: str, least: Any, most: Any) -> _Condition:
    ends = [end for end in (least, most) if end is not None]
    if not ends or not all(isinstance(end, Scalar) for end in ends):
        raise ConfigError(f"filter: expected the least or the most value of '{field}', got {least!r} and {most!r}")
    return _Condition(field, (), least, most)


def _alike(wanted: Scalar, value: Any) -> Any:
    """`wanted` in the type of `value`.

    Raises:
        ValueError: it has no such form.
    """
    if isinstance(value, bool):
        if isinstance(wanted, bool):
            return wanted
        if str(wanted).casefold() not in TRUTH:
            raise ValueError
        return TRUTH[str(wanted).casefold()]
    if isinstance(value, int | float):
        if isinstance(wanted, bool):
            raise ValueError
        return float(wanted)
    return str(wanted)


def _name(value: Any) -> str:
    return "truth value" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
