"""`ullme search`: ask what is released."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.commands.options import ModelName, OptionalConfig, Overrides, release_place

if TYPE_CHECKING:
    from flows.retriever import Hit
    from ullme.reranking import Reranker

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
    where: Annotated[
        list[str] | None,
        Parameter(
            negative=(),
            help="Only documents whose metadata fit: language=en, language=en,de (one of them), year=2020..2024 (within), "
            "year=2020.. (from), or JSON. Repeat it for several conditions.",
        ),
    ] = None,
    hybrid: Annotated[
        bool, Parameter(negative=(), help="Put the model's ranking and that of BM25 (the words themselves) together.")
    ] = False,
    rerank: Annotated[
        str | None,
        Parameter(
            help="Read the best answers once more together with the question: `generation` by the released LLM itself, or the "
            "folder or hub id of a cross-encoder, or JSON with a kind and its fields."
        ),
    ] = None,
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
    reranker = _reranker(rerank)
    retriever = Retriever.open(version.release)
    hits = retriever.search([question], k, where=where, hybrid=hybrid, rerank=reranker)[0]
    if as_json:
        print(json.dumps([hit.model_dump() for hit in hits], indent=1, ensure_ascii=False))
    else:
        print(f"{version.name} version {version.number} ({alias}), {len(hits)} {'answer' if len(hits) == 1 else 'answers'}")
        for hit in hits:
            _show(hit)
        took = ", ".join(f"{part} {1000 * seconds:.0f}" for part, seconds in retriever.seconds.items())
        print(f"\n{1000 * sum(retriever.seconds.values()):.0f} ms ({took})", file=sys.stderr)
    return 0


def _reranker(given: str | None) -> Reranker | None:
    """What `--rerank` means.

    Raises:
        ConfigError: it means nothing.
    """
    from pydantic import ValidationError

    from flows.mistakes import Schema, lines
    from ullme.components import component_class, kinds, resolve
    from ullme.errors import ConfigError
    from ullme.reranking import Reranker

    if not given:
        return None
    if given.lstrip().startswith(("{", "[")):
        try:
            spec = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--rerank: expected a kind, a cross-encoder or JSON; it is no JSON ({error.msg})") from error
        if not isinstance(spec, dict):
            raise ConfigError(f'--rerank: expected a JSON object such as {{"kind": "generation", "score": "sum"}}, got {given}')
    else:
        spec = {"kind": given} if given in kinds("ullme.rerankers") else {"kind": "cross_encoder", "model": given}
    try:
        found = resolve("ullme.rerankers", spec)
    except ValidationError as error:
        schema = Schema(component_class("ullme.rerankers", spec["kind"]), spec)
        raise ConfigError(lines(error, schema, "--rerank", ())[0]) from error
    assert isinstance(found, Reranker)
    return found


def _show(hit: Hit) -> None:
    place = " > ".join(part for part in (hit.title, hit.section) if part)
    print(f"\n{hit.rank:>2}  {hit.score:.3f}  {hit.id}" + (f"  {place}" if place else ""))
    print(textwrap.indent(hit.excerpt, "    "))
