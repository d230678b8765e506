"""The families and attention implementations that the attention tests go through, and how a switch is broken on purpose."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ullme.tiny import tiny_causal_lm, tiny_encoder

# fmt: off
SWITCHING = [
    "bloom", "cohere", "cohere2", "exaone4", "falcon", "falcon-alibi", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4",
    "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo2", "olmo3",
    "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
]
# fmt: on
MIXED = ["lfm2", "qwen3_next", "llama4_text"]  # some layers stay causal
DECODERS = SWITCHING + MIXED
ENCODERS = ["bert", "camembert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"]
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
WINDOW = 8


def build(family: str, implementation: str) -> Any:
    """A tiny model in evaluation mode; skips the test where transformers says that the architecture lacks it."""
    model = tiny_encoder(family)[0] if family in ENCODERS else _decoder(family)
    has = {"eager": True, "sdpa": model._supports_sdpa, "flex_attention": model._supports_flex_attn}
    if not has[implementation]:
        pytest.skip(f"{family} has no {implementation}")
    model.set_attn_implementation(implementation)
    return model.eval()


def _decoder(family: str) -> Any:
    if family != "falcon-alibi":
        return tiny_causal_lm(family)[0]
    config = deepcopy(tiny_causal_lm("falcon")[0].config)
    config.alibi = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@contextmanager
def uncompiled() -> Iterator[None]:
    """flex_attention without its compiler, which takes 20 seconds a shape; the masks are the same. It warns that it is slow."""
    torch.compiler.set_stance("force_eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compiler.set_stance("default")


def random_ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 258, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def stay_causal(layer: nn.Module) -> None:
    """Break the switch in one layer: it hides later tokens, whatever mask and mode the model hands it."""
    plain = layer.forward
    signature = inspect.signature(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        hidden = next(iter(bound.arguments.values()))
        holder = bound.arguments if "attention_mask" in signature.parameters else bound.arguments["kwargs"]
        holder["attention_mask"] = causal(holder.get("attention_mask"), hidden)
        return plain(*bound.args, **bound.kwargs)

    layer.forward = forward


def causal(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask with later tokens hidden too: bool (True = seen, or True = hidden for mpt) or additive."""
    tokens = hidden.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if mask is None:
        return torch.zeros(1, 1, tokens, tokens).masked_fill(later, torch.finfo(hidden.dtype).min).to(hidden.dtype)
    if mask.dtype == torch.bool:
        hides = not mask[..., 3, 3].any()  # a real token in every probe, and it does not hide itself: True means hidden
        return mask | later if hides else mask & ~later
    return mask.masked_fill(later, torch.finfo(mask.dtype).min)
