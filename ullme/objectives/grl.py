"""Generation-augmented representation learning (GRL, ULLME): contrastive + preference + alignment of the two scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ullme.objectives import Objective
from ullme.objectives.preference import PreferenceLoss, preference_term

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Grl"]


class Grl(Objective):
    """L = w_cl L_CL + w_pref L_DPO + w_kl KL(P_g || P_r) (arXiv 2408.03402, section 2.3; weights 1 / 0.5 / 1 as released).

    P_r = softmax(s_r / tau) and P_g = softmax(s_g / tau_g), detached, over the query's own candidates: its positive and hard
    negatives. s_r = cosine; s_g = mean log pi(p_t | prompt, q, p_<t) over the passage's tokens only, or another generation score
    (`generation.score` of the phase). L_DPO is on summed log-probabilities against the reference, the model as the phase began,
    averaged over the query's negatives; `preference_loss` takes another form in its place (see `ullme.objectives.preference`).

    At tau_g = 1 the differences of s_g are well below 1 nat, P_g is close to uniform and the KL flattens P_r; its entropy is
    logged as `generation_entropy`.
    """

    contrastive_weight: float = Field(default=1.0, ge=0)
    preference_weight: float = Field(default=0.5, ge=0)
    kl_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=0.05, gt=0)
    in_batch: bool = True
    preference_loss: PreferenceLoss = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    generation_temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _smoothed_where_defined(self) -> Grl:
        if self.label_smoothing and self.preference_loss != "sigmoid":
            raise ValueError(
                f"label_smoothing is defined for preference_loss: sigmoid, not for {self.preference_loss}; leave it at 0"
            )
        return self

    @property
    def uses_generation(self) -> bool:
        """Without both generation terms this is plain contrastive learning, and costs no more."""
        return self.preference_weight > 0 or self.kl_weight > 0

    @property
    def trains_generation(self) -> bool:
        """The preference term does; the alignment only reads the scores."""
        return self.preference_weight > 0

    @property
    def uses_reference(self) -> bool:
        """The preference term compares with the reference model."""
        return self.preference_weight > 0

    @property
    def uses_mismatched(self) -> bool:
        """A preference term of KTO measures a baseline."""
        return self.preference_weight > 0 and self.preference_loss == "kto"

    @property
    def uses_teacher(self) -> bool:
        """The alignment does."""
        return self.kl_weight > 0

    @property
    def teacher_temperature(self) -> float:
        """That of the alignment."""
        return self.generation_temperature

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """`contrastive` over the batch and `kl` over the queries whose candidates were scored."""
        from ullme.losses import info_nce, kl_alignment

        similarity = representations.queries @ representations.documents.T
        ignored = representations.excluded if self.in_batch else ~representations.own | representations.known
        terms: dict[str, Tensor] = {}
        if self.contrastive_weight > 0:
            loss = info_nce(similarity, representations.target, ignored, temperature=self.temperature).mean()
            terms["contrastive"] = self.contrastive_weight * loss
        if self.kl_weight > 0 and generation is not None:
            own = representations.candidates[generation.rows]
            scores = similarity[generation.rows].gather(1, own.clamp_min(0))
            loss = kl_alignment(
                scores,
                generation.score,
                generation.present,
                temperature=self.temperature,
                generation_temperature=self.generation_temperature,
            ).mean()
            terms["kl"] = self.kl_weight * loss
        return terms

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """`preference`: the positive against each present negative, averaged per query."""
        if self.preference_weight == 0:
            return {}
        loss = preference_term(logprobs, self.preference_loss, beta=self.beta, label_smoothing=self.label_smoothing)
        return {"preference": self.preference_weight * loss}
