"""Contrastive learning (CL): InfoNCE over the batch's passages and each query's hard negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.gradcache import CandidateLogprobs, Representations

__all__ = ["Contrastive"]


class Contrastive(Objective):
    """L = mean over queries of -log exp(s(q,p+)/tau) / sum_p exp(s(q,p)/tau), s = cosine (arXiv 1807.03748, eq. 4).

    The sum runs over every passage of the batch (`in_batch: true`) or over the query's own candidates; known positives of
    the query other than its target never stand in it. `symmetric` averages with the same loss from passages to queries.
    """

    temperature: float = Field(default=0.05, gt=0)
    in_batch: bool = True
    symmetric: bool = False

    @model_validator(mode="after")
    def _both_ways_need_the_batch(self) -> Contrastive:
        if self.symmetric and not self.in_batch:
            raise ValueError("symmetric: true compares a passage with the batch's other queries, so it needs in_batch: true")
        return self

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `contrastive`."""
        del generation
        import torch

        from ullme.losses import info_nce

        similarity = representations.queries @ representations.documents.T
        ignored = representations.known if self.in_batch else ~representations.own | representations.known
        loss = info_nce(similarity, representations.target, ignored, temperature=self.temperature).mean()
        if self.symmetric:
            backward = similarity[:, representations.target].T
            target = representations.target
            diagonal = torch.arange(len(target), device=target.device)
            shared = (target.unsqueeze(0) == target.unsqueeze(1)) & (diagonal.unsqueeze(0) != diagonal.unsqueeze(1))
            mirrored = representations.known[:, target].T | shared
            loss = (loss + info_nce(backward, diagonal, mirrored, temperature=self.temperature).mean()) / 2
        return {"contrastive": loss}
