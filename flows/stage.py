"""`python -m flows.stage REQUEST.json`: what a child process runs. Composes ullme and indexes; no prefect, no mlflow.

A request names stages to run one after another in this process (imports are paid once), where the store lies, and where
the results go. Log lines go to stdout as `HH:MM:SS stage: message`; progress bars to stderr, if that is a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from indexes.index import Index, IndexKind, build
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store, write_atomic
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.components import Section, resolve
from ullme.data import PREPARE, DataConfig
from ullme.encoding import ENCODE, EncodeConfig, open_embeddings
from ullme.errors import ContractError, UllmeError
from ullme.evaluation import EVALUATE, EvalConfig, evaluate
from ullme.mining import MINE, MiningConfig
from ullme.training import TRAIN, TrainConfig

__all__ = ["STAGES", "Outcome", "Request", "StageRequest", "Work", "main"]


def build_index(section: IndexKind, inputs: Inputs, draft: Draft) -> None:
    """Stage: embeddings -> index."""
    draft.restart()
    vectors = open_embeddings(inputs["embeddings"])
    draft.meta |= build(section, vectors.shards, out=draft.path, fingerprint=vectors.fingerprint, seed=draft.seed)


def open_index(path: Path, fingerprint: str) -> Index:
    """The index at `path`, refused unless `fingerprint` is that of the model that made it."""
    return Index.open(path, fingerprint=fingerprint)


@dataclass(frozen=True)
class Work:
    """A stage, how its section is read back, and whether chance plays a part in it (then the run's seed is in its key)."""

    stage: Stage
    section: Callable[[Any], Section]
    seeded: bool = True


STAGES: dict[str, Work] = {
    "data": Work(PREPARE, DataConfig.model_validate, seeded=False),
    "backbone": Work(BACKBONE, BackboneConfig.model_validate, seeded=False),
    "mine": Work(MINE, MiningConfig.model_validate),
    "train": Work(TRAIN, TrainConfig.model_validate),
    "encode": Work(ENCODE, EncodeConfig.model_validate, seeded=False),
    "index": Work(Stage("index", "index", 1, build_index), partial(resolve, "indexes")),
    "evaluate": Work(replace(EVALUATE, run=partial(evaluate, open_index=open_index)), EvalConfig.model_validate),
}


class StageRequest(BaseModel):
    """One stage to run: `label` is its name in logs, `key` the artifact key that the parent expects."""

    model_config = ConfigDict(frozen=True)

    label: str
    stage: str
    section: dict[str, Any]
    refs: dict[str, ArtifactRef]
    seed: int
    key: str


class Request(BaseModel):
    """What a child process is asked to do. `parent`: process that must stay alive; `result`: file that is written."""

    model_config = ConfigDict(frozen=True)

    store: Path
    stages: tuple[StageRequest, ...]
    result: Path
    parent: int


class Outcome(BaseModel):
    """What came of it: the stages that ended well, in order, and the error of the first that did not."""

    refs: list[ArtifactRef] = []
    seconds: list[float] = []
    failed: str = ""
    cause: str = ""
    message: str = ""


class _Lines(logging.Formatter):
    """`HH:MM:SS stage: message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(stage)s: %(message)s", datefmt="%H:%M:%S")
        self.stage = "stage"

    def format(self, record: logging.LogRecord) -> str:
        record.stage = self.stage
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.msg, record.args = prefix + record.getMessage().removeprefix(f"{self.stage}: "), ()
        return super().format(record)


def main(arguments: Sequence[str]) -> int:
    """Run the stages of the request in `arguments[0]`; returns the exit code."""
    request = Request.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    _end_with(request.parent)
    lines = _log_to_stdout()
    store = Store(request.store)
    outcome = Outcome()
    for item in request.stages:
        lines.stage = item.label
        work = STAGES[item.stage]
        started = time.monotonic()
        try:
            section = work.section(item.section)
            key = store.key(work.stage, section, item.refs, seed=item.seed)
            if key != item.key:
                raise ContractError(
                    f"expected the artifact key {item.key}, got {key}: the section does not survive its way through JSON, or the "
                    "installed package changed during the run; run again"
                )
            ref = store.produce(work.stage, section, item.refs, seed=item.seed)
        except UllmeError as error:
            outcome.failed, outcome.cause, outcome.message = item.label, type(error).__name__, str(error)
            write_atomic(request.result, outcome.model_dump_json())
            return error.exit_code
        except OSError as error:  # a full disk, a folder that may not be written: the machine's trouble, not a mistake in the code
            outcome.failed, outcome.cause, outcome.message = item.label, type(error).__name__, f"{error}; mend that and run again"
            with contextlib.suppress(OSError):
                write_atomic(request.result, outcome.model_dump_json())
            return 1
        except Exception:
            logging.getLogger("flows.stage").error("%s", traceback.format_exc())
            outcome.failed = item.label
            write_atomic(request.result, outcome.model_dump_json())
            return 1
        seconds = time.monotonic() - started
        logging.getLogger("flows.stage").info("made %s in %.1f s", ref, seconds)
        outcome.refs.append(ref)
        outcome.seconds.append(seconds)
        write_atomic(request.result, outcome.model_dump_json())
    return 0


def _log_to_stdout() -> _Lines:
    lines = _Lines()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(lines)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("ullme", "indexes", "flows"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    return lines


def _end_with(parent: int) -> None:
    """End this process and its group when the parent is gone, even one that was killed with signal 9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
