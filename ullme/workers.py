"""Several processes that share the encoding of a corpus: one per GPU, each with a model of its own and every n-th shard.

A worker is `python -m ullme.workers`. It reads its job as one line from stdin and says on stdout, a JSON object a line, how
far it is, what is to be logged and how it ended. stdin stays open as long as the parent lives: when it closes, even because
the parent was killed, the worker ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

from pydantic import BaseModel

from ullme import errors
from ullme.encoding import Encoded, EncodeJob, encode_part
from ullme.errors import LimitExceeded, NotFinite, StageFailed, UllmeError
from ullme.progress import Progress
from ullme.shards import drop_shards_from

__all__ = ["encode_in_workers", "encode_job", "main"]

logger = logging.getLogger(__name__)

TAIL_LINES = 40
GRACE_S = 10.0
TELL_EVERY_S = 0.5
KILLED = -9


class Worker(BaseModel):
    """What a worker is told. threads: of the CPU; 0 = as many as torch likes."""

    job: EncodeJob
    device: str
    threads: int


def encode_job(job: EncodeJob) -> Encoded:
    """Encode the shards of `job`: in this process if its runtime says one, else in workers.

    Raises:
        What `encode_in_workers` does.
    """
    if len(_workers(job)) > 1:
        return encode_in_workers(job)
    drop_shards_from(job.out, job.shards)
    with _progress(job) as progress:
        return encode_part(job, progress.advance)


def encode_in_workers(job: EncodeJob) -> Encoded:
    """Encode the shards of `job` in processes of their own. Shards beyond the corpus are removed.

    Raises:
        LimitExceeded: a worker was killed. StageFailed: it crashed. Besides, the error that a worker has reported.
    """
    drop_shards_from(job.out, job.shards)
    workers = _workers(job)
    logger.info("encode: %d process%s (%s)", len(workers), "es" * (len(workers) > 1), ", ".join(w.device for w in workers))
    with _progress(job) as progress:
        return sum(_together(workers, progress.advance), Encoded())


def _progress(job: EncodeJob) -> Progress:
    rows = job.runtime.shard_rows
    return Progress(sum(min(rows, job.count - number * rows) for number in job.numbers), "encode", unit="document")


def _workers(job: EncodeJob) -> list[Worker]:
    """A part of the job for every process, and where it computes."""
    import torch

    cards = torch.cuda.device_count()
    wanted = job.runtime.processes
    count = max(1, min(len(job.numbers), max(1, cards) if wanted == "auto" else wanted))
    threads = 0 if cards else max(1, torch.get_num_threads() // count)
    return [
        Worker(
            job=job.model_copy(update={"part": job.part + job.parts * number, "parts": job.parts * count}),
            device=f"cuda:{number % cards}" if cards else "cpu",
            threads=threads,
        )
        for number in range(count)
    ]


# The parent


class _Process:
    """A worker's process, and the last lines that it wrote."""

    def __init__(self, worker: Worker, number: int, told: Queue[tuple[int, str | None]]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.outcome: dict[str, Any] | None = None
        self._number, self._told = number, told
        command = [sys.executable, "-P", "-m", "ullme.workers"]  # -P: a folder `ullme` in the working directory is not ours
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        self._reader = threading.Thread(target=self._read, name=f"worker {number}", daemon=True)
        self._reader.start()
        assert self._process.stdin is not None  # stdin=PIPE
        with contextlib.suppress(BrokenPipeError):  # it has ended already; what it wrote says why
            self._process.stdin.write(worker.model_dump_json() + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None  # stdout=PIPE
        with self._process.stdout as lines:
            for line in lines:
                self._told.put((self._number, line.rstrip()))
        self._told.put((self._number, None))

    def code(self) -> int:
        """Its exit code, when it has closed its output."""
        return self._process.wait()

    def end(self) -> None:
        """End it, if it still runs: politely, then for certain."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()


def _together(workers: Sequence[Worker], advance: Callable[[int], None]) -> Iterator[Encoded]:
    """Run all workers; when one fails, the others are ended and its error is raised."""
    told: Queue[tuple[int, str | None]] = Queue()
    processes: list[_Process] = []
    try:
        for number, worker in enumerate(workers):
            processes.append(_Process(worker, number, told))
        running = len(processes)
        while running:
            number, line = told.get()
            if line is not None:
                _hear(processes[number], line, advance)
                continue
            running -= 1
            yield _result(processes[number], number, len(processes))
    finally:
        for process in processes:
            process.end()


def _hear(process: _Process, line: str, advance: Callable[[int], None]) -> None:
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict):  # a library's own words
        process.tail.append(line)
    elif "done" in said:
        advance(said["done"])
    elif "log" in said:
        process.tail.append(said["log"])
        logger.log(said["level"], "%s", said["log"])
    else:
        process.outcome = said


def _result(process: _Process, number: int, count: int) -> Encoded:
    code, said = process.code(), process.outcome or {}
    if code == 0 and "encoded" in said:
        return Encoded.model_validate(said["encoded"])
    if "error" in said:
        raise _rebuilt(said["error"], said["message"], said["ids"])
    if code == KILLED:
        raise LimitExceeded(
            f"encode: process {number + 1} of {count} was killed by signal 9, mostly because memory did not suffice; use fewer "
            "processes or a smaller batch_tokens and run again: what is finished is kept"
        )
    raise StageFailed("encode", code, process.tail)


def _rebuilt(name: str, message: str, ids: Sequence[str]) -> Exception:
    """The error that a worker has reported."""
    if name == NotFinite.__name__:
        return NotFinite(None, "an embedding", ids)
    return OSError(message) if name == OSError.__name__ else getattr(errors, name)(message)


# The worker


def main() -> int:
    """Do the job that stdin names; returns the exit code."""
    worker = Worker.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()], force=True)
    logging.getLogger("ullme").setLevel(logging.INFO)
    logging.captureWarnings(True)
    import torch

    if worker.device.startswith("cuda"):
        torch.cuda.set_device(worker.device)  # or else libraries make themselves a context on the first GPU too
    if worker.threads:
        torch.set_num_threads(worker.threads)
    teller = _Teller()
    try:
        encoded = encode_part(worker.job, teller.advance, device=worker.device)
    except (UllmeError, OSError) as error:
        name = type(error).__name__ if isinstance(error, UllmeError) else OSError.__name__
        ids = list(error.ids) if isinstance(error, NotFinite) else []
        _say({"error": name, "message": str(error), "ids": ids})
        return 1
    teller.tell()
    _say({"encoded": encoded.model_dump()})
    return 0


def _end_with_parent() -> None:
    """stdin is held open by the parent alone; at its end nobody wants the result any more."""
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read(): its lock would be held when Python ends
        pass
    os._exit(1)


class _Teller:
    """Tells the parent how many documents are done, not too often."""

    def __init__(self) -> None:
        self._done, self._told = 0, time.monotonic()

    def advance(self, count: int) -> None:
        """Count documents that are done."""
        self._done += count
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Say what has not been said."""
        if self._done:
            _say({"done": self._done})
        self._done, self._told = 0, time.monotonic()


class _Lines(logging.Handler):
    """Log records as lines for the parent."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        _say({"log": self.format(record), "level": record.levelno})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
