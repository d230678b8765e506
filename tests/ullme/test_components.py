"""`kind: x` means the one public class of `package/x.py`; unknown names come with the nearest known one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from ullme.components import Component, Section, component, did_you_mean, kinds, resolve
from ullme.errors import ConfigError

CIRCLE = """
from ullme.components import Component
class Circle(Component):
    radius: float = 1.0
class _Hidden(Component):
    pass
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package `shapes_of_test` with two kinds, one module that is none, and one that breaks the rule."""
    package = tmp_path / "shapes_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("NOT_KINDS = ('geometry',)\n")
    (package / "geometry.py").write_text("")
    (package / "circle.py").write_text(CIRCLE)
    (package / "square.py").write_text(CIRCLE.replace("Circle", "Square").replace("radius", "side"))
    (package / "twice.py").write_text(CIRCLE + CIRCLE.replace("Circle", "Other"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "shapes_of_test"
    for name in [name for name in sys.modules if name.startswith("shapes_of_test")]:
        del sys.modules[name]


def test_a_file_is_a_kind(shapes: str) -> None:
    assert kinds(shapes) == ["circle", "square", "twice"]
    circle: Any = resolve(shapes, {"kind": "circle", "radius": 2})
    assert (circle.kind, circle.radius) == ("circle", 2.0)


def test_a_bare_name_takes_the_defaults(shapes: str) -> None:
    assert resolve(shapes, "square").model_dump()["side"] == 1.0


def test_a_value_is_passed_through(shapes: str) -> None:
    circle = resolve(shapes, {"kind": "circle"})
    assert resolve(shapes, circle) is circle


def test_a_kind_with_a_dot_is_somebody_elses_module(shapes: str) -> None:
    assert type(resolve("ullme.objectives", {"kind": f"{shapes}.circle"})).__name__ == "Circle"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "circel"}, "unknown kind 'circel'; allowed: circle, square, twice; did you mean 'circle'?"),
        ({"kind": "geometry"}, "unknown kind 'geometry'"),
        ({"kind": "twice"}, "must define one public Component class, it defines 2"),
        ({"kind": "nowhere.at_all"}, "cannot be imported"),
        ({}, "expected {kind: NAME, ...} with NAME one of circle, square, twice"),
        (3, "got 3"),
    ],
)
def test_mistakes_are_named(shapes: str, spec: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(shapes, spec)
    assert words in str(caught.value)


def test_errors_inside_a_component_keep_their_place(shapes: str) -> None:
    class Drawing(Section):
        shapes: tuple[Annotated[Component, component("shapes_of_test")], ...]

    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"shapes": [{"kind": "circle"}, {"kind": "circle", "radius": "q"}]})
    assert caught.value.errors()[0]["loc"] == ("shapes", 1, "radius")


def test_a_section_is_frozen_and_refuses_what_it_does_not_know() -> None:
    class Point(Section):
        x: int = 0

    with pytest.raises(ValidationError):
        Point().x = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Point.model_validate({"y": 1})


def test_identity_leaves_out_runtime_at_every_depth() -> None:
    class Runtime(Section):
        workers: int = 1

    class Inner(Section):
        depth: int = 2
        runtime: Runtime = Runtime()

    class Outer(Section):
        inner: Inner = Inner()
        many: tuple[Inner, ...] = (Inner(),)
        runtime: Runtime = Runtime()

    assert Outer().identity() == {"inner": {"depth": 2}, "many": [{"depth": 2}]}


def test_nothing_near_means_no_suggestion() -> None:
    assert did_you_mean("zzz", ["mean", "last"]) == ""
    assert did_you_mean("poolng", ["pooling", "dtype"]) == "; did you mean 'pooling'?"
