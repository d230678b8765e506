"""From token states to one vector: pure functions of (hidden, mask), computed in float32 (in float64 if given that).

hidden: Float[B S D]; mask: Bool[B S], True = this token counts. Padding may stand on either side. No function edits its
arguments. A row without any counted token is a ContractError: it would have no meaning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ullme.errors import ContractError

__all__ = ["POOLINGS", "at_least_float32", "pool"]


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision upcast to float32; wider types as they are."""
    return values if values.dtype == torch.float64 else values.float()


def mean(hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B D"]:
    """Average over the counted tokens."""
    hidden = at_least_float32(hidden)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def weighted_mean(
    hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"], attended: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, "B D"]:
    """Average of the counted tokens, each weighted by its position 1, 2, 3 ... in the row (SGPT, arXiv 2202.08904, eq. 2).

    attended: the tokens that have a position, prompt included (as sentence-transformers counts them); by default `mask`.
    """
    hidden = at_least_float32(hidden)
    weights = ((mask if attended is None else attended).long().cumsum(1) * mask).unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def last(hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B D"]:
    """State of the last counted token."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(mask, positions, -1).amax(1)
    return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), index])


def first(hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B D"]:
    """State of the first counted token."""
    return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)])


def maximum(hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B D"]:
    """Largest value of each dimension over the counted tokens."""
    return at_least_float32(hidden).masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "weighted_mean": weighted_mean,
    "last": last,
    "first": first,
    "max": maximum,
}


def pool(
    kind: str, hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"], attended: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, "B D"]:
    """Pool by name and normalise to unit length. `attended` (mask and prompt) gives the positions of `weighted_mean`.

    Raises:
        ContractError: a row without any counted token, or an unknown name.
    """
    if kind not in POOLINGS:
        raise ContractError(f"pooling: expected one of {', '.join(POOLINGS)}, got '{kind}'")
    if not bool(mask.any(1).all()):
        raise ContractError("pooling: every row must keep at least one token that is neither padding nor prompt")
    pooled = weighted_mean(hidden, mask, attended) if kind == "weighted_mean" else POOLINGS[kind](hidden, mask)
    return torch.nn.functional.normalize(pooled, dim=-1)
