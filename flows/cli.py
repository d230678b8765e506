"""The doors: `ullme run|search|setup`, `prefect run`, `python -m flows`. One app, three doors; light until a command runs.

Exit codes: 0 well, 1 a failed run, 2 a mistake in the command, the configuration or the data, 130 interrupted, 143 ended.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from flows.commands.doctor import doctor_command
from flows.commands.encode import ENCODE_EXAMPLES, encode_command
from flows.commands.gc import gc_command
from flows.commands.history import history_command
from flows.commands.merge import MERGE_EXAMPLES, merge_command
from flows.commands.options import complain
from flows.commands.push import PUSH_EXAMPLES, push_command
from flows.commands.rollback import rollback_command
from flows.commands.run import STAGE_VERBS, refresh_command, stage_command, train_and_index_command
from flows.commands.search import search_command
from flows.commands.setup import setup_command, worker_command
from ullme.errors import StageFailed, UllmeError

__all__ = ["main", "prefect_run", "run_app"]

EXAMPLES = """Examples:

  {run} train-and-index --config configs/smoke.yaml
  {run} refresh --config configs/smoke.yaml
  {run} train-and-index --config configs/quickstart.yaml --dry-run
  {run} train-and-index --config configs/quickstart.yaml \\
      --set training.phases.0.steps=20 --set index.kind=flat
"""
RUN_HELP = "Run a pipeline of ullme, or one stage of it: train-and-index, refresh, mine, train, encode, index, evaluate, promote."
USAGE, INTERRUPTED, TERMINATED = 2, 130, 143
ENVIRONMENT = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # a fresh home runs its migrations first
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # of a tracking server that is away; the default waits for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set unless the caller's environment says otherwise."""

# Doors


def _run_app(name: str) -> App:
    examples = EXAMPLES.format(run="ullme run" if name == "run" else name)
    app = App(
        name=name, help="Run a pipeline, or one stage of it.", help_epilogue=examples, help_format="plaintext", version_flags=[]
    )
    app.command(train_and_index_command, name="train-and-index", help_epilogue=examples)
    app.command(refresh_command, name="refresh")
    for stage in STAGE_VERBS:
        app.command(stage_command(stage), name=stage)
    return app


run_app = _run_app("ullme run")
"""`train-and-index`, `refresh` and the stages, as the doors share them."""

prefect_run = App(name="run", help=RUN_HELP, help_flags=[], version_flags=[])
"""What the plugin adds to Prefect's commands. It hands every token on, so that usage mistakes end with our exit code."""


@prefect_run.default
def _prefect_door(*tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
    raise SystemExit(dispatch(_run_app("prefect run"), tokens))


def _ullme_app() -> App:
    app = App(name="ullme", help="Turn your LLM and your documents into a search that gets better every night.")
    app.command(_run_app("run"), name="run")
    app.command(search_command, name="search")
    app.command(encode_command, name="encode", help_epilogue=ENCODE_EXAMPLES, help_format="plaintext")
    app.command(merge_command, name="merge", help_epilogue=MERGE_EXAMPLES, help_format="plaintext")
    app.command(history_command, name="history")
    app.command(rollback_command, name="rollback")
    app.command(push_command, name="push", help_epilogue=PUSH_EXAMPLES, help_format="plaintext")
    app.command(gc_command, name="gc")
    app.command(doctor_command, name="doctor")
    app.command(setup_command, name="setup")
    app.command(worker_command, name="worker")
    return app


def main() -> None:
    """The console script `ullme`."""
    raise SystemExit(dispatch(_ullme_app(), sys.argv[1:]))


def dispatch(app: App, tokens: Sequence[str]) -> int:
    """Run a command of `app`; returns its exit code. A user's own mistake prints its lines, never a traceback."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    os.environ["ULLME_OWNER"] = str(os.getpid())  # by it `flows.liveness` finds a temporary Prefect server that was left alone
    try:
        code = app(list(tokens) or ["--help"], exit_on_error=False, print_error=True, result_action="return_value")
    except cyclopts.CycloptsError:
        return USAGE  # cyclopts has printed what is wrong
    except UllmeError as error:
        complain(_in_short(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; what is finished is kept, the same command goes on from there")
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except OSError as error:
        complain(f"{error}; mend that and run the same command again, what is finished is kept")
        return 1
    except Exception as error:
        if "mlflow.exceptions" in sys.modules and isinstance(error, sys.modules["mlflow.exceptions"].MlflowException):
            said = next((line for line in str(error).splitlines() if "Error)" in line), str(error).splitlines()[0])
            complain(f"MLflow cannot be written: {said}; free space or bring its server back, then run the same command again")
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


def _in_short(error: UllmeError) -> str:
    """The message; of a stage that crashed only the first and the last line, since its log stands above already."""
    if not isinstance(error, StageFailed) or error.cause:
        return str(error)
    last = next((line for line in reversed(error.log_tail) if line.strip()), "")
    return f"{str(error).partition(';')[0]}: {last}"
