"""Contrastive learning (CL): InfoNCE over the batch's passages and each query's hard negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Contrastive"]


class Contrastive(Objective):
    """L = mean over queries of -log exp(s(q,p+)/tau) / sum_p exp(s(q,p)/tau), s = cosine (arXiv 1807.03748, eq. 4).

    The sum runs over every passage of the batch (`in_batch: true`, unless the query's data set has it false) or over the query's
    own candidates; known positives of the query other than its target never stand in it. `symmetric` averages with the same
    loss from passages to queries. `all_pairs` adds the query's cosines with other queries, and its target's with all queries
    and with the passages of other queries, to the one sum (GTE, arXiv 2308.03281, section 3.3).

    learn_temperature: log(1 / tau) is a weight, too, starting at `temperature` (CLIP, arXiv 2103.00020; GEM, arXiv 2506.04344).

    hardness: alpha s(q,p), without gradient, is added to the logits of the negatives that `hardness_of` names, so that near
    ones weigh more: all of them or those in the batch (LLaVE, arXiv 2503.04812, eq. 5), or the mined ones (EmbeddingGemma,
    arXiv 2509.20354). false_negative_margin: passages whose cosine exceeds the target's by more leave the sum; null: none.

    guided: what the phase's guide holds for nearer to the query than its target less `guide_margin` leaves the sums, on every side
    that is compared (GISTEmbed, arXiv 2402.16829, section 3; sentence-transformers' GISTEmbedLoss, absolute margin).
    """

    temperature: float = Field(default=0.05, gt=0)
    learn_temperature: bool = False
    in_batch: bool = True
    symmetric: bool = False
    all_pairs: bool = False
    hardness: float = Field(default=0.0, ge=0)
    hardness_of: Literal["all_negatives", "in_batch_negatives", "hard_negatives"] = "all_negatives"
    false_negative_margin: float | None = None
    guided: bool = False
    guide_margin: float = 0.0

    @model_validator(mode="after")
    def _compares_with_the_batch_in_one_way(self) -> Contrastive:
        for name in ("symmetric", "all_pairs"):
            if getattr(self, name) and not self.in_batch:
                raise ValueError(f"{name}: true compares with the batch's other queries, so it needs in_batch: true")
        if self.symmetric and self.all_pairs:
            raise ValueError("symmetric and all_pairs are two ways of comparing both sides; set one of them")
        if self.guide_margin and not self.guided:
            raise ValueError("guide_margin says how near the guide may find a negative, so it needs guided: true")
        return self

    @property
    def learned(self) -> dict[str, float]:
        """`temperature`, if it is."""
        return {"temperature": self.temperature} if self.learn_temperature else {}

    @property
    def uses_guide(self) -> bool:
        """Where it is guided."""
        return self.guided

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `contrastive`."""
        del generation
        import torch

        from ullme.losses import info_nce

        queries, documents, target = representations.queries, representations.documents, representations.target
        temperature = torch.exp(-representations.learned["temperature"]) if self.learn_temperature else self.temperature
        rows = torch.arange(len(target), device=target.device)
        similarity = queries @ documents.T
        ignored = representations.excluded if self.in_batch else ~representations.own | representations.known
        if self.false_negative_margin is not None:
            positive = similarity.detach()[rows, target].unsqueeze(1)
            ignored = ignored | (similarity.detach() > positive + self.false_negative_margin)
            ignored[rows, target] = False
        scores = similarity
        if self.hardness > 0:
            scores = similarity + temperature * self.hardness * (similarity.detach() * self._weighted(representations))
        backward = similarity[:, target].T
        same = target.unsqueeze(0) == target.unsqueeze(1)
        mirrored = representations.known[:, target].T | (same & (rows.unsqueeze(0) != rows.unsqueeze(1)))
        apart = representations.own | representations.known
        if representations.own_only is not None:
            alone = representations.own_only.unsqueeze(1)
            same, apart = same | alone, apart | alone
            mirrored = mirrored | (alone & (rows.unsqueeze(0) != rows.unsqueeze(1)))
        if self.guided:
            near = self._near(representations)
            ignored, same, mirrored, apart = (out | too for out, too in zip((ignored, same, mirrored, apart), near, strict=True))
        if self.all_pairs:
            scores = torch.cat([scores, queries @ queries.T, backward, documents[target] @ documents.T], dim=1)
            ignored = torch.cat([ignored, same, mirrored, apart], dim=1)
        loss = info_nce(scores, target, ignored, temperature=temperature).mean()
        if self.symmetric:
            loss = (loss + info_nce(backward, rows, mirrored, temperature=temperature).mean()) / 2
        return {"contrastive": loss}

    def _near(self, representations: Representations) -> tuple[Tensor, ...]:
        """What the guide leaves out: Bool of query and passage [Q C], two queries [Q Q], target and query [Q Q], target and
        passage [Q C].
        """
        queries, documents = representations.guide
        target, rows = representations.target, range(len(queries))
        similarity = queries @ documents.T
        limit = similarity[rows, target].unsqueeze(1) - self.guide_margin
        sides = (similarity, queries @ queries.T, similarity[:, target].T, documents[target] @ documents.T)
        near = tuple(side > limit for side in sides)
        near[0][rows, target] = near[2][rows, rows] = False
        return near

    def _weighted(self, representations: Representations) -> Tensor:
        """Bool[Q C]: the negatives whose hardness counts."""
        negatives = ~representations.known
        negatives[range(len(negatives)), representations.target] = False
        if self.hardness_of == "all_negatives":
            return negatives
        return negatives & (representations.own if self.hardness_of == "hard_negatives" else ~representations.own)
