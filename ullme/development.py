"""Some training queries set aside: how well the model finds their passages as training goes on, and when it was best.

They are chosen by the seed; what shares a passage with them is not trained on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ullme.components import Section
from ullme.data import Example
from ullme.errors import DataError

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["DevelopmentConfig", "reciprocal_rank", "set_aside"]


class DevelopmentConfig(Section):
    """Measure in the last phase, keep its best weights, stop when there is no more to gain."""

    queries: int = Field(default=64, ge=4)
    """Training queries set aside."""
    every: int = Field(default=50, ge=1)
    """Steps of the last phase between measurements; there is one at its end, too."""
    patience: int | None = Field(default=None, ge=1)
    """Measurements without a better one after which training ends; null: it runs to its end."""


def set_aside(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, to measure on).

    Raises:
        DataError: there are not enough.
    """
    chosen = np.random.default_rng([seed, 3]).permutation(len(examples))[:count].tolist()
    aside = [examples[place] for place in sorted(chosen)]
    answers = {identifier for example in aside for identifier in example.positive_ids}
    queries = {example.query_id for example in aside}
    rest = [e for e in examples if e.query_id not in queries and not answers & set(e.positive_ids)]
    if len(aside) < count or len(rest) < count:
        raise DataError(
            f"training.development.queries: {count} set aside leave {len(rest)} of {len(examples)} queries to train on; lower it"
        )
    return rest, aside


def reciprocal_rank(encoder: Encoder, examples: Sequence[Example], *, batch_tokens: int) -> float:
    """Mean over queries of 1 / rank of the first positive among all positives and negatives of these examples (MRR)."""
    passages = {
        identifier: (text, example.dataset)
        for example in examples
        for identifier, text in zip(
            (*example.positive_ids, *example.negative_ids), (*example.positives, *example.negatives), strict=True
        )
    }
    column = {identifier: place for place, identifier in enumerate(passages)}
    queries = encoder.encode(
        [e.query for e in examples],
        prompt="query",
        dataset=[e.dataset for e in examples],
        instructions=[e.instruction for e in examples],
        batch_tokens=batch_tokens,
    )
    texts, datasets = zip(*passages.values(), strict=True)
    documents = encoder.encode(texts, prompt="document", dataset=datasets, batch_tokens=batch_tokens)
    scores = queries @ documents.T
    best = np.array([row[[column[i] for i in e.positive_ids]].max() for row, e in zip(scores, examples, strict=True)])
    return float((1 / (1 + (scores > best[:, None]).sum(1))).mean())
