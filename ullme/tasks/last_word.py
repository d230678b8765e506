"""The last word of a passage that nobody can guess from its last sentence alone (LAMBADA, arXiv 1606.06031)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ullme.tasks._language import LanguageTask, Unit, json_lines, scored_rows, spread

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["LastWordTask"]


class LastWordTask(LanguageTask):
    """Share of the passages whose last word is what the model writes, the likeliest token each time.

    path: lines of {"text": ...}. max_texts: so many of them, spread evenly; null: all.
    """

    max_texts: int | None = Field(default=None, ge=1)

    def units(self, encoder: Encoder) -> Sequence[Unit]:
        """One row per passage; all but its last word is given."""
        from ullme.batches import TokenRow

        texts = [str(record["text"]).strip() for record in json_lines(self.path, ["text"], '{"text": ...}')]
        found = []
        for place in spread(len(texts), self.max_texts):
            context, _, word = texts[place].rpartition(" ")
            if context and word:
                given = encoder.tokenizer(context)["input_ids"]
                answer = encoder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
                found.append(Unit(f"line {place + 1}", [TokenRow([*given, *answer], len(given))]))
        return found

    def measure(self, encoder: Encoder, units: Sequence[Unit], batch_tokens: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """accuracy."""
        rows = [unit.rows[0] for unit in units]
        right = scored_rows(encoder, rows, encoder.writes, batch_tokens=batch_tokens, name=self.label)
        return {"accuracy": float(right.mean())}, {"accuracy": right}
