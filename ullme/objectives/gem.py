"""GEM: one LLM that embeds through special tokens and goes on writing, trained on texts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ullme.objectives import Objective
from ullme.prediction import Doubling

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.prediction import Prediction
    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Gem"]


class Gem(Objective):
    """L = (1 - a) L_ntp + a L_cl (arXiv 2506.04344, section 3.3).

    L_ntp: the mean of -log p(next token) over texts as they are and, `doubled` of them, over text, special tokens and text again,
    where the repetition sees the text through the special tokens alone (see `ullme.bottleneck`). L_cl: InfoNCE between each text
    and itself with `token_dropout` of its tokens left out, against the batch's other texts; log(1 / temperature) is learned.

    alpha: where a begins and where it ends. It stays for `alpha_after` steps and then rises evenly during `alpha_steps`. How it
    rises, and how many tokens are dropped, the paper leaves open.
    """

    doubled: float = Field(default=0.2, ge=0, le=1)
    dropped: float = Field(default=0.1, ge=0, lt=1)
    temperature: float = Field(default=0.05, gt=0)
    learn_temperature: bool = True
    alpha: tuple[float, float] = (0.0, 1.0)
    alpha_after: int = Field(default=100, ge=0)
    alpha_steps: int = Field(default=400, ge=0)

    @field_validator("alpha")
    @classmethod
    def _shares(cls, alpha: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= value <= 1 for value in alpha):
            raise ValueError(f"expected two shares between 0 and 1, got {list(alpha)}")
        return alpha

    def at(self, step: int) -> Gem:
        """With `alpha` as it is at this step."""
        first, last = self.alpha
        done = min(1.0, max(0, step - self.alpha_after) / self.alpha_steps) if self.alpha_steps else float(step >= self.alpha_after)
        now = first + (last - first) * done
        return self.model_copy(update={"alpha": (now, now)})

    @property
    def reads_texts(self) -> bool:
        """Documents."""
        return True

    @property
    def uses_special_tokens(self) -> bool:
        """Always."""
        return True

    @property
    def embeds(self) -> bool:
        """Unless a is 0."""
        return max(self.alpha) > 0

    @property
    def token_dropout(self) -> float:
        """`dropped`."""
        return self.dropped

    @property
    def learned(self) -> dict[str, float]:
        """`temperature`, if it is."""
        return {"temperature": self.temperature} if self.learn_temperature else {}

    @property
    def prediction(self) -> Prediction | None:
        """Unless a is 1."""
        return Doubling(self.doubled) if min(self.alpha) < 1 else None

    def prediction_loss(self, logprobs: Tensor) -> dict[str, Tensor]:
        """`next_token`, one value per token that is predicted."""
        return {"next_token": -(1 - self.alpha[0]) * logprobs}

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `contrastive`."""
        del generation
        import torch

        from ullme.losses import info_nce

        temperature = torch.exp(-representations.learned["temperature"]) if self.learn_temperature else self.temperature
        similarity = representations.queries @ representations.documents.T
        loss = info_nce(similarity, representations.target, representations.excluded, temperature=temperature)
        return {"contrastive": self.alpha[1] * loss.mean()}
