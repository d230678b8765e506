"""Launch stages in a child process, forward its lines, and bring its end, whatever it was, back as a value or one error.

A stage that takes longer, or holds more memory, than `limits` allow is ended. What was no mistake of a stage is tried
again, from where it was: once with half the token budget where memory did not suffice, `limits.retries` times where the
process crashed or was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from flows.limits import LimitsConfig
from flows.stage import OUT_OF_MEMORY, Outcome, Request, StageRequest
from ullme.artifacts import ArtifactRef
from ullme.disk import as_size
from ullme.errors import LimitExceeded, StageFailed
from ullme.heap import HEAP

__all__ = ["run_stages"]

TAIL_LINES = 40
GRACE_S = 10.0
LOOK_S = 0.25
ASKED_TO_STOP = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
BUDGET = "_tokens"
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    **HEAP,
}
"""Set for the child unless the caller's environment says otherwise. Idle OpenMP threads sleep: torch and faiss share the cores."""


@dataclass(frozen=True)
class _Ending:
    """How a child process ended: what it made and, where that is not everything, the error and what may be done about it.

    again: `smaller` = memory did not suffice; `same` = it crashed or was killed; empty = another run would end alike.
    """

    made: list[tuple[ArtifactRef, float]]
    error: StageFailed | None = None
    again: Literal["", "smaller", "same"] = ""
    why: str = ""


def run_stages(
    store: Path, stages: Sequence[StageRequest], say: Callable[[str], None], *, limits: LimitsConfig | None = None
) -> list[tuple[ArtifactRef, float]]:
    """Run `stages` one after another in a child process; returns each one's reference and seconds.

    The child has a process group of its own, which ends with this call, however it ends. A token budget is no part of an
    artifact's key, and a stage goes on from what it has written: one that is started again makes the same artifact.

    Args:
        store: root of the store.
        stages: what to run.
        say: called with each line that the child writes, and with one line whenever it is started again.
        limits: of each stage; None: the default ones.

    Raises:
        StageFailed: the child did not finish them; carries the cause that it reported, or its last lines.
    """
    limits = limits or LimitsConfig()
    left, made = list(stages), []
    crashes: Counter[str] = Counter()
    halved = False
    while left:
        ending = _run(store, left, say, limits)
        made += ending.made
        done = {stage.label: ref for stage, (ref, _) in zip(left, ending.made, strict=False)}
        left = [stage.given(done) for stage in left[len(ending.made) :]]
        if ending.error is None:
            break
        label = left[0].label
        budgets = _budgets(left[0].section)
        if ending.again == "smaller" and budgets and not halved:
            halved = True
            left = [stage.model_copy(update={"section": _halved(stage.section)}) for stage in left]
            what = f"once more with half the budget ({', '.join(budgets)})"
        elif ending.again == "same" and crashes[label] < limits.retries:
            crashes[label] += 1
            what = f"starting it again from where it was ({crashes[label]} of {limits.retries})"
        else:
            raise ending.error
        say(f"{time.strftime('%H:%M:%S')} {label}: warning: {ending.why}; {what}")
    return made


def _run(store: Path, stages: Sequence[StageRequest], say: Callable[[str], None], limits: LimitsConfig) -> _Ending:
    """One child process for `stages`."""
    with tempfile.TemporaryDirectory(prefix="ullme-") as folder:
        result, file = Path(folder) / "result.json", Path(folder) / "request.json"
        reserve = limits.reserve_bytes
        request = Request(store=store, reserve_bytes=reserve, stages=tuple(stages), result=result, parent=os.getpid())
        file.write_text(request.model_dump_json(), encoding="utf-8")
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        kills = _kills_for_memory()
        process = _launch(file)
        watch = _Watch(process, stages, limits, result)
        watch.start()
        try:
            assert process.stdout is not None  # stdout=PIPE
            for line in process.stdout:
                tail.append(line.rstrip())
                say(line.rstrip())
            code = process.wait()
        finally:
            watch.stop()
            _end(process)
            if process.stdout is not None:
                process.stdout.close()
        outcome = _read(result) or Outcome()
    if watch.broken is not None:
        outcome.cause, outcome.message = LimitExceeded.__name__, watch.broken.text
    elif code == -signal.SIGKILL and _kills_for_memory() > kills:
        outcome.cause, outcome.message = OUT_OF_MEMORY, "out of memory (the kernel ended it)"
    return _ending(outcome, stages, code, tail, ceiling=watch.broken is not None and watch.broken.memory)


