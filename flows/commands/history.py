"""`ullme history`: what was released, and which of it was in use when."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from flows.commands.options import ModelName, OptionalConfig, Overrides, release_place
from flows.commands.table import aligned

if TYPE_CHECKING:
    from flows.registry import Version
    from ullme.artifacts import ArtifactRef

__all__ = ["history_command"]

NAME_CHARACTERS = 8
LINE_CHARACTERS = 110
INDENT = " " * 9


def history_command(
    *,
    config: OptionalConfig = None,
    set_: Overrides = None,
    model_name: ModelName = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON, with whole names and every reign.")] = False,
) -> int:
    """List the registered versions, newest first: what they release, their score, when and why they became the champion."""
    from flows.promotion import PromotionConfig
    from flows.registry import Registry

    store, tracking = release_place(config, set_ or (), model_name)
    rule = PromotionConfig()
    if config is not None:
        from flows.config import load

        settings = load(config, set_ or ())
        rule = settings.promotion.model_copy(update={"task": settings.decisive_task})
    rows = [_row(version, rule.metric, rule.task) for version in Registry.at(tracking, store).versions()]
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif rows:
        _show(rows, tracking.model_name, rule.metric)
    else:
        print(
            f"no version of '{tracking.model_name}' was registered yet; `ullme run train-and-index --config FILE` makes the first"
        )
    return 0


def _row(version: Version, metric: str, task: str) -> dict[str, Any]:
    release = version.release
    parts = {"model": release.model, "index": release.index, "data": release.data}
    return {
        "version": version.number,
        "made": version.made,
        "aliases": list(version.aliases),
        **{name: str(ref) for name, ref in parts.items()},
        "gone": [name for name, ref in parts.items() if not (ref.path / "manifest.json").is_file()],
        "metric": metric,
        **_scores(release.reports.get("tuned"), metric, task),
        "crowned": [dict(reign) for reign in version.crowned],
        "withdrawn": version.withdrawn,
    }


def _scores(report: ArtifactRef | None, metric: str, task: str) -> dict[str, float | None]:
    """The score by exact search and through the index, each None where the report is gone or does not have it."""
    file = report.path / "report.json" if report is not None else None
    found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}

    def score(scores: Mapping[str, Mapping[str, float]] | None) -> float | None:
        tasks = scores or {}
        return tasks.get(task or next(iter(tasks), ""), {}).get(metric)

    return {"exact": score(found.get("scores")), "index_score": score(found.get("index_scores"))}


def _show(rows: list[dict[str, Any]], name: str, metric: str) -> None:
    print(f"{name}: {len(rows)} version{'s' * (len(rows) > 1)}, newest first; times are UTC")
    titles = ["version", "made", "model", "index", "data", metric, "by index", ""]
    cells = [
        [
            str(row["version"]),
            _minute(row["made"]),
            *(row[part].partition("/")[2][:NAME_CHARACTERS] for part in ("model", "index", "data")),
            *("-" if row[score] is None else f"{row[score]:.3f}" for score in ("exact", "index_score")),
            ", ".join(
                [*row["aliases"], *(["withdrawn"] if row["withdrawn"] else []), *(["artifacts gone"] if row["gone"] else [])]
            ),
        ]
        for row in rows
    ]
    title, *lines = aligned([titles, *cells], right=(0, 5, 6))
    print(title)
    for row, line in zip(rows, lines, strict=True):
        print(line)
        notes = [f"champion {_minute(reign['at'])}: {reign['why']}" for reign in reversed(row["crowned"])]
        if row["withdrawn"]:
            when, _, why = row["withdrawn"].partition(": ")
            notes.insert(0, f"withdrawn {_minute(when)}: {why}")
        if row["gone"]:
            notes.append(f"gone: {', '.join(row[part] for part in row['gone'])}")
        for note in notes:
            print(textwrap.fill(note, LINE_CHARACTERS, initial_indent=INDENT, subsequent_indent=INDENT + "  "))


def _minute(time: str) -> str:
    """`2026-01-31T14:03:59Z` as people write it."""
    return time[:16].replace("T", " ")
