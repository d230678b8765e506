"""`python -m flows.stage REQUEST.json`: what a child process runs. Composes ullme and indexes; no prefect, no mlflow.

A request names stages to run one after another in this process (imports are paid once), where the store lies, and where
the results go. Log lines go to stdout as `HH:MM:SS stage: message`; progress bars to stderr, if that is a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from indexes.build import build, found_device, space
from indexes.index import Index
from indexes.kind import IndexKind
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store, write_atomic
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.components import Section, resolve
from ullme.data import PREPARE, DataConfig
from ullme.encoding import ENCODE, EncodeConfig, open_embeddings
from ullme.errors import ContractError, UllmeError
from ullme.evaluation import EVALUATE, EvalConfig, evaluate
from ullme.mining import MINE, MiningConfig
from ullme.synthetic import SYNTHESISE, SyntheticConfig
from ullme.training import TRAIN, TrainConfig

__all__ = ["OUT_OF_MEMORY", "STAGES", "Outcome", "Request", "StageRequest", "Work", "main"]


OUT_OF_MEMORY = "OutOfMemory"
OUT_OF_MEMORY_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
"""What torch (on a CPU and on a GPU) and faiss say in a RuntimeError."""
EARLIER_INDEXES = 3
DOCUMENT_BYTES, QUERY_BYTES = 700, 200


def build_index(section: IndexKind, inputs: Inputs, draft: Draft) -> None:
    """Stage: embeddings -> index. The store's newest indexes are gone on with where they fit (see `indexes.build`)."""
    draft.restart()
    vectors = open_embeddings(inputs["embeddings"])
    earlier = [ref.path for ref in inputs.store.finished("index")[:EARLIER_INDEXES]]
    draft.meta |= build(
        section,
        vectors.shards,
        out=draft.path,
        fingerprint=vectors.fingerprint,
        seed=draft.seed,
        queries=vectors.queries(),
        earlier=earlier,
        device=found_device(),
    )


def open_index(path: Path, fingerprint: str) -> Index:
    """The index at `path`, refused unless `fingerprint` is that of the model that made it."""
    return Index.open(path, fingerprint=fingerprint)


def data_space(section: DataConfig, inputs: Inputs) -> int | None:
    """About the bytes of a data artifact: no more than the source's files, nor than what the caps let through.

    None where neither is known. Nobody has read the source yet: the sizes of a document and a query are typical ones.
    """
    del inputs
    bounds = []
    sources = (section.source, *section.auxiliary.values())
    values = [getattr(source, name) for source in sources for name in type(source).model_fields]
    paths = [path for value in values for path in (value if isinstance(value, tuple) else (value,)) if isinstance(path, Path)]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    if files:
        bounds.append(sum(file.stat().st_size for file in files))
    caps = [section.max_train_queries, section.max_dev_queries, section.max_test_queries]
    queries = sum(cap for cap in caps if cap is not None)
    if section.max_documents is not None and None not in caps and not section.auxiliary:
        bounds.append(DOCUMENT_BYTES * (section.max_documents + queries) + QUERY_BYTES * queries)
    return min(bounds, default=None)


@dataclass(frozen=True)
class Work:
    """A stage, how its section is read back, and whether chance plays a part in it (then the run's seed is in its key)."""

    stage: Stage
    section: Callable[[Any], Section]
    seeded: bool = True


STAGES: dict[str, Work] = {
    "data": Work(replace(PREPARE, space=data_space), DataConfig.model_validate, seeded=False),
    "backbone": Work(BACKBONE, BackboneConfig.model_validate, seeded=False),
    "mine": Work(MINE, MiningConfig.model_validate),
    "synthesise": Work(SYNTHESISE, SyntheticConfig.model_validate),
    "train": Work(TRAIN, TrainConfig.model_validate),
    "encode": Work(ENCODE, EncodeConfig.model_validate, seeded=False),
    "index": Work(Stage("index", "index", 3, build_index, space), partial(resolve, "indexes")),
    "evaluate": Work(replace(EVALUATE, run=partial(evaluate, open_index=open_index)), EvalConfig.model_validate),
}


