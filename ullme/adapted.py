"""The transformer of a model folder whose adapters were not merged. It travels inside that folder.

sentence-transformers runs this file from there (with `trust_remote_code=True`); without it the base's vectors would pass for
the embedder's. It imports nothing of this project.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util import load_dir_path
from torch import nn

__all__ = ["AdaptedTransformer"]


class AdaptedTransformer(Transformer):
    """Loads the base, puts the embedding adapter on its trunk and merges it."""

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> AdaptedTransformer:  # type: ignore[override]
        """As sentence-transformers calls it.

        Raises:
            ValueError: the adapter's weights do not fit the base.
        """
        module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
        names = ("token", "cache_folder", "revision", "local_files_only")
        known = {name: kwargs[name] for name in names if name in kwargs}
        folder = load_dir_path(model_name_or_path, subfolder="adapters/embedding", **known)
        if folder is None:
            raise ValueError(f"{model_name_or_path}: expected an adapter in adapters/embedding")
        settings = PeftConfig.from_pretrained(folder)
        settings.task_type = settings.base_model_name_or_path = None
        weights = load_peft_weights(folder, device="cpu")
        inside = next(iter(weights)).removeprefix("base_model.model.").split(".")[0]  # what the causal LM calls its trunk
        holder = nn.Module()
        holder.add_module(inside, module.auto_model)
        adapted: Any = get_peft_model(holder, settings)  # type: ignore[arg-type]
        outcome = set_peft_model_state_dict(adapted, weights)
        if outcome.unexpected_keys:
            raise ValueError(f"{model_name_or_path}: the adapter does not fit the base ({outcome.unexpected_keys[0]})")
        module.auto_model = getattr(adapted.merge_and_unload(), inside)  # type: ignore[misc]
        return module
