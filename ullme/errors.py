"""Every error a user can meet, as one tree.

    UllmeError
    ├─ ConfigError    where (file:key), got, allowed, did you mean; all of them at once
    ├─ DataError      path:line and what is wrong with the record
    ├─ ContractError  noun, expected shape or dtype, got
    ├─ StageFailed    stage, exit code, tail of its log
    ├─ LimitExceeded  what it takes of disk, memory or time, what there is; nothing is lost, the next run goes on
    ├─ NotFinite      step, term, ids of the batch; never replaced by 0
    ├─ ArtifactError  reference: missing | digest differs | wrong kind
    └─ HubError       which hub, what it was asked, what it said; nothing here has changed

A message says what was expected, what came and what to do. A user's own mistake never shows a traceback:
the command line prints `str(error)` and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "ConfigError",
    "ContractError",
    "DataError",
    "HubError",
    "LimitExceeded",
    "NotFinite",
    "StageFailed",
    "UllmeError",
]


class UllmeError(Exception):
    """Base of every error raised on purpose by this project."""

    exit_code = 1


class ConfigError(UllmeError):
    """One or more configuration mistakes, each a full line of its own."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class DataError(UllmeError):
    """Records that cannot be used, each `path:line: what is wrong`."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class ContractError(UllmeError):
    """A value broke the contract of its noun (shape, dtype, range, uniqueness)."""


class StageFailed(UllmeError):
    """A stage's process ended without an artifact.

    `log_tail` holds its last lines; `cause` the class name of the error that the stage reported, if it did;
    `exit_code` is what the command line leaves with (2 when the cause is the user's configuration or data).
    """

    def __init__(self, stage: str, code: int, log_tail: Sequence[str], *, cause: str = "", message: str = "") -> None:
        self.stage, self.code, self.log_tail, self.cause = stage, code, tuple(log_tail), cause
        if message:
            text = f"stage {stage} failed: {message}"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            text = f"stage {stage} {how}; its last lines:\n" + "\n".join(f"  | {line}" for line in log_tail)
        if cause in {"ConfigError", "DataError"}:
            self.exit_code = 2
        super().__init__(text)


class LimitExceeded(UllmeError):
    """Disk, memory or time does not suffice; says how much it takes and how much there is."""


class NotFinite(UllmeError):
    """A loss, gradient or embedding is NaN or infinite; training stops and keeps the last good checkpoint.

    step: of training, or None outside of it. ids: the batch's queries, or the documents.
    """

    def __init__(self, step: int | None, term: str, ids: Sequence[str]) -> None:
        self.step, self.term, self.ids = step, term, tuple(ids)
        shown = ", ".join(self.ids[:8]) + (" ..." if len(self.ids) > 8 else "")
        if step is None:
            text = f"{term} is not finite (documents: {shown}); the weights are damaged, or overflow: try backbone.dtype: float32"
        else:
            text = (
                f"step {step}: {term} is not finite (queries of the batch: {shown}); lower the learning rate, "
                "or look at these records; the last checkpoint is kept and the next run resumes from it"
            )
        super().__init__(text)

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int | None, str, tuple[str, ...]]]:
        return type(self), (self.step, self.term, self.ids)


class ArtifactError(UllmeError):
    """An artifact is missing, damaged, or of another kind than asked for."""


class HubError(UllmeError):
    """A model hub is not there, does not let us in, or refuses what it was given."""
