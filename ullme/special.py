"""Special tokens behind a text, whose last states are its embedding (GEM, arXiv 2506.04344, section 3).

Their vectors are weights of their own: the vocabulary and the LM head of the model stay as they are. In token rows they are the
ids from `first` on, which the vocabulary does not have.

This file travels inside a model folder: sentence-transformers runs it from there (with `trust_remote_code=True`) where there are
several special tokens, or a head. It imports torch and safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["SpecialTokens"]


class SpecialTokens(nn.Module):
    """`count` vectors [count D], and how the states above them become one vector.

    first: the id of the first, which is the number of rows of the model's embedding table. merge: `mean` of the states, or
    `concat`. head: a square linear layer on top, which begins as the identity. In float32.
    """

    def __init__(self, dim: int, count: int = 1, *, first: int, merge: str = "mean", head: bool = False) -> None:
        super().__init__()
        self.settings = {"dim": dim, "count": count, "first": first, "merge": merge, "head": head}
        self.count, self.first, self.merge = count, first, merge
        self.vectors = nn.Parameter(torch.zeros(count, dim))
        self.head = nn.Linear(self.dim, self.dim, bias=False) if head else None
        if self.head is not None:
            nn.init.eye_(self.head.weight)

    @property
    def dim(self) -> int:
        """Length of what the pooling makes."""
        return self.settings["dim"] * (self.count if self.merge == "concat" else 1)

    @property
    def is_last_token(self) -> bool:
        """Whether the embedding is simply the state of the last token: one special token, and nothing above it."""
        return self.count == 1 and self.head is None

    @property
    def ids(self) -> list[int]:
        """What stands behind every text, as token ids."""
        return list(range(self.first, self.first + self.count))

    @torch.no_grad()
    def draw(self, embeddings: nn.Module, *, seed: int = 0) -> None:
        """Begin as tokens like others: normal, with mean and spread of the vocabulary's vectors in each dimension."""
        weight: Any = embeddings.weight
        rows = torch.cat([embeddings(part).float() for part in torch.arange(self.first, device=weight.device).split(8192)]).cpu()
        noise = torch.randn(self.vectors.shape, generator=torch.Generator().manual_seed(seed))
        self.vectors.copy_((rows.mean(0) + rows.std(0) * noise).to(self.vectors))

    def attach(self, embeddings: nn.Module) -> None:
        """Make the model's embedding table know the special ids, without a row in it. Once more replaces the time before."""
        own = type(embeddings).forward

        def forward(ids: Tensor) -> Tensor:
            special = ids >= self.first
            rows = own(embeddings, ids.masked_fill(special, 0))
            vectors = nn.functional.embedding((ids - self.first).clamp_min(0), self.vectors.to(rows.dtype))
            return torch.where(special.unsqueeze(-1), vectors, rows)

        embeddings.forward = forward  # type: ignore[method-assign]

    def pool(self, hidden: Tensor, special: Tensor) -> Tensor:
        """hidden: Float[B S D]; special: Bool[B S], True at the `count` special tokens of a row -> Float[B dim], not normalised."""
        places = torch.where(special, torch.arange(special.shape[1], device=special.device), -1)
        places = places.topk(self.count, dim=1).values.flip(1)
        states = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        states = states if states.dtype == torch.float64 else states.float()
        pooled = states.flatten(1) if self.merge == "concat" else states.mean(1)
        return pooled if self.head is None else nn.functional.linear(pooled, self.head.weight.to(pooled.dtype))

    # As a module of sentence-transformers

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pools `token_embeddings` into `sentence_embedding`: the last `count` tokens of each row are the special ones."""
        del kwargs
        mask = features["attention_mask"].bool()
        behind = mask.long().flip(1).cumsum(1).flip(1)  # real tokens from here to the end
        features["sentence_embedding"] = self.pool(features["token_embeddings"], mask & (behind <= self.count))
        return features

    def get_sentence_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write settings and weights to a folder."""
        del args, kwargs
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> SpecialTokens:
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
