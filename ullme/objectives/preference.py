"""Preference optimisation: the language model learns to prefer each query's positive to its hard negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs

__all__ = ["Preference", "PreferenceLoss", "preference_term"]

PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "kto"]


class Preference(Objective):
    """DPO (`sigmoid`), IPO or hinge between the positive and each negative, averaged per query (see `ullme.losses.preference`).

    `kto` compares no pairs: the positive is desirable and each negative is not (see `ullme.losses.kto`). The reference is the
    model as it was when the phase began: the base, where that is the first one or begins with a new adapter.
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
    def embeds(self) -> bool:
        """It trains the language model alone."""
        return False

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

    @property
    def uses_mismatched(self) -> bool:
        """KTO measures a baseline."""
        return self.loss == "kto"

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """`preference`, one value per query."""
        return {"preference": preference_term(logprobs, self.loss, beta=self.beta, label_smoothing=self.label_smoothing)}


def preference_term(logprobs: CandidateLogprobs, loss: PreferenceLoss, *, beta: float, label_smoothing: float) -> Tensor:
    """Float[G]: the positive (column 0) against each present negative, averaged per query; 0 for a query without negatives.

    `kto` rates each of them by itself, so that a query without negatives still has its positive's half.
    """
    from ullme.losses import kto, preference

    reference = logprobs.reference
    assert reference is not None
    policy, tokens = logprobs.total, logprobs.tokens.clamp_min(1)
    if loss == "ipo":
        policy, reference = policy / tokens, reference / tokens
    gain = policy - reference
    if loss == "kto":
        assert logprobs.baseline is not None
        return kto(gain, logprobs.present, logprobs.baseline, beta=beta)
    values = preference(gain[:, :1] - gain[:, 1:], loss, beta=beta, label_smoothing=label_smoothing)
    present = logprobs.present[:, 1:]
    return values.where(present, 0.0).sum(1) / present.sum(1).clamp_min(1)
