"""Unsupervised SimCSE: the same text twice under dropout, apart from all other texts of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Simcse"]


class Simcse(Objective):
    """L = mean over texts of -log exp(s(x,x')/tau) / sum_y exp(s(x,y')/tau), x and x' one text under two draws of dropout.

    arXiv 2104.08821, eq. 4, with the settings of LLM2Vec (arXiv 2404.05961, section 2.3): dropout of the attention, 0.3, also where
    the model's own configuration has none.
    """

    temperature: float = Field(default=0.05, gt=0)
    dropout: float = Field(default=0.3, ge=0, lt=1)

    @property
    def reads_texts(self) -> bool:
        """Documents."""
        return True

    @property
    def attention_dropout(self) -> float:
        """`dropout`."""
        return self.dropout

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `simcse`."""
        del generation
        from ullme.losses import info_nce

        similarity = representations.queries @ representations.documents.T
        loss = info_nce(similarity, representations.target, representations.excluded, temperature=self.temperature)
        return {"simcse": loss.mean()}