def _ending(outcome: Outcome, stages: Sequence[StageRequest], code: int, tail: Sequence[str], *, ceiling: bool) -> _Ending:
    made = list(zip(outcome.refs, outcome.seconds, strict=True))
    if len(made) == len(stages):  # whatever ended the process after it had told of the last one
        return _Ending(made)
    label = outcome.failed or stages[min(len(made), len(stages) - 1)].label
    why, message = outcome.message, outcome.message
    again: Literal["", "smaller", "same"] = ""
    if ceiling or outcome.cause == OUT_OF_MEMORY:
        more = "raise limits.memory_gb" if ceiling else "run it where there is more memory"
        again, message = "smaller", f"{message}; lower its *{BUDGET} under `runtime`, or {more}"
    elif code < 0 and not outcome.cause and -code not in ASKED_TO_STOP:
        again, why = "same", f"its process was killed by signal {-code} ({signal.strsignal(-code)})"
    return _Ending(made, StageFailed(label, code, tail, cause=outcome.cause, message=message), again, why)


def _launch(request: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.stage", str(request)],  # -P: a folder `flows` in the working directory is not ours
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**ENVIRONMENT, **({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}), **os.environ},
        process_group=0,
    )


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


# Limits


@dataclass(frozen=True)
class _Broken:
    """A limit that was broken. memory: the ceiling of memory, not the time."""

    text: str
    memory: bool


class _Watch(threading.Thread):
    """Looks at the child's process group several times a second, and ends it when a stage breaks a limit.

    It also ends a group whose leader is gone: what is left of it would keep our pipe open for ever.
    """

    def __init__(self, process: subprocess.Popen[str], stages: Sequence[StageRequest], limits: LimitsConfig, result: Path) -> None:
        super().__init__(name="limits", daemon=True)
        self.broken: _Broken | None = None
        self._process, self._stages, self._limits, self._result = process, stages, limits, result
        self._launched = time.monotonic()
        self._over = threading.Event()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Look until told to stop, or until there is nothing left to look at."""
        while not self._over.wait(LOOK_S):
            if self._process.poll() is None:
                self.broken = self._look()
            if self.broken is not None or self._process.poll() is not None:
                _end(self._process)
                return

    def _look(self) -> _Broken | None:
        outcome = _read(self._result) or Outcome()
        if len(outcome.refs) >= len(self._stages):
            return None
        stage = self._stages[len(outcome.refs)].stage
        seconds, memory = self._limits.seconds(stage), self._limits.memory_bytes(stage)
        taken = time.monotonic() - (outcome.since or self._launched)
        if seconds is not None and taken > seconds:
            text = f"it takes longer than {seconds:g} s ({taken:.0f} s by now); raise limits.timeout_s and it goes on from there"
            return _Broken(text, memory=False)
        held = _memory_of_group(self._process.pid) if memory is not None else 0
        if memory is not None and held > memory:
            text = f"its processes hold {as_size(held)} of memory, {as_size(memory)} are allowed (limits.memory_gb)"
            return _Broken(text, memory=True)
        return None


def _read(result: Path) -> Outcome | None:
    return Outcome.model_validate_json(result.read_text(encoding="utf-8")) if result.is_file() else None


def _memory_of_group(group: int) -> int:
    """Bytes that the processes of a group hold, without the files that they have mapped."""
    held = 0
    for number in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
            if os.getpgid(number) == group:
                memory = psutil.Process(number).memory_info()
                held += memory.rss - memory.shared
    return held


def _kills_for_memory() -> int:
    """How often the kernel's out-of-memory killer has struck: in our control group, or where there is none, on this machine."""
    found = [counter for file in _counters() if (counter := _count(file)) is not None]
    return found[0] if found else 0


def _counters() -> list[Path]:
    """Files with a line `oom_kill N`, the nearest first (control groups of version 2 and 1, then the machine)."""
    files = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                files.append(Path(f"/sys/fs/cgroup{place}/memory.events"))
            elif "memory" in controllers.split(","):
                files.append(Path(f"/sys/fs/cgroup/memory{place}/memory.oom_control"))
    return [*files, Path("/proc/vmstat")]


def _count(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return None


# Budgets


def _budgets(section: Any) -> list[str]:
    """The token budgets of a section, and what half of them is: `chunk_tokens 4096 -> 2048`."""
    if not isinstance(section, dict):
        return [line for entry in section for line in _budgets(entry)] if isinstance(section, list) else []
    runtime = section.get("runtime")
    own = [f"{name} {value} -> {_half(value)}" for name, value in runtime.items() if _is_budget(name, value)] if runtime else []
    return own + [line for name, value in section.items() if name != "runtime" for line in _budgets(value)]


def _halved(section: Any) -> Any:
    """A section with every token budget under a `runtime` halved."""
    if isinstance(section, list):
        return [_halved(entry) for entry in section]
    if not isinstance(section, dict):
        return section
    return {
        name: {key: _half(v) if _is_budget(key, v) else v for key, v in value.items()} if name == "runtime" else _halved(value)
        for name, value in section.items()
    }


def _is_budget(name: str, value: Any) -> bool:
    return name.endswith(BUDGET) and isinstance(value, int) and value > 1


def _half(value: int) -> int:
    return value // 2
