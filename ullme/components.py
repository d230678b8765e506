"""Typed configuration values, and `kind -> module` without a registry.

`{kind: grl, beta: 0.1}` in YAML means the one public class of `ullme/objectives/grl.py`, validated by pydantic. There is
no table to keep and no decorator: adding a variant is adding a file. A kind that contains a dot is somebody else's
module path (`my_company.losses.focal`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ullme.errors import ConfigError

__all__ = ["Component", "Kind", "Section", "component", "did_you_mean", "kinds", "resolve"]


class Section(BaseModel):
    """A frozen, typed piece of configuration; unknown keys are errors.

    A nested field called `runtime` holds what changes speed but not results (budgets, processes, timeouts); it stays out
    of the artifact key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The JSON form without any `runtime`: what an artifact's key is made of."""
        return _without_runtime(self.model_dump(mode="json", serialize_as_any=True))


class Component(Section):
    """A `Section` chosen by `kind`; `kind` is filled in by `resolve`."""

    kind: str = ""


def _without_runtime(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_runtime(item) for key, item in value.items() if key != "runtime"}
    if isinstance(value, list):
        return [_without_runtime(item) for item in value]
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def kinds(package: str) -> list[str]:
    """Names of the variants that `package` holds: its module files, less those its `NOT_KINDS` names."""
    module = importlib.import_module(package)
    skip = getattr(module, "NOT_KINDS", ())
    return sorted(
        info.name for info in pkgutil.iter_modules(module.__path__) if not info.name.startswith("_") and info.name not in skip
    )


def component_class(package: str, kind: str) -> type[Component]:
    """The one public `Component` class of the module that `kind` names.

    Raises:
        ConfigError: no such kind (with the nearest known one), or a module without exactly one public Component.
    """
    if "." in kind:
        try:
            module = importlib.import_module(kind)
        except ImportError as error:
            raise ConfigError(f"kind '{kind}' is a module path that cannot be imported ({error})") from error
    else:
        known = kinds(package)
        if kind not in known:
            raise ConfigError(f"unknown kind '{kind}'; allowed: {', '.join(known)}{did_you_mean(kind, known)}")
        module = importlib.import_module(f"{package}.{kind}")
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, Component)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(found) != 1:
        raise ConfigError(f"module {module.__name__} must define one public Component class, it defines {len(found)}")
    return found[0]


def resolve(package: str, spec: Any) -> Component:
    """Turn `{kind: ..., ...}` (or a bare kind name) into its validated value.

    Raises:
        ConfigError: unknown kind. pydantic.ValidationError: bad fields, located below the component.
    """
    if isinstance(spec, Component):
        return spec
    if isinstance(spec, str):
        spec = {"kind": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("kind"), str):
        raise ConfigError(f"expected {{kind: NAME, ...}} with NAME one of {', '.join(kinds(package))}; got {spec!r}")
    return component_class(package, spec["kind"]).model_validate(dict(spec))


@dataclass(frozen=True)
class Kind:
    """Annotation of a field whose value is a component of `package`: validates it, and describes every kind as JSON schema."""

    package: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._resolved, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One schema per kind; somebody else's (a module path) may have any fields. A kind within its own kind is left open."""
        del schema
        elsewhere = {"type": "object", "properties": {"kind": {"type": "string", "pattern": r"\."}}, "required": ["kind"]}
        described = _described.get()
        if self.package in described:
            return {"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}]}
        names = kinds(self.package)
        token = _described.set((*described, self.package))
        try:
            known = []
            for name in names:
                found = dict(handler.resolve_ref_schema(handler(component_class(self.package, name).__pydantic_core_schema__)))
                found["properties"] = {**found["properties"], "kind": {"type": "string", "const": name}}
                known.append({**found, "required": ["kind", *(key for key in found.get("required", ()) if key != "kind")]})
        finally:
            _described.reset(token)
        return {"anyOf": [{"type": "string", "enum": names}, *known, elsewhere]}

    def _resolved(self, value: Any) -> Component:
        try:
            return resolve(self.package, value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


_described: ContextVar[tuple[str, ...]] = ContextVar("described", default=())


def component(package: str) -> Kind:
    """Annotation for a field whose value is a component of `package`.

    The errors of the inner value are kept whole (a `ValidationError` inside the outer one) for `flows.mistakes` to unfold.
    """
    return Kind(package)
