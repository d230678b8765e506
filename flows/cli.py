"""The commands: `ullme run|search|setup`, `prefect run`, `python -m flows`. One app, three doors; light until a command runs.

Exit codes: 0 well, 1 a failed run, 2 a mistake in the command, the configuration or the data, 130 interrupted, 143 ended.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from ullme.errors import StageFailed, UllmeError

if TYPE_CHECKING:
    from flows.config import RunConfig
    from flows.retriever import Hit

__all__ = ["main", "prefect_run", "run_app"]

EXAMPLES = """Examples:

  {run} train-and-index --config configs/smoke.yaml
  {run} train-and-index --config configs/quickstart.yaml --dry-run
  {run} train-and-index --config configs/quickstart.yaml \\
      --set training.phases.0.steps=20 --set index.kind=flat
"""
USAGE, INTERRUPTED, TERMINATED = 2, 130, 143
ENVIRONMENT = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # a fresh home runs its migrations first
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set unless the caller's environment says otherwise."""

Config = Annotated[Path, Parameter(name=["--config", "-c"], help="The run's YAML file; configs/reference.yaml has every key.")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="Change one value of the file: a.b.0.c=value, read as YAML; may be given several times. Setting x.kind to another "
        "kind drops the fields of the former one.",
    ),
]


def train_and_index_command(
    *,
    config: Config,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print the resolved configuration and what would be reused or run.")
    ] = False,
    summary: Annotated[Path | None, Parameter(help="Write scores, stages and what was released to this JSON file.")] = None,
) -> int:
    """Train an embedder on a corpus, index the corpus with it, measure both, and release both together.

    Data, hard negatives, training, encoding, index, evaluation, promotion: whatever the store has already is reused.
    """
    from flows.config import load

    settings = load(config, set_ or ())
    if dry_run:
        return _print_plan(settings)
    return _run(settings, summary, search=_search_options(config, set_ or ()))


def _print_plan(config: RunConfig) -> int:
    from flows.config import to_yaml
    from flows.pipeline import Pipeline, names

    config = config.resolved()
    champion = None
    if config.tracking.uri or (config.store / "mlflow.db").is_file():
        from flows.train_and_index import present_champion

        champion = present_champion(config)
    plan = Pipeline(config, champion).plan()
    width = names(plan)
    print(to_yaml(config) + "\n# What would be done (the whole output is valid as a configuration)")
    for planned in plan:
        print(f"# {planned.step.name:<{width}}  {planned}")
    print(f"# {'promote':<{width}}  run (a version that exists already is not made again)")
    return 0


def _search_options(config: Path, overrides: Sequence[str]) -> str:
    """Options with which `ullme search` finds what a run with these options releases."""
    told = [override for override in overrides if override.startswith(("store=", "tracking."))]
    return "".join(f" {shlex.quote(word)}" for word in ["--config", str(config), *(w for o in told for w in ("--set", o))])


def _run(config: RunConfig, summary: Path | None, *, search: str) -> int:
    started = time.monotonic()
    config = config.resolved()
    _say("starting Prefect and MLflow")
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    _log_plainly()
    from flows.train_and_index import train_and_index

    state = train_and_index(config=config.as_json(), return_state=True)  # type: ignore[arg-type]  # Prefect makes it a RunConfig
    found = state.result(raise_on_failure=False)
    if isinstance(found, UllmeError):
        raise found
    if isinstance(found, BaseException):
        raise found
    if not state.is_completed():
        _complain(f"the flow ended {state.name}: {state.message}")
        return 1
    found["seconds"] = round(time.monotonic() - started, 1)
    from rich.console import Console

    from flows.report import show

    show(found, Console(width=None if sys.stdout.isatty() else 132), search=search)
    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"summary: {summary}")
    return 0


def search_command(
    question: Annotated[str, Parameter(help="What you look for, in your own words.")],
    /,
    *,
    config: Annotated[
        Path | None,
        Parameter(name=["--config", "-c"], help="YAML file of the run that released the model: its store and model name are used."),
    ] = None,
    set_: Overrides = None,
    model_name: Annotated[str | None, Parameter(help="Registered name, in place of the configuration's (or `ullme`).")] = None,
    alias: Annotated[str, Parameter(help="Which version: champion is in use, challenger waits.")] = "champion",
    k: Annotated[int, Parameter(name=["-k", "--hits"], help="How many answers.")] = 5,
    as_json: Annotated[
        bool, Parameter(name="--json", negative=(), help="Print JSON: rank, score, id, title, text, excerpt.")
    ] = False,
) -> int:
    """Answer a question from the released model and index: rank, score, id and an excerpt of each document."""
    from flows.registry import Registry
    from flows.retriever import Retriever
    from flows.tracking import TrackingConfig
    from ullme.errors import ArtifactError, ConfigError

    if k < 1:
        raise ConfigError(f"-k: expected at least 1 answer, got {k}")
    store, tracking = Path(".store").resolve(), TrackingConfig()
    if config is not None:
        from flows.config import load

        settings = load(config, set_ or ())
        store, tracking = settings.store, settings.tracking
    if model_name is not None:
        tracking = tracking.model_copy(update={"model_name": model_name})
    if not tracking.uri and not (store / "mlflow.db").is_file():
        raise ConfigError(
            f"nothing was released in {store} yet; run `ullme run train-and-index --config FILE`, or name its --config"
        )
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
    print(f"\n{hit.rank:>2}  {hit.score:.3f}  {hit.id}" + (f"  {hit.title}" if hit.title else ""))
    print(textwrap.indent(hit.excerpt, "    "))


