"""The end of a run: its summary as JSON, as a table on the terminal, and as plots."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline import Pipeline
from flows.promotion import Promotion
from ullme.artifacts import ArtifactRef
from ullme.data import Dataset
from ullme.errors import ArtifactError, ContractError
from ullme.evaluation import compare, compare_standing

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["page_rows", "plot", "show", "show_stages", "summarise"]

ORDER = ("base", "tuned", "champion", "bm25")
QUESTION_CHARACTERS = 90
FEW_POINTS = 20
SHARES = {
    "accuracy": "by embeddings, in the batch",
    "generation_accuracy": "by the language model, among its candidates",
    "development_mrr": "MRR of the queries set aside",
}
"""What of a training step is drawn beside the loss."""


def summarise(pipeline: Pipeline, stages: Mapping[str, Any], promotion: Promotion, *, seconds: float) -> dict[str, Any]:
    """What a run did and found, as plain JSON.

    scores, intervals: system -> task -> metric; index_scores, index_intervals: the same through the index; hybrid_scores,
    hybrid_intervals: together with BM25. queries, documents: task -> count. comparisons: the tuned model against each other system
    by the promotion's metric. stages: name -> status (reused | ran), seconds, artifact. texts_encoded: by the released model.
    released: name, version, champion, why, model and index. description: the configuration's own words about it.
    """
    config = pipeline.config
    refs = pipeline.reports()
    judge = partial(compare, metric=config.promotion.metric, task=config.decisive_task)
    if pipeline.model == "champion":
        judge = partial(compare_standing, metric=config.promotion.metric, task=config.decisive_task)
        refs |= _former(pipeline)
    reports = {system: json.loads((ref.path / "report.json").read_text(encoding="utf-8")) for system, ref in refs.items()}
    tuned = reports["tuned"]
    comparisons = {}
    for system in reports:
        if system != "tuned":
            try:
                found = judge(refs["tuned"].path, refs[system].path)
            except ContractError:
                continue  # nothing in common any more; the promotion says so
            comparisons[system] = {"difference": found.difference, "low": found.low, "high": found.high, "p": found.p}
    return {
        "scores": {system: _ordered(report["scores"], config.evaluation.metrics) for system, report in reports.items()},
        "intervals": {system: report["intervals"] for system, report in reports.items()},
        **{
            f"{through}_{what}": {
                system: report[f"{through}_{what}"] for system, report in reports.items() if report.get(f"{through}_{what}")
            }
            for through in ("index", "hybrid")
            for what in ("scores", "intervals")
        },
        "queries": tuned["queries"],
        "documents": tuned["documents"],
        "controls": tuned["controls"],
        "metric": config.promotion.metric,
        "task": config.decisive_task,
        "comparisons": comparisons,
        "stages": dict(stages),
        "released": {
            **promotion.model_dump(mode="json"),
            "model": str(pipeline.made[pipeline.released_model]),
            "index": str(pipeline.made["index"]),
        },
        "description": config.tracking.description,
        "texts_encoded": _texts_encoded(pipeline, stages),
        "question": _question(pipeline),
        "store": str(config.store),
        "seconds": round(seconds, 1),
    }


def _texts_encoded(pipeline: Pipeline, stages: Mapping[str, Any]) -> int:
    """Texts that went through the released model in this run; the others' vectors were there."""
    ran = stages["encode tuned"]["status"] == "ran"
    return int(pipeline.made["encode tuned"].meta["texts_encoded"]) if ran else 0


def _former(pipeline: Pipeline) -> dict[str, ArtifactRef]:
    """The champion's own report, of the documents it was released with."""
    ref = pipeline.champion.reports.get("tuned") if pipeline.champion else None
    try:
        return {"champion": ref} if ref is not None and pipeline.store.open(ref) else {}
    except ArtifactError:
        return {}