class StageRequest(BaseModel):
    """One stage to run.

    label: its name in logs. after: input -> label of an earlier stage of the same request that makes it. key: of the
    artifact that the parent expects; empty where it follows from what those stages make.
    """

    model_config = ConfigDict(frozen=True)

    label: str
    stage: str
    section: dict[str, Any]
    refs: dict[str, ArtifactRef]
    seed: int
    key: str = ""
    after: dict[str, str] = {}

    def given(self, made: Mapping[str, ArtifactRef]) -> StageRequest:
        """With the inputs that these stages (label -> artifact) have made."""
        found = {name: made[label] for name, label in self.after.items() if label in made}
        rest = {name: label for name, label in self.after.items() if name not in found}
        return self.model_copy(update={"refs": {**self.refs, **found}, "after": rest})


class Request(BaseModel):
    """What a child process is asked to do.

    reserve_bytes: what stays free on the store's disk, or None for the default. parent: process that must stay alive.
    result: file that the `Outcome` is written to, at the start and at the end of every stage.
    """

    model_config = ConfigDict(frozen=True)

    store: Path
    reserve_bytes: int | None = None
    stages: tuple[StageRequest, ...]
    result: Path
    parent: int


class Outcome(BaseModel):
    """What came of it: the stages that ended well, in order, and the error of the first that did not.

    since: when the stage now running began, by `time.monotonic()`, which every process of a machine shares; None before
    the first. cause: class name of the error, or `OUT_OF_MEMORY`; empty for a mistake in the code.
    """

    refs: list[ArtifactRef] = []
    seconds: list[float] = []
    since: float | None = None
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
    store = Store(request.store, reserve_bytes=request.reserve_bytes)
    outcome = Outcome()
    made: dict[str, ArtifactRef] = {}
    for item in request.stages:
        lines.stage = item.label
        started = outcome.since = time.monotonic()
        _write(outcome, request.result)
        try:
            ref = made[item.label] = _run(item.given(made), store)
        except Exception as error:
            outcome.failed = item.label
            outcome.cause, outcome.message = _explained(error)
            if not outcome.cause:
                logging.getLogger("flows.stage").error("%s", traceback.format_exc())
            _write(outcome, request.result)
            return error.exit_code if isinstance(error, UllmeError) else 1
        seconds = time.monotonic() - started
        logging.getLogger("flows.stage").info("made %s in %.1f s", ref, seconds)
        outcome.refs.append(ref)
        outcome.seconds.append(seconds)
    try:
        write_atomic(request.result, outcome.model_dump_json())
    except OSError as error:
        logging.getLogger("flows.stage").error("%s; mend that and run again", error)
        return 1
    return 0


def _run(item: StageRequest, store: Store) -> ArtifactRef:
    work = STAGES[item.stage]
    section = work.section(item.section)
    key = store.key(work.stage, section, item.refs, seed=item.seed)
    if item.key and key != item.key:
        raise ContractError(
            f"expected the artifact key {item.key}, got {key}: the section does not survive its way through JSON, or the "
            "installed package changed during the run; run again"
        )
    return store.produce(work.stage, section, item.refs, seed=item.seed)


def _write(outcome: Outcome, file: Path) -> None:
    """Tell the parent. Where even that cannot be written, the exit code and the last lines have to do."""
    with contextlib.suppress(OSError):
        write_atomic(file, outcome.model_dump_json())


def _explained(error: Exception) -> tuple[str, str]:
    """(cause, message in one line) of what went wrong, or two empty texts for a mistake in the code."""
    if isinstance(error, UllmeError):
        return type(error).__name__, str(error)
    said = (str(error).strip().splitlines() or [""])[0]
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
    if isinstance(error, MemoryError) or full or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return OUT_OF_MEMORY, f"out of memory ({said or type(error).__name__})"
    if isinstance(error, OSError):  # a folder that may not be written: the machine's trouble, not a mistake in the code
        return type(error).__name__, f"{error}; mend that and run again"
    return "", ""


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
