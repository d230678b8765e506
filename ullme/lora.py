"""LoRA adapters through peft, with a fast forward and backward of their own for plain layers.

peft multiplies a float32 adapter beside a bfloat16 weight: every layer converts its input, runs two float32 products and a
mixed-type sum. Here the adapter stays float32 (what the optimizer needs), its products run in the input's type and the
sums are fused into them (addmm), which saves conversions and passes over memory in every layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ullme.training import LoraConfig

__all__ = ["activate", "add_adapter", "plain_weights", "read_adapter", "speed_up", "switched_off", "write_adapter"]


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
        return (flat @ weight.t()).addmm_(inner, wide.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        flat, inner, narrow, wide, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        through = gradient @ wide
        up = (gradient.t() @ inner).to(ctx.types[1]) * ctx.scale
        down = (through.t() @ flat).to(ctx.types[0])
        needed = ctx.needs_input_grad[0]
        return (gradient @ weight).addmm_(through, narrow).view(ctx.shape) if needed else None, None, down, up, None


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


def add_adapter(model: Any, config: LoraConfig, name: str) -> Any:
    """The model with a new LoRA, float32 weights beside its linear layers; only adapters learn from now on."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    settings = PeftLora(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else "FEATURE_EXTRACTION",
    )
    if getattr(model, "peft_config", None):
        model.add_adapter(name, settings)
    else:
        model = get_peft_model(model, settings, adapter_name=name)
    return _learning(model)


def write_adapter(model: Any, path: Path, name: str, *, base: str) -> None:
    """One adapter as peft writes it. base: what stands in it for the place that the base was loaded from."""
    with TemporaryDirectory(dir=path.parent if path.parent.is_dir() else None) as scratch:
        model.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        shutil.copytree(Path(scratch) / name, path, dirs_exist_ok=True)
    file = path / "adapter_config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["base_model_name_or_path"] = base
    if isinstance(described["target_modules"], list):
        described["target_modules"].sort()  # peft writes a set, in hash order
    file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(model: Any, path: Path, name: str) -> Any:
    """The model with an adapter that `write_adapter` wrote."""
    from peft import PeftModel

    if getattr(model, "peft_config", None):
        model.load_adapter(str(path), adapter_name=name, is_trainable=True)
    else:
        model = PeftModel.from_pretrained(model, str(path), adapter_name=name, is_trainable=True)
    return _learning(model)


def _learning(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    speed_up(model)
    return model


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
