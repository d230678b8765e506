"""Perplexity of running text: what a model has kept, or lost, of its language."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ullme.tasks._language import LanguageTask, Unit, scored_rows, spread

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["PerplexityTask"]


class PerplexityTask(LanguageTask):
    """exp of the mean of -log p(token | tokens before it in its window), over a text file in windows that do not overlap.

    window: tokens, the first of which is given; max_windows: so many of them, spread evenly; null: all. Comparable between models
    of one tokenizer alone.
    """

    window: int = Field(default=512, ge=2)
    max_windows: int | None = Field(default=None, ge=1)

    def units(self, encoder: Encoder) -> Sequence[Unit]:
        """One row per window."""
        from ullme.batches import TokenRow

        begin = list(encoder.prompts.begin)
        ids = encoder.tokenizer(self.path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - 1, self.window)
        return [
            Unit(f"token {start}", [TokenRow([*begin, *ids[start : start + self.window]], max(1, len(begin)))])
            for start in (starts[place] for place in spread(len(starts), self.max_windows))
        ]

    def measure(self, encoder: Encoder, units: Sequence[Unit], batch_tokens: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """perplexity, and nll: the mean over windows of -log p per token."""
        rows = [unit.rows[0] for unit in units]
        lengths = np.array([len(row) - row.prompt for row in rows])
        sums = -scored_rows(encoder, rows, lambda b: encoder.sequence_logprobs(b)[0], batch_tokens=batch_tokens, name=self.label)
        nll = sums / lengths
        return {"perplexity": math.exp(sums.sum() / lengths.sum()), "nll": float(nll.mean())}, {"nll": nll}
