"""Causal <-> bidirectional attention of one set of weights, per call, and the test that it really happened.

transformers >= 5.2 takes `is_causal=False` in every forward call of a decoder, so no modelling file is copied. A layer
that quietly stays causal would only cost quality, so `check_bidirectional` proves the switch layer by layer at load: it
changes a layer's input at the last position and looks for a change at the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ullme.errors import ConfigError

__all__ = ["check_bidirectional", "decoder_layers", "trunk"]


def trunk(model: nn.Module) -> nn.Module:
    """The decoder below the LM head, adapters included."""
    outer: Any = model
    inner = outer.get_base_model() if hasattr(model, "get_base_model") else outer  # a PEFT wrapper
    return getattr(inner, inner.base_model_prefix)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The stacked decoder layers, lowest first: the longest ModuleList of the trunk."""
    lists = [module for module in trunk(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


@torch.no_grad()
def leaks(model: nn.Module, *, is_causal: bool, tokens: int = 8) -> list[bool]:
    """Per decoder layer: does a change of its input at the last position move its output at the first?

    Each layer is fed what it received in a real forward pass, so masks and positions are those the model made.
    """
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((module, args, dict(kwargs))), with_kwargs=True)
        for layer in decoder_layers(model)
    ]
    was_training = model.training
    model.eval()  # until the end: dropout would look like a leak
    try:
        device = next(model.parameters()).device
        ids = torch.arange(2, 2 + tokens, device=device).unsqueeze(0)
        trunk(model)(input_ids=ids, is_causal=is_causal, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for layer, args, kwargs in seen:
        hidden = args[0] if args else kwargs["hidden_states"]
        noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden)
        changed = hidden.clone()
        changed[:, -1] += 10 * hidden.abs().mean().clamp_min(1e-3) * noise
        outputs = []
        for value in (hidden, changed):
            call = (value, *args[1:]) if args else ()
            named = kwargs if args else {**kwargs, "hidden_states": value}
            output = layer(*call, **named)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        first, second = (output[:, 0].float() for output in outputs)
        result.append(bool((first - second).abs().max() > 1e-6 * first.abs().max()))
    model.train(was_training)
    return result


def check_bidirectional(model: PreTrainedModel | nn.Module) -> None:
    """Refuse a model that stays causal when asked not to be, or leaks when it should be causal.

    Raises:
        ConfigError: names the layers.
    """
    both = leaks(model, is_causal=False)
    one_way = leaks(model, is_causal=True)
    name = type(trunk(model)).__name__
    stuck = [index for index, leak in enumerate(both) if not leak]
    if stuck or not both:
        raise ConfigError(
            f"backbone.attention: {name}: layers {stuck or 'unknown'} stay causal under is_causal=False, so 'bidirectional' would "
            "be a lie; use another attn_implementation, or attention: causal with pooling: last"
        )
    open_layers = [index for index, leak in enumerate(one_way) if leak]
    if open_layers:
        raise ConfigError(
            f"backbone.attention: {name}: layers {open_layers} see later tokens in causal mode; generation would be wrong"
        )


def expand_mask(mask: Tensor) -> Tensor | None:
    """The attention mask to hand to a model, or None when nothing is padded (the faster kernel)."""
    return None if bool(mask.all()) else mask.long()
