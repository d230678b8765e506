"""Distillation: the scores or the embeddings of the phase's guide, another embedding model, are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Distill"]


class Distill(Objective):
    """`scores`: L = mean over queries of KL(softmax(s_g / tau_g) || softmax(s / tau)), s = cosine, s_g = the guide's cosine.

    Over the query's own candidates, or over every passage of the batch (`in_batch: true`) but its known positives other than the
    target: the ranking of another model, whatever the length of its embeddings (TCT-ColBERT, arXiv 2010.11386, with a bi-encoder
    as the teacher).

    `embeddings`: L = mean over the batch's queries and passages of 1 - cosine(embedding, guide's embedding), which needs both to
    be of one length (arXiv 2004.09813, with the cosine in place of the squared distance). The temperatures are those of `scores`.
    """

    target: Literal["scores", "embeddings"] = "scores"
    temperature: float = Field(default=0.05, gt=0)
    guide_temperature: float = Field(default=0.05, gt=0)
    in_batch: bool = False

    @model_validator(mode="after")
    def _compares_scores_where_there_are_some(self) -> Distill:
        if self.target == "embeddings" and self.in_batch:
            raise ValueError("in_batch says which scores are compared, but target is embeddings; leave it at false")
        return self

    @property
    def uses_guide(self) -> bool:
        """The guide is what it learns from."""
        return True

    @property
    def copies_guide(self) -> bool:
        """As embeddings, not as scores."""
        return self.target == "embeddings"

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `distill`."""
        del generation
        from ullme.losses import kl_alignment

        guide_queries, guide_documents = representations.guide
        if self.target == "embeddings":
            cosines = [(representations.queries * guide_queries).sum(1), (representations.documents * guide_documents).sum(1)]
            rows = sum(map(len, cosines))
            return {"distill": 1 - (cosines[0].sum() + cosines[1].sum()) / rows}
        scores, guided = representations.queries @ representations.documents.T, guide_queries @ guide_documents.T
        present = ~representations.excluded
        if not self.in_batch:
            own = representations.candidates.clamp_min(0)
            scores, guided, present = scores.gather(1, own), guided.gather(1, own), representations.candidates >= 0
        loss = kl_alignment(scores, guided, present, temperature=self.temperature, generation_temperature=self.guide_temperature)
        return {"distill": loss.mean()}
