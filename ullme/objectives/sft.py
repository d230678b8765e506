"""Supervised fine-tuning (SFT): the language model learns to write each query's positive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs

__all__ = ["Sft"]


class Sft(Objective):
    """L = mean over queries of -(1/|p+|) sum_t log pi(p+_t | prompt, q, p+_<t): passage tokens only (ULLME, arXiv 2408.03402).

    `per_token: false` sums over the passage instead of averaging, so long passages weigh more.
    """

    per_token: bool = True

    @property
    def embeds(self) -> bool:
        """It trains the language model alone."""
        return False

    @property
    def uses_generation(self) -> bool:
        """The positive's log-probability is all of it."""
        return True

    @property
    def trains_generation(self) -> bool:
        """It is."""
        return True

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """`sft`, one value per query."""
        return {"sft": -(logprobs.mean if self.per_token else logprobs.total)[:, 0]}
