"""What the tasks that measure a language model share: its rows in batches, with and without adapters."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.artifacts import digest_of, sha256_file
from ullme.errors import ConfigError, DataError
from ullme.evaluation import Evaluation, Measured, Task
from ullme.progress import Progress
from ullme.systems import VectorSystem

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.batches import Batch, TokenRow
    from ullme.encoder import Encoder

__all__ = ["LanguageTask", "Unit", "json_lines", "scored_rows", "spread"]

WITHOUT = "_adapters_off"


@dataclass(frozen=True)
class Unit:
    """What a mean is taken over: a window, a passage, a question. rows: of tokens, what is given marked as prompt.

    right: which of the rows is the right answer; characters: of each answer.
    """

    name: str
    rows: Sequence[TokenRow]
    right: int = 0
    characters: Sequence[int] = ()


class LanguageTask(Task):
    """Base of the kinds that measure what a model writes, in its causal mode, from a file.

    path: the file. source_digest: fingerprint of its contents, filled in by `resolved()`.
    """

    path: Path
    source_digest: str = ""

    def resolved(self) -> LanguageTask:
        """A copy that names the contents of the file.

        Raises:
            ConfigError: there is none, or its contents are others than were pinned.
        """
        if not self.path.is_file():
            raise ConfigError(f"evaluation.tasks: {self.label}: no such file: {self.path}")
        found = sha256_file(self.path)
        if self.source_digest not in ("", found):
            raise ConfigError(f"evaluation.tasks: {self.label}: {self.path} is not the file that source_digest names")
        return self.model_copy(update={"source_digest": found})

    def run(self, evaluation: Evaluation) -> Measured | None:
        """Measure the model's language, and, where adapters are attached, the same with them switched off.

        Raises:
            DataError: the file has nothing to measure on.
        """
        if not isinstance(evaluation.system, VectorSystem):
            return None
        encoder = evaluation.system.encoder
        units = self.units(encoder)
        if not units:
            raise DataError(f"evaluate {self.label}: {self.path} has nothing to measure on")
        scores: dict[str, float] = {}
        per_unit: dict[str, np.ndarray] = {}
        for ending, switched in (("", nullcontext), *(((WITHOUT, encoder.adapters_off),) if encoder.has_adapter else ())):
            with switched():
                whole, each = self.measure(encoder, units, evaluation.section.runtime.batch_tokens)
            scores |= {f"{name}{ending}": round(value, 5) for name, value in whole.items()}
            per_unit |= {f"{name}{ending}": values for name, values in each.items()}
        digest = digest_of([self.source_digest, self.identity()])
        return Measured(
            query_ids=[unit.name for unit in units],
            documents=len(units),
            digests={"corpus": digest, "queries": digest},
            scores={"exact": scores},
            per_query={"exact": per_unit},
            judgements=[digest_of([digest, unit.name])[:16] for unit in units],
        )

    @abstractmethod
    def units(self, encoder: Encoder) -> Sequence[Unit]:
        """What is measured on."""

    @abstractmethod
    def measure(self, encoder: Encoder, units: Sequence[Unit], batch_tokens: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(metric -> value, metric -> Float64 per unit whose mean it is)."""


def spread(count: int, most: int | None) -> list[int]:
    """Places 0 to count - 1, at most so many, evenly."""
    return [int(place) for place in np.linspace(0, count - 1, min(count, most or count))]


def json_lines(path: Path, fields: Sequence[str], expected: str) -> list[dict[str, Any]]:
    """The records of a file, each with these fields.

    Raises:
        DataError: a line is something else; names it.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or any(field not in record for field in fields):
            raise DataError(f"{path}:{number}: expected {expected}")
        records.append(record)
    return records


def scored_rows(
    encoder: Encoder, rows: Sequence[TokenRow], score: Callable[[Batch], Tensor], *, batch_tokens: int, name: str
) -> np.ndarray:
    """Float64[N]: `score` of every row, in order. batch_tokens: padded tokens per forward pass."""
    import torch

    from ullme.batches import chunk_by_tokens

    found = np.empty(len(rows))
    with torch.inference_mode(), Progress(len(rows), name, unit="row") as progress:
        for chunk in chunk_by_tokens([len(row) for row in rows], batch_tokens):
            found[chunk] = score(encoder.collate([rows[place] for place in chunk])).double().cpu().numpy()
            progress.advance(len(chunk))
    return found
