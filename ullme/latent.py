"""Latent attention pooling (NV-Embed, arXiv 2405.17428, section 3.1): token states look up a trained table, then are averaged.

This file travels inside a model folder: sentence-transformers runs it from there (with `trust_remote_code=True`), so it imports
torch and safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Each token's state is the query of an attention over `latents` trained vectors, followed by a two-layer GELU network.

    Both parts add to their input (as in the released model), and begin as zero: untrained, this is the mean. In float32.
    """

    def __init__(self, dim: int, latents: int = 512, heads: int = 8, seed: int = 0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"latent attention: {heads} heads do not divide the hidden size {dim}")
        self.settings = {"dim": dim, "latents": latents, "heads": heads}
        random = torch.Generator().manual_seed(seed)
        self.latents = nn.Parameter(torch.randn(latents, dim, generator=random))
        self.norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries, self.keys, self.values = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)
        self.feed, self.feed_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for layer in (self.queries, self.keys, self.values, self.feed):
            layer.weight.data = torch.randn(layer.weight.shape, generator=random) * dim**-0.5
        for parameter in (self.out.weight, self.feed.bias, self.feed_out.weight, self.feed_out.bias):
            nn.init.zeros_(parameter)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: Float[B S D]; mask: Bool[B S], True = this token counts -> Float32[B D], not normalised."""
        hidden = hidden.float()
        queries = self._split(self.queries(self.norm(hidden)))
        keys, values = (self._split(layer(self.latents).unsqueeze(0)) for layer in (self.keys, self.values))
        found = nn.functional.scaled_dot_product_attention(
            queries, keys.expand(len(hidden), -1, -1, -1), values.expand(len(hidden), -1, -1, -1)
        )
        hidden = hidden + self.out(found.transpose(1, 2).flatten(2))
        hidden = hidden + self.feed_out(nn.functional.gelu(self.feed(self.feed_norm(hidden))))
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1)

    def _split(self, states: Tensor) -> Tensor:
        """[B S D] -> [B heads S D/heads]"""
        return states.unflatten(-1, (self.settings["heads"], -1)).transpose(1, 2)

    # As a module of sentence-transformers

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pools `token_embeddings` into `sentence_embedding`; the prompt's tokens are left out."""
        del kwargs
        mask = features["attention_mask"].bool()
        counted = mask & (mask.long().cumsum(1) > int(features.get("prompt_length", 0)))
        features["sentence_embedding"] = self.pool(features["token_embeddings"], counted)
        return features

    def get_sentence_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.settings["dim"]

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write settings and weights to a folder."""
        del args, kwargs
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> LatentAttention:
        """Read what `save` wrote, from a folder or a repository of the hub."""
        files = {name: _file(model_name_or_path, f"{subfolder}/{name}", kwargs) for name in ("config.json", "model.safetensors")}
        module = cls(**json.loads(Path(files["config.json"]).read_text(encoding="utf-8")))
        module.load_state_dict(load_file(files["model.safetensors"]))
        return module


def _file(source: str, name: str, options: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    known = {key: options[key] for key in ("revision", "token", "local_files_only") if options.get(key) is not None}
    return Path(hf_hub_download(source, name.lstrip("/"), cache_dir=options.get("cache_folder"), **known))
