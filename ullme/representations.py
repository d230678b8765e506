"""What an objective reads of a batch: everybody's embeddings, and what the language model gives its candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ullme.errors import ContractError

__all__ = ["CandidateLogprobs", "Representations"]


@dataclass(frozen=True)
class Representations:
    """Unit-norm embeddings of a batch and who belongs to whom.

    own_only: the queries for which other queries' passages are no negatives; None: there are none. learned: log(1 / temperature)
    of each temperature that is trained, by name (see `Objective.learned`).
    """

    queries: Float[Tensor, "Q D"]
    documents: Float[Tensor, "C D"]
    candidates: Int[Tensor, "Q K"]
    known: Bool[Tensor, "Q C"]
    own_only: Bool[Tensor, " Q"] | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    guide_queries: Float[Tensor, "Q G"] | None = None
    guide_documents: Float[Tensor, "C G"] | None = None

    @property
    def guide(self) -> tuple[Float[Tensor, "Q G"], Float[Tensor, "C G"]]:
        """The guide's embeddings of the queries and of the passages.

        Raises:
            ContractError: the batch brought none.
        """
        if self.guide_queries is None or self.guide_documents is None:
            raise ContractError("this objective reads the embeddings of a guide, and the batch has none; set the phase's guide")
        return self.guide_queries, self.guide_documents

    @property
    def target(self) -> Int[Tensor, " Q"]:
        """Position of each query's positive."""
        return self.candidates[:, 0]

    @property
    def excluded(self) -> Bool[Tensor, "Q C"]:
        """Passages that no sum over the batch has for a query: its other positives, and all but its own candidates where
        `own_only` says so.
        """
        return self.known if self.own_only is None else self.known | (self.own_only.unsqueeze(1) & ~self.own)

    @property
    def own(self) -> Bool[Tensor, "Q C"]:
        """True for a query's own candidates."""
        marks = torch.zeros(self.known.shape[0], self.known.shape[1] + 1, dtype=torch.bool, device=self.known.device)
        marks.scatter_(1, self.candidates.where(self.candidates >= 0, self.known.shape[1]), True)
        return marks[:, :-1]


@dataclass(frozen=True)
class CandidateLogprobs:
    """Log-probabilities of candidates given their query, for some queries of the batch.

    rows: Int[G] positions of these queries; total: Float[G K] summed over the passage's tokens; tokens: Int[G K] their
    number; reference: the same sums under the reference model, or None; present: Bool[G K]; teacher: Float[G K], a generation
    score other than the mean, or None. baseline: z of KTO, one number for the whole batch, without gradient, or None.
    """

    rows: Int[Tensor, " G"]
    total: Float[Tensor, "G K"]
    tokens: Int[Tensor, "G K"]
    present: Bool[Tensor, "G K"]
    reference: Float[Tensor, "G K"] | None = None
    teacher: Float[Tensor, "G K"] | None = None
    baseline: Float[Tensor, ""] | None = None

    @property
    def mean(self) -> Float[Tensor, "G K"]:
        """Per-token log-probability: ULLME's generation score."""
        return self.total / self.tokens.clamp_min(1)

    @property
    def score(self) -> Float[Tensor, "G K"]:
        """The generation score that the alignment reads."""
        return self.mean if self.teacher is None else self.teacher
