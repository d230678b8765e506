"""`ullme run`: train-and-index, refresh, and one stage at a time."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from flows.commands.options import Config, Overrides, say
from ullme.errors import UllmeError

if TYPE_CHECKING:
    from flows.config import RunConfig

__all__ = ["STAGE_VERBS", "refresh_command", "stage_command", "train_and_index_command"]

STAGE_VERBS = {
    "mine": "Mine hard negatives for the training queries.",
    "train": "Train the model, on mined negatives.",
    "encode": "Encode the corpus with the model.",
    "index": "Build the index of the corpus.",
    "evaluate": "Measure the model, its base model and BM25 on the test queries. Nothing is released.",
    "promote": "Release model and index as one version, and make it the champion if the rule says so.",
}
DryRun = Annotated[bool, Parameter(negative=(), help="Print the resolved configuration and what would be reused or run.")]
Summary = Annotated[Path | None, Parameter(help="Write scores, stages and what was released to this JSON file.")]
WhichModel = Annotated[
    Literal["trained", "champion"],
    Parameter(name="--model", help="trained: this configuration's, trained where it is not yet. champion: the released one."),
]


def train_and_index_command(*, config: Config, set_: Overrides = None, dry_run: DryRun = False, summary: Summary = None) -> int:
    """Train an embedder on a corpus, index the corpus with it, measure both, and release both together.

    Data, hard negatives, training, encoding, index, evaluation, promotion: whatever the store has already is reused.
    """
    return _run("train-and-index", config, set_ or (), dry_run=dry_run, summary=summary)


def refresh_command(*, config: Config, set_: Overrides = None, dry_run: DryRun = False, summary: Summary = None) -> int:
    """Bring the released index up to date: the champion's model, the documents as they are now.

    Only new and changed texts are encoded, deleted documents are gone, and the new version is released when it is not worse
    on the standing queries. Where nothing changed, nothing runs.
    """
    return _run("refresh", config, set_ or (), dry_run=dry_run, summary=summary, model="champion")


def stage_command(stage: str) -> Callable[..., int]:
    """The command of one stage."""

    def command(
        *, config: Config, set_: Overrides = None, model: WhichModel = "trained", dry_run: DryRun = False, summary: Summary = None
    ) -> int:
        return _run(stage, config, set_ or (), dry_run=dry_run, summary=summary, model=model)

    def training_command(*, config: Config, set_: Overrides = None, dry_run: DryRun = False, summary: Summary = None) -> int:
        return _run(stage, config, set_ or (), dry_run=dry_run, summary=summary)

    chosen = training_command if stage in ("mine", "train") else command
    chosen.__doc__ = f"{STAGE_VERBS[stage]}\n\nWhat it needs is made first, where the store does not have it."
    return chosen


def _run(
    verb: str,
    file: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool,
    summary: Path | None,
    model: Literal["trained", "champion"] = "trained",
) -> int:
    from flows.config import load

    started = time.monotonic()
    config = load(file, overrides)
    until = verb if verb in STAGE_VERBS else "promote"
    if dry_run:
        return _print_plan(config, model, until)
    config = config.resolved()
    say("starting Prefect and MLflow")
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    _log_plainly()
    found = _flow_result(verb, config, model)
    found["seconds"] = round(time.monotonic() - started, 1)
    from rich.console import Console

    from flows.report import show, show_stages

    console = Console(width=None if sys.stdout.isatty() else 132)
    if "nothing_new" in found:
        print(found["nothing_new"])
    elif "released" in found:
        show(found, console, search=_search_options(file, overrides))
    else:
        show_stages(found, console)
    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"summary: {summary}")
    return 0


def _flow_result(verb: str, config: RunConfig, model: Literal["trained", "champion"]) -> dict[str, Any]:
    """Run the flow of a verb; returns its summary.

    Raises:
        UllmeError, or whatever else ended it.
    """
    parameters: Mapping[str, Any] = {"config": config.as_json()}
    if verb == "train-and-index":
        from flows.train_and_index import train_and_index as chosen
    elif verb == "refresh":
        from flows.refresh import refresh as chosen
        from flows.tasks import nothing_new

        if line := nothing_new(config):  # before a server is started
            return {"nothing_new": line}
    else:
        from flows.stages import STAGE_FLOWS

        chosen = STAGE_FLOWS[verb]
        parameters = {**parameters, "model": model}
    state: Any = chosen(**parameters, return_state=True)  # type: ignore[call-overload]  # Prefect makes the plain form a RunConfig
    found = state.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        raise found
    if not state.is_completed():
        raise UllmeError(f"the flow ended {state.name}: {state.message}")
    return found


def _print_plan(config: RunConfig, model: Literal["trained", "champion"], until: str) -> int:
    from flows.config import to_yaml
    from flows.pipeline import Pipeline, names

    config = config.resolved()
    champion = None
    if config.tracking.uri or (config.store / "mlflow.db").is_file():
        from flows.registry import Registry

        champion = Registry.at(config.tracking, config.store).usable_champion()
    plan = Pipeline(config, champion, model=model, until=until).plan()
    width = names(plan)
    print(to_yaml(config) + "\n# What would be done (the whole output is valid as a configuration)")
    for planned in plan:
        print(f"# {planned.step.name:<{width}}  {planned}")
    if until == "promote":
        print(f"# {'promote':<{width}}  run (a version that exists already is not made again)")
    return 0


def _search_options(config: Path, overrides: Sequence[str]) -> str:
    """Options with which `ullme search` finds what a run with these options releases."""
    told = [override for override in overrides if override.startswith(("store=", "tracking."))]
    return "".join(f" {shlex.quote(word)}" for word in ["--config", str(config), *(w for o in told for w in ("--set", o))])


class _Plain(logging.StreamHandler[Any]):
    """Our own lines to stdout, as they are; what Prefect says about itself stays on the run's page."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        erase = "\r\x1b[K" if sys.stdout.isatty() else ""  # a progress bar may stand on this line; it draws itself again
        self.setFormatter(logging.Formatter(f"{erase}%(message)s"))
        self.addFilter(lambda record: hasattr(record, "ullme"))


def _log_plainly() -> None:
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    setup_logging()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.setLevel(logging.CRITICAL)
    plain = _Plain()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(plain)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("flows", "ullme", "indexes"):
        logging.getLogger(name).addHandler(warnings)
        logging.getLogger(name).propagate = False