def _ordered(scores: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of each task in the order of the configuration, then those of the task's own."""
    return {
        task: {metric: values[metric] for metric in dict.fromkeys((*metrics, *values)) if metric in values}
        for task, values in scores.items()
    }


def _question(pipeline: Pipeline) -> str:
    """A question nobody trained on, to try the search with."""
    queries = Dataset.open(pipeline.made["data"].path).queries("test")
    text = " ".join(queries[0].text.split()) if queries else "your question"
    return text if len(text) <= QUESTION_CHARACTERS else text[:QUESTION_CHARACTERS].rsplit(" ", 1)[0]


def page_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task and metric; a column per system, `0.392 [0.351, 0.433]`."""
    rows = []
    for task, metrics in summary["scores"]["tuned"].items():
        for metric in metrics:
            row: dict[str, Any] = {"task": task, "metric": metric}
            for title, scores, intervals in _columns(summary):
                row[title] = _cell(scores, intervals, task, metric)
            rows.append(row)
    return rows


def _columns(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    columns = []
    for system in ORDER:
        if system in summary["scores"]:
            columns.append((system, summary["scores"][system], summary["intervals"][system]))
            columns += [
                (f"{system} ({through})", summary[f"{through}_scores"][system], summary[f"{through}_intervals"][system])
                for through in ("index", "hybrid")
                if system in summary.get(f"{through}_scores", {})
            ]
    return columns


def _cell(scores: Mapping[str, Any], intervals: Mapping[str, Any], task: str, metric: str) -> str:
    value = scores.get(task, {}).get(metric)
    if value is None:
        return "-"
    low, high = intervals.get(task, {}).get(metric, (None, None))
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def show(summary: Mapping[str, Any], console: Console, *, search: str) -> None:
    """Print the end of a run. search: options of the `ullme search` command that finds this release."""
    from rich.table import Table

    for task, queries in summary["queries"].items():
        title = f"{task}: {queries} queries, {summary['documents'][task]} documents; mean [95% interval]"
        table = Table(title=title, title_justify="left")
        table.add_column("metric")
        rows = [row for row in page_rows(summary) if row["task"] == task]
        for name in [name for name in rows[0] if name not in ("task", "metric")]:
            table.add_column(name, justify="right", no_wrap=False)
        for row in rows:
            table.add_row(*(cell.replace(" [", "\n[").replace("[", "\\[") for name, cell in row.items() if name != "task"))
        console.print(table)
        controls = ", ".join(f"{name} {value:.3f}" for name, value in summary["controls"].get(task, {}).items())
        if controls:
            console.print(f"control of {task}: {controls}", highlight=False)
    for system, found in summary["comparisons"].items():
        console.print(
            f"tuned - {system}: {summary['metric']} {found['difference']:+.3f} "
            f"\\[{found['low']:+.3f}, {found['high']:+.3f}], p {found['p']:.4f}",
            highlight=False,
        )
    if summary["description"]:
        console.print(summary["description"].strip(), highlight=False, markup=False)
    _print_stages(summary, console)
    released = summary["released"]
    state = "new champion" if released["promoted"] else "champion as before" if released["champion"] else "not the champion"
    version = f"{released['name']} version {released['version']}" + ("" if released["created"] else " (there already)")
    console.print(f"released: {version}, {state}: {released['why']}", highlight=False, markup=False)
    if "train" not in summary["stages"]:
        console.print(f"{summary['texts_encoded']} texts encoded; the vectors of the others were there", highlight=False)
    console.print(f"{summary['seconds']:.0f} s in all", highlight=False)
    alias = "" if released["champion"] else " --alias challenger"
    console.print(
        f"try: ullme search {shlex.quote(summary['question'])}{search}{alias}", highlight=False, markup=False, soft_wrap=True
    )


def show_stages(summary: Mapping[str, Any], console: Console) -> None:
    """Print the end of a run that released nothing: what was made, what is in it, and scores as far as measured."""
    for system, tasks in summary["scores"].items():
        for task, scores in tasks.items():
            shown = ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
            console.print(f"{system} on {task}: {shown}", highlight=False, markup=False)
    _print_stages(summary, console)
    last = next(reversed(summary["stages"]))
    counts = {name: value for name, value in summary["counts"][last].items() if isinstance(value, int | float)}
    console.print(f"{last}: " + ", ".join(f"{name} {value:g}" for name, value in counts.items()), highlight=False, markup=False)
    console.print(f"{summary['seconds']:.0f} s in all", highlight=False)


def _print_stages(summary: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    stages = Table(title="stages", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("stage", "", "seconds", "artifact"):
        stages.add_column(column, justify="right" if column == "seconds" else "left")
    for name, stage in summary["stages"].items():
        stages.add_row(name, stage["status"], f"{stage['seconds']:.1f}", stage["artifact"])
    console.print(stages)


def plot(folder: Path, summary: Mapping[str, Any], model: ArtifactRef) -> None:
    """Write loss.png, scores_before_after.png and scores.png. model: the tuned model, whose `logs/` has the first two's numbers."""
    from matplotlib.figure import Figure

    metrics = model.path / "logs" / "metrics.jsonl"
    if metrics.is_file():
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        figure = Figure(figsize=(11, 4), layout="constrained")
        losses, shares = figure.subplots(1, 2)
        for name in dict.fromkeys(key for row in rows for key in row if key == "loss" or key.startswith("loss/")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style: Any = "--" if name.count("/") > 1 else "-"  # one data set's part of a term
            width = 2 if name == "loss" else 1
            losses.plot(*zip(*points, strict=True), style, label=name.removeprefix("loss/"), linewidth=width)
        losses.set(xlabel="step", ylabel="loss", title="Loss by term")
        for name, label in SHARES.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                shares.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < FEW_POINTS else None)
        shares.set(xlabel="step", ylim=(0, 1.02), title="Does the positive come first?")
        for axes in (losses, shares):
            if axes.get_lines():
                axes.legend()
        figure.savefig(folder / "loss.png", dpi=120)
    scores = model.path / "logs" / "scores.json"
    if scores.is_file():
        found = json.loads(scores.read_text(encoding="utf-8"))
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        for axes, when in zip(figure.subplots(1, 2, sharex=True), ("before", "after"), strict=True):
            for name in ("positive", "negative"):
                if found[when][name]:
                    axes.hist(found[when][name], bins=20, alpha=0.6, label=name)
            axes.set(title=f"{when} training", xlabel="cosine with the query", ylabel="pairs")
            axes.legend()
        figure.savefig(folder / "scores_before_after.png", dpi=120)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    task, metric = summary["task"], summary["metric"]
    bars = [
        (title, scores[task][metric], intervals[task][metric]) for title, scores, intervals in _columns(summary) if task in scores
    ]
    values = [value for _, value, _ in bars]
    errors = [[max(0.0, value - low) for _, value, (low, _) in bars], [max(0.0, high - value) for _, value, (_, high) in bars]]
    axes.bar([title for title, _, _ in bars], values, yerr=errors, capsize=4)
    axes.set(ylabel=metric, title=f"{task}, {summary['queries'][task]} queries, 95% intervals")
    figure.savefig(folder / "scores.png", dpi=120)