def setup_command() -> int:
    """Turn `prefect run` on everywhere for this Prefect profile, and make the concurrency limit of training (one at a time)."""
    import subprocess

    from flows.tasks import TRAINING_LIMIT

    prefect = [sys.executable, "-m", "prefect"]
    commands = [
        ([*prefect, "config", "set", "PREFECT_PLUGINS_ENABLED=true"], "`prefect run` is on in every folder"),
        ([*prefect, "gcl", "inspect", TRAINING_LIMIT], f"concurrency limit {TRAINING_LIMIT} is there"),
        (
            [*prefect, "gcl", "create", TRAINING_LIMIT, "--limit", "1"],
            f"concurrency limit {TRAINING_LIMIT} is made: one training at a time",
        ),
    ]
    for command, done in commands:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode == 0:
            print(done)
            if "inspect" in command:
                break
        elif "inspect" not in command:
            _complain(f"{' '.join(command[2:])}: {(finished.stderr or finished.stdout).strip().splitlines()[-1]}")
            return 1
    return 0


# Doors


def _run_app(name: str) -> App:
    examples = EXAMPLES.format(run="ullme run" if name == "run" else name)
    app = App(name=name, help="Run a pipeline.", help_epilogue=examples, help_format="plaintext", version_flags=[])
    app.command(train_and_index_command, name="train-and-index", help_epilogue=examples)
    return app


run_app = _run_app("ullme run")
"""`train-and-index`, as the doors share it."""

prefect_run = App(name="run", help="Run a pipeline of ullme: train-and-index.", help_flags=[], version_flags=[])
"""What the plugin adds to Prefect's commands. It hands every token on, so that usage mistakes end with our exit code."""


@prefect_run.default
def _prefect_door(*tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
    raise SystemExit(dispatch(_run_app("prefect run"), tokens))


def _ullme_app() -> App:
    app = App(name="ullme", help="Turn your LLM and your documents into a search that gets better every night.")
    app.command(_run_app("run"), name="run")
    app.command(search_command, name="search")
    app.command(setup_command, name="setup")
    return app


def main() -> None:
    """The console script `ullme`."""
    raise SystemExit(dispatch(_ullme_app(), sys.argv[1:]))


def dispatch(app: App, tokens: Sequence[str]) -> int:
    """Run a command of `app`; returns its exit code. A user's own mistake prints its lines, never a traceback."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    try:
        code = app(list(tokens) or ["--help"], exit_on_error=False, print_error=True, result_action="return_value")
    except cyclopts.CycloptsError:
        return USAGE  # cyclopts has printed what is wrong
    except UllmeError as error:
        _complain(_in_short(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; what is finished is kept, the same command goes on from there")
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except OSError as error:
        _complain(f"{error}; mend that and run the same command again, what is finished is kept")
        return 1
    except Exception as error:
        if "mlflow.exceptions" in sys.modules and isinstance(error, sys.modules["mlflow.exceptions"].MlflowException):
            said = next((line for line in str(error).splitlines() if "Error)" in line), str(error).splitlines()[0])
            _complain(f"MLflow cannot be written: {said}; free space or bring its server back, then run the same command again")
            return 1
        traceback.print_exc()
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code if isinstance(code, int) else 0


def _terminated(number: int, frame: Any) -> None:
    """Without this, a SIGTERM would leave Prefect's ephemeral server and the stage's process behind."""
    del number, frame
    raise SystemExit(TERMINATED)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _in_short(error: UllmeError) -> str:
    """The message; of a stage that crashed only the first and the last line, since its log stands above already."""
    if not isinstance(error, StageFailed) or error.cause:
        return str(error)
    last = next((line for line in reversed(error.log_tail) if line.strip()), "")
    return f"{str(error).partition(';')[0]}: {last}"


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
