"""The model card: what a published model is, how to load it, what it scored and what it was made from. Text from values.

Nothing here looks at a machine or a hub, and no path of a machine gets into the text: of a path in the configuration only its last
part is shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Card", "model_card", "without_places"]

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""System -> task -> metric -> value."""
RETRIEVAL = {"ndcg", "mrr", "recall", "map", "precision", "hit_rate"}
"""First words of the metrics that score a search."""
# What stands before the last part of a path, wherever a text begins or after a space, a quote or a sign; not of https://
PLACE = re.compile(r"""(?:^|(?<=[\s=:,;'"(@]))(?:file://)?(?:~|\.{1,2})?/(?!/)(?:[^/'"\n]+/)*(?=\S)""")
WORDS_AS_THEY_ARE = {"prompts"}
"""Keys whose values are texts, not places."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    version: name and number in the registry. base: the LLM as the configuration names it; hub: the same, where it is the id of a
    repository on the hub. settings: how the LLM is used as an embedder, `ullme.json`; dim: length of a vector.
    configuration: section of each stage that had a part. digests: artifact -> sha256. scores: column -> task -> metric;
    intervals: the same with [low, high]; queries, documents: task -> count. facts: more about its origin, for a table.
    trust: whether sentence-transformers has to run code of the folder to load it.
    """

    version: str
    base: str
    settings: Mapping[str, Any]
    dim: int
    hub: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    intervals: Scores = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    trust: bool = False


def model_card(card: Card, name: str, *, branch: str = "main") -> str:
    """The text of README.md: metadata for the hub, then Markdown. name: `owner/repository`, or what else to call the model.

    Scores of the column `tuned` are also stated as metadata (`model-index`); a language or licence is not, since nobody knows it.
    """
    from huggingface_hub import ModelCard

    parts = [
        f"# {name.rpartition('/')[2]}\n\n{_opening(card)}",
        "## Use\n\n" + _use(card, name, branch),
        "## Scores\n\n" + _scores(card) if card.scores else "",
        "## How it embeds\n\n" + _settings(card),
        "## Origin\n\n" + _origin(card),
        "## Configuration\n\nEvery value of the stages that had a part in it. Of paths only the last part is shown.\n\n"
        + _block("yaml", _yaml(without_places(card.configuration)))
        if card.configuration
        else "",
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_metadata(card, name).to_yaml()}\n---\n\n{body}\n"))


def without_places(value: Any) -> Any:
    """The same value with every path in its texts cut to its last part; texts of prompts stay as they are."""
    if isinstance(value, str):
        return PLACE.sub("", value)
    if isinstance(value, Mapping):
        return {key: inside if key in WORDS_AS_THEY_ARE else without_places(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inside) for inside in value]
    return value


def _metadata(card: Card, name: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="information-retrieval" if metric.partition("_")[0] in RETRIEVAL else "sentence-similarity",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
        )
        for task, metrics in card.scores.get("tuned", {}).items()
        for metric, value in metrics.items()
        if _known(value)
    ]
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "ullme"],
        base_model=card.hub or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _opening(card: Card) -> str:
    base = f"[{card.hub}](https://huggingface.co/{card.hub})" if card.hub else f"`{without_places(card.base)}`"
    return (
        f"A text-embedding model made from the LLM {base} with `ullme`: texts become vectors of {card.dim} dimensions and norm 1, "
        "and the product of two of them says how near their meanings are. Language, licence and purpose are those of the LLM and "
        "of the data it was trained on; look there before you use it."
    )


def _use(card: Card, name: str, branch: str) -> str:
    there = "" if branch == "main" else branch
    options = (f', revision="{there}"' if there else "") + (", trust_remote_code=True" if card.trust else "")
    why = (
        "Loading runs Python code of this repository, hence `trust_remote_code=True`: read its `*.py` files before."
        if card.trust
        else "It loads plainly: no code of this repository is run."
    )
    sentence_transformers = f"""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{options})
queries = model.encode(["a question"], prompt_name="query")
documents = model.encode(["a document"], prompt_name="document")
print(queries @ documents.T)"""
    ours = f"""\
from ullme import Encoder

encoder = Encoder.load("{name}{there and f"@{there}"}")
queries = encoder.encode(["a question"], prompt="query")
documents = encoder.encode(["a document"], prompt="document")
print(queries @ documents.T)"""
    return f"{why}\n\n{_block('python', sentence_transformers)}\n\nor, with the same vectors:\n\n{_block('python', ours)}"


def _scores(card: Card) -> str:
    columns = list(card.scores)
    rows = [
        [task, metric, *(_cell(card, column, task, metric) for column in columns)]
        for task, metrics in _union(card.scores).items()
        for metric in metrics
    ]
    counts = "; ".join(
        f"{task}: {card.queries[task]} queries, {card.documents[task]} documents" for task in card.queries if task in card.documents
    )
    return (
        _table(["task", "metric", *columns], rows)
        + (f"\n\n{counts}." if counts else "")
        + " In brackets: 95% intervals. `base` is the LLM before the training; `(index)` is the same model through the index "
        "that it was released with."
    )


def _union(scores: Scores) -> dict[str, list[str]]:
    """Task -> metrics, of all columns, in the order of their first appearance."""
    found: dict[str, dict[str, None]] = {}
    for tasks in scores.values():
        for task, metrics in tasks.items():
            found.setdefault(task, {}).update(dict.fromkeys(metrics))
    return {task: list(metrics) for task, metrics in found.items()}


def _cell(card: Card, column: str, task: str, metric: str) -> str:
    value = card.scores[column].get(task, {}).get(metric)
    if not _known(value):
        return "-"
    low, high = card.intervals.get(column, {}).get(task, {}).get(metric) or (None, None)
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _settings(card: Card) -> str:
    settings = {name: value for name, value in card.settings.items() if name not in ("base", "dim", "prompts")}
    rows = [["dim", str(card.dim)], *([name, _plain(value)] for name, value in without_places(settings).items())]
    prompts = card.settings.get("prompts")
    lines = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in (prompts or {}).items())
    said = f"\n\nWhat is written around a text:\n\n{_block('yaml', lines)}" if prompts else ""
    return _table(["setting", "value"], rows) + said


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _origin(card: Card) -> str:
    facts = _table(["", ""], [["version", card.version], *([name, without_places(value)] for name, value in card.facts.items())])
    digests = _table(["artifact", "sha256 of its content"], [[name, f"`{digest}`"] for name, digest in card.digests.items()])
    return facts + (f"\n\n{digests}" if card.digests else "")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).strip()


def _block(language: str, text: str) -> str:
    """A code block; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
