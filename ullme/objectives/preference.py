"""Preference optimisation: the language model learns to prefer each query's positive to its hard negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ullme.objectives import Objective
from ullme.objectives.grl import PreferenceLoss, preference_term

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.gradcache import CandidateLogprobs, Representations

__all__ = ["Preference"]


class Preference(Objective):
    """DPO (`sigmoid`), IPO or hinge between the positive and each negative, averaged per query (see `ullme.losses.preference`).

    The reference is the model with its adapter off.
    """

    loss: PreferenceLoss = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _smoothed_where_defined(self) -> Preference:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss: sigmoid, not for {self.loss}; leave it at 0")
        return self

    @property
    def uses_generation(self) -> bool:
        """Log-probabilities are all of it."""
        return True

    @property
    def trains_generation(self) -> bool:
        """It does."""
        return True

    @property
    def uses_reference(self) -> bool:
        """Every form compares with the reference model."""
        return True

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """No term: embeddings are not read."""
        del representations, generation
        return {}

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """`preference`, one value per query."""
        return {"preference": preference_term(logprobs, self.loss, beta=self.beta, label_smoothing=self.label_smoothing)}
