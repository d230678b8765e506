"""A fast forward and backward for plain LoRA layers; peft keeps their configuration, storage, switching and merging.

peft multiplies a float32 adapter beside a bfloat16 weight: every layer converts its input, runs two float32 products and a
mixed-type sum. Here the adapter stays float32 (what the optimizer needs), its products run in the input's type and the
sums are fused into them (addmm), which saves conversions and passes over memory in every layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["activate", "plain_weights", "speed_up", "switched_off"]

# bitsandbytes, which peft imports where it is installed, advises a package of kernels for 4-bit inference; none is run here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T for a frozen W; gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        narrow, wide = down.to(x.dtype), (up * scale).to(x.dtype)
        inner = flat @ narrow.t()
        ctx.save_for_backward(flat, inner, narrow, wide, weight)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.types = down.dtype, up.dtype
        return torch.addmm(flat @ weight.t(), inner, wide.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        flat, inner, narrow, wide, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        through = gradient @ wide
        up = (gradient.t() @ inner).to(ctx.types[1]) * ctx.scale
        down = (through.t() @ flat).to(ctx.types[0])
        needed = ctx.needs_input_grad[0]
        return torch.addmm(gradient @ weight, through, narrow).view(ctx.shape) if needed else None, None, down, up, None


def speed_up(model: nn.Module) -> int:
    """Give every LoRA layer that is a plain linear without bias, dropout or DoRA the fused product; returns how many.

    Called again after an adapter was added.
    """
    from peft.tuners.lora import Linear

    count = 0
    for layer in model.modules():
        if isinstance(layer, Linear):
            vars(layer).pop("forward", None)
        if isinstance(layer, Linear) and _is_plain(layer):
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and base.bias is None
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and not any(layer.use_dora.values())
        and not any(layer.lora_bias.values())
    )


def activate(model: nn.Module, name: str) -> None:
    """Make this adapter the one that is used. Unlike peft's own switch it leaves alone which weights learn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = [name]


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model, as long as the block lasts. Unlike peft's own switch it leaves alone which weights learn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def plain_weights(model: Any) -> dict[str, Tensor]:
    """The base model's own weights under their own names, while adapters are attached."""
    found = model.get_base_model().state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items() if ".lora_" not in name}


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged:
        return self.base_layer(x, *args, **kwargs)
    (name,) = self.active_adapters
    if name not in self.lora_A:
        return self.base_layer(x, *args, **kwargs)
    return _LoraProduct.apply(x, self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
