"""Launch stages in a child process, forward its lines, and bring its end, whatever it was, back as a value or one error."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.stage import Outcome, Request, StageRequest
from ullme.artifacts import ArtifactRef
from ullme.errors import StageFailed

__all__ = ["run_stages"]

TAIL_LINES = 40
GRACE_S = 10.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Set for the child unless the caller's environment says otherwise. Idle OpenMP threads sleep: torch and faiss share the cores.
glibc's malloc keeps the memory of activations, in huge pages, instead of returning it after every layer: otherwise much of a
training step on a CPU is page faults."""


def run_stages(store: Path, stages: Sequence[StageRequest], say: Callable[[str], None]) -> list[tuple[ArtifactRef, float]]:
    """Run `stages` one after another in one child process; returns each one's reference and seconds.

    The child has a process group of its own, which ends with this call, however it ends.

    Args:
        store: root of the store.
        stages: what to run.
        say: called with each line that the child writes.

    Raises:
        StageFailed: the child did not finish them; carries the cause that it reported, or its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="ullme-") as folder:
        result = Path(folder) / "result.json"
        request = Request(store=store, stages=tuple(stages), result=result, parent=os.getpid())
        file = Path(folder) / "request.json"
        file.write_text(request.model_dump_json(), encoding="utf-8")
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.stage", str(file)],  # -P: a folder `flows` in the working directory is not ours
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**ENVIRONMENT, **({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}), **os.environ},
            process_group=0,
        )
        try:
            assert process.stdout is not None  # stdout=PIPE
            for line in process.stdout:
                tail.append(line.rstrip())
                say(line.rstrip())
            code = process.wait()
        finally:
            _end(process)
        outcome = Outcome.model_validate_json(result.read_text(encoding="utf-8")) if result.is_file() else Outcome()
    if code != 0 or len(outcome.refs) != len(stages):
        failed = outcome.failed or stages[min(len(outcome.refs), len(stages) - 1)].label
        raise StageFailed(failed, code, tail, cause=outcome.cause, message=outcome.message)
    return list(zip(outcome.refs, outcome.seconds, strict=True))


def _end(process: subprocess.Popen[str]) -> None:
    """End the child's process group: politely, then for certain."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the child itself started and left behind
    if process.stdout is not None:
        process.stdout.close()
