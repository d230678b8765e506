"""Masked next-token prediction (MNTP, LLM2Vec): the LLM learns to use what stands after a token, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ullme.objectives import Objective
from ullme.prediction import Masking, MaskStyle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mntp"]


class Mntp(Objective):
    """L = mean over hidden tokens of -log p(x_i | everything else), p from the state at i - 1 (arXiv 2404.05961, section 2.2).

    share: of the tokens that are hidden; style: `bert` replaces 80% by the mask and 10% by another token, `all` masks all of them;
    mask_token: what stands for a hidden token where the tokenizer has no mask of its own.
    """

    share: float = Field(default=0.2, gt=0, lt=1)
    style: MaskStyle = "bert"
    mask_token: str = "_"

    @property
    def embeds(self) -> bool:
        """It predicts tokens alone."""
        return False

    @property
    def reads_texts(self) -> bool:
        """Documents."""
        return True

    @property
    def prediction(self) -> Masking:
        """As configured."""
        return Masking(self.share, self.style, self.mask_token)

    def prediction_loss(self, logprobs: Tensor) -> dict[str, Tensor]:
        """`mntp`, one value per hidden token."""
        return {"mntp": -logprobs}
