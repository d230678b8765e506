"""`ullme search`: ask what is released."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.commands.options import ModelName, OptionalConfig, Overrides, release_place

if TYPE_CHECKING:
    from flows.retriever import Hit

__all__ = ["search_command"]


def search_command(
    question: Annotated[str, Parameter(help="What you look for, in your own words.")],
    /,
    *,
    config: OptionalConfig = None,
    set_: Overrides = None,
    model_name: ModelName = None,
    alias: Annotated[str, Parameter(help="Which version: champion is in use, challenger waits.")] = "champion",
    k: Annotated[int, Parameter(name=["-k", "--hits"], help="How many answers.")] = 5,
    as_json: Annotated[
        bool, Parameter(name="--json", negative=(), help="Print JSON: rank, score, id, title, section, text, excerpt and more.")
    ] = False,
) -> int:
    """Answer a question from the released model and index: rank, score, id and an excerpt of each document."""
    from flows.registry import Registry
    from flows.retriever import Retriever
    from ullme.errors import ArtifactError, ConfigError

    if k < 1:
        raise ConfigError(f"-k: expected at least 1 answer, got {k}")
    store, tracking = release_place(config, set_ or (), model_name)
    registry = Registry.at(tracking, store)
    version = registry.holder(alias)
    if version is None:
        other = next((name for name in ("champion", "challenger") if registry.holder(name)), None)
        hint = f"; there is a {other}: add --alias {other}" if other else "; run train-and-index first"
        raise ArtifactError(f"no version of '{tracking.model_name}' is the {alias}{hint}")
    hits = Retriever.open(version.release).search([question], k)[0]
    if as_json:
        print(json.dumps([hit.model_dump() for hit in hits], indent=1, ensure_ascii=False))
    else:
        print(f"{version.name} version {version.number} ({alias}), {len(hits)} answers")
        for hit in hits:
            _show(hit)
    return 0


def _show(hit: Hit) -> None:
    place = " > ".join(part for part in (hit.title, hit.section) if part)
    print(f"\n{hit.rank:>2}  {hit.score:.3f}  {hit.id}" + (f"  {place}" if place else ""))
    print(textwrap.indent(hit.excerpt, "    "))
