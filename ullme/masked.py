"""The transformer of a model folder with several special tokens, which do not see each other (GEM, arXiv 2506.04344).

It travels inside that folder: sentence-transformers runs it from there (with `trust_remote_code=True`), and it imports nothing of
this project. The last tokens of each row, as many as `1_SpecialTokens/config.json` says, are the special ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util import load_dir_path
from torch import Tensor

__all__ = ["MaskedTransformer"]


class MaskedTransformer(Transformer):
    """Causal attention, but for the special tokens: each sees the whole text and itself."""

    special_tokens: int

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> MaskedTransformer:  # type: ignore[override]
        """As sentence-transformers calls it.

        Raises:
            ValueError: the folder does not say how many special tokens there are.
        """
        module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
        names = ("token", "cache_folder", "revision", "local_files_only")
        known = {name: kwargs[name] for name in names if name in kwargs}
        folder = load_dir_path(model_name_or_path, subfolder="1_SpecialTokens", **known)
        if folder is None:
            raise ValueError(f"{model_name_or_path}: expected the special tokens in 1_SpecialTokens")
        module.special_tokens = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["count"]
        return module  # type: ignore[return-value]

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The transformer under that mask."""
        plain: Tensor = features["attention_mask"]
        real = plain.bool()
        positions = (plain.long().cumsum(1) - 1).clamp_min(0)
        features["attention_mask"] = self._mask(real, positions)
        features["position_ids"] = positions
        features = super().forward(features, **kwargs)
        features["attention_mask"] = plain
        return features

    def _mask(self, real: Tensor, positions: Tensor) -> Any:
        special = real & (real.long().flip(1).cumsum(1).flip(1) <= self.special_tokens)
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        seen = torch.ones_like(itself).tril() & real.unsqueeze(1) & real.unsqueeze(2)
        seen = (seen & ~(special.unsqueeze(1) & special.unsqueeze(2))) | itself
        config = self.auto_model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        masks = {"full_attention": seen}
        if window:
            masks["sliding_attention"] = seen & (positions.unsqueeze(2) - positions.unsqueeze(1) < window)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        made = {kind: self._as_taken(masks[kind].unsqueeze(1)) for kind in dict.fromkeys(kinds)}
        return made if len(made) > 1 else next(iter(made.values()))

    def _as_taken(self, seen: Tensor) -> Tensor:
        dtype = self.auto_model.dtype
        if self.auto_model.config.get_text_config()._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
