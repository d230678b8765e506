"""GEM's attention mask: what comes after the special tokens sees a text through them alone (arXiv 2506.04344, section 3.2).

    prefix      the text                    sees prefix tokens up to itself
    special     count vectors               each sees the whole prefix and itself, not the other special ones
    suffix      the same text once more     sees the special tokens and suffix tokens up to itself, never the prefix

A text without special tokens is plain causal. Positions run on from the prefix through the special tokens to the suffix.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ullme.errors import ConfigError

__all__ = ["PREFIX", "SPECIAL", "SUFFIX", "bottleneck_mask", "model_masks", "segments_of"]

PREFIX, SPECIAL, SUFFIX = 0, 1, 2


def segments_of(input_ids: Int[Tensor, "B S"], first: int) -> Int[Tensor, "B S"]:
    """PREFIX, SPECIAL or SUFFIX of each token; special tokens have the ids from `first` on. Padding before a text is PREFIX."""
    special = input_ids >= first
    return torch.where(special, SPECIAL, SUFFIX * (special.cumsum(1) > 0))


def bottleneck_mask(segments: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S S"]:
    """True where the token of a row (second axis) sees that of a column (third). Padding sees itself alone."""
    row, column = segments.unsqueeze(2), segments.unsqueeze(1)
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    seen = torch.ones_like(itself).tril() & attention_mask.unsqueeze(1) & attention_mask.unsqueeze(2)
    seen = seen & ~((row == SPECIAL) & (column == SPECIAL)) & ~((row == SUFFIX) & (column == PREFIX))
    return seen | itself


def model_masks(inner: Any, seen: Bool[Tensor, "B S S"], position_ids: Int[Tensor, "B S"]) -> Any:
    """The mask as this trunk takes it: [B 1 S S], one for each kind of layer where it has several.

    Layers with a sliding window also see no further back than it reaches.

    Raises:
        ConfigError: the attention implementation takes no such mask.
    """
    config = inner.config.get_text_config()
    implementation = config._attn_implementation
    if "flash" in implementation:
        raise ConfigError(
            f"backbone.attn_implementation: {implementation} takes no mask of its own, which special tokens need; use sdpa or eager"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"])
    masks = {"full_attention": seen}
    if window:
        masks["sliding_attention"] = seen & (position_ids.unsqueeze(2) - position_ids.unsqueeze(1) < window)
    made = {kind: _as_taken(masks[kind], inner.dtype, implementation) for kind in dict.fromkeys(kinds) if kind in masks}
    return made if len(made) > 1 else next(iter(made.values()))


def _as_taken(seen: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """True and False for sdpa; for others 0 and the lowest number, which are added to the scores."""
    seen = seen.unsqueeze(1)
    if implementation == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
