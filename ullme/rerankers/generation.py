"""By the released LLM itself: the probability of the question given the passage, or another generation score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ullme.errors import ContractError
from ullme.reranking import Reranker
from ullme.scoring import GenerationScore, ScoreConfig, rate

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["Generation"]


class Generation(Reranker, ScoreConfig):
    """The query-likelihood model of retrieval (Ponte and Croft, 1998), by the LLM that the index was made with.

    The model answers as a causal one, with its adapter for language where it has one.
    """

    kind: str = "generation"
    score: GenerationScore = "query_given_passage"
    """What is read off the language model (see `ullme.generation`)."""
    passage_tokens: int = 256
    """Longest passage that is read; the rest is cut."""

    @property
    def needs_model(self) -> bool:
        """True."""
        return True

    def scores(self, encoder: Encoder | None, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Mean log-probability of a token, of what `score` names.

        Raises:
            ContractError: no model.
        """
        if encoder is None:
            raise ContractError("reranker generation: expected the model that reads, got none")
        return rate(encoder, self, queries, passages)
