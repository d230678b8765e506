"""The same layers in less time, for inference on a CPU: fewer passes over memory, and weights as the products want them.

    RMS norm        root, scale and weight without the temporaries of its definition
    linear layer    bfloat16: its weight in oneDNN's own order, made once by `ordered_weights` and not in every product
    gated MLP       silu(x G) * (x U) within the two products, for bfloat16 linear layers without bias
    rotation        x cos + (its halves changed) sin, token by token as the projections leave them (arXiv 2104.09864, eq. 34)

A layer is replaced only where, on numbers of its own size, it gives what its own code gives; others run as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ullme.attention import decoder_layers
from ullme.distributed import is_sharded

__all__ = ["fused_layers", "is_compiled", "ordered_weights"]

Forward = Callable[[Tensor], Tensor]
PROBE_ROWS = 8
ROTATION = "apply_rotary_pos_emb"
ORDERED_BYTES = 2**30
"""Weights that are copied at most; those of larger models are large matrices, whose order matters less."""
_made: WeakKeyDictionary[nn.Module, Forward | None] = WeakKeyDictionary()
_ordered: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@contextmanager
def ordered_weights(trunk: nn.Module, *, rows: int) -> Iterator[None]:
    """Copies of the linear layers' weights in the order of oneDNN's products, as long as the block lasts.

    The weights must not change in it. rows: about how many each product has. Does nothing where a layer's own product is better.
    """
    layers = [module for module in trunk.modules() if isinstance(module, nn.Linear) and _is_half_linear(module)]
    order = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    fits = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) <= ORDERED_BYTES
    if order is not None and fits and torch.backends.mkldnn.is_available():
        alike: dict[torch.Size, bool] = {}
        for layer in layers:
            try:
                ordered = order(layer.weight.detach(), rows)
            except RuntimeError:  # a CPU without the instructions that these products need
                break
            if layer.weight.shape not in alike:
                alike[layer.weight.shape] = _same(layer, _product(layer, ordered), layer.in_features, {torch.bfloat16})
            if alike[layer.weight.shape]:
                _ordered[layer] = ordered
    try:
        yield
    finally:
        for layer in layers:
            _ordered.pop(layer, None)


def _is_half_linear(module: Any) -> bool:
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def _product(layer: Any, ordered: Tensor) -> Forward:
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, layer.bias, "none", [], "")


@contextmanager
def fused_layers(trunk: nn.Module) -> Iterator[None]:
    """The trunk's layers computed so, as long as the block lasts: on a CPU, without gradient, neither compiled nor in pieces, and
    not in float64, which is for where every digit counts.
    """
    replaced = []
    if not torch.is_grad_enabled() and _may_be_fused(trunk):
        for module in trunk.modules():
            if "forward" in vars(module) or (forward := _forward_of(module)) is None:
                continue
            replaced.append(module)
            module.forward = forward  # type: ignore[method-assign]
    source = sys.modules[type(trunk).__module__]
    rotation = _rotation(source) if replaced else None
    if rotation is not None:
        setattr(source, ROTATION, rotation.fast)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
        if rotation is not None:
            setattr(source, ROTATION, rotation.own)


def _may_be_fused(trunk: nn.Module) -> bool:
    weight = next(trunk.parameters())
    fitting = weight.device.type == "cpu" and weight.dtype != torch.float64
    return fitting and not is_compiled(trunk) and not any(map(is_sharded, trunk.parameters()))


def is_compiled(inner: nn.Module) -> bool:
    """Whether its layers were compiled."""
    return any(layer._compiled_call_impl is not None for layer in decoder_layers(inner))


def _forward_of(module: nn.Module) -> Forward | None:
    if module in _ordered:
        return _product(module, _ordered[module])
    made = _norm if _is_rms_norm(module) else _gated_mlp if _is_gated_mlp(module) else None
    if made is None:
        return None
    if module not in _made:
        _made[module] = made(module)
    return _made[module]


@dataclass(frozen=True)
class _Rotation:
    """A family's own function of rotary positions, and one that gives the same."""

    own: Callable[..., Any]
    fast: Callable[..., Any]


@lru_cache(maxsize=64)
def _rotation(source: ModuleType) -> _Rotation | None:
    """That of a module of transformers, if it rotates halves (others rotate neighbours, or a part)."""
    own = getattr(source, ROTATION, None)
    if own is None:
        return None

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any) -> Any:
        width = q.shape[-1]
        usual = cos.ndim == 3 and cos.shape[-1] == width and width % 2 == 0 and q.dtype == k.dtype == cos.dtype == sin.dtype
        if others or more or torch.is_grad_enabled() or not usual:
            return own(q, k, cos, sin, *others, **more)
        half = width // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)
        return _rotated(q, cos.unsqueeze(2), signed), _rotated(k, cos.unsqueeze(2), signed)

    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 5, heads, 8, generator=made).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, 5, 4, generator=made).repeat(1, 1, 2)
    try:
        with torch.no_grad():
            wanted, found = own(q, k, angles.cos(), angles.sin()), fast(q, k, angles.cos(), angles.sin())
    except (RuntimeError, TypeError, ValueError):
        return None
    alike = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(wanted, found, strict=True))
    return _Rotation(own, fast) if alike else None


def _rotated(
    x: Float[Tensor, "B H T E"], cos: Float[Tensor, "B T 1 E"], signed: Float[Tensor, "B T 1 E"]
) -> Float[Tensor, "B H T E"]:
    x = x.transpose(1, 2)
    half = x.shape[-1] // 2
    return (x * cos).addcmul_(torch.cat((x[..., half:], x[..., :half]), -1), signed).transpose(1, 2)


def _is_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1


def _norm(module: Any) -> Forward | None:
    """x / sqrt(mean(x^2) + eps) * w, or with 1 + w, in float32 (arXiv 1910.07467, eq. 4)."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        return None

    def forward_with(shift: float) -> Forward:
        def forward(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
            weight = module.weight
            wide = x.float()
            square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(weight.numel())
            return (wide * square.add_(epsilon).rsqrt_()).mul_(weight.float() + shift).to(torch.result_type(x, weight))

        return forward

    dtypes = {torch.float32, module.weight.dtype}
    return next(
        (forward for forward in map(forward_with, (0.0, 1.0)) if _same(module, forward, module.weight.numel(), dtypes)), None
    )


def _is_gated_mlp(module: Any) -> bool:
    """Checked at each call: an adapter may have been put in a layer's place."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(part) is nn.Linear and part.bias is None and part.weight.dtype == torch.bfloat16 for part in parts)


def _gated_mlp(module: Any) -> Forward | None:
    product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None or not torch.backends.mkldnn.is_available():
        return None

    def forward(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        gate, up = (_ordered.get(part, part.weight) for part in (module.gate_proj, module.up_proj))
        return module.down_proj(product.binary(x, product(x, gate, None, "swish", [], ""), up, None, "mul"))

    return forward if _same(module, forward, module.gate_proj.in_features, {torch.bfloat16}) else None


@torch.no_grad()
def _same(module: nn.Module, forward: Forward, width: int, dtypes: set[torch.dtype]) -> bool:
    """Whether both give the same, up to the rounding of bfloat16, and in the same dtype."""
    for dtype in dtypes:
        x = torch.randn(1, PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
        try:
            wanted, found = type(module).forward(module, x), forward(x)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError):
            return False
        away = (wanted.float() - found.float()).norm() / wanted.float().norm().clamp_min(1e-12)
        allowed = 1e-5 if {dtype, next(module.parameters()).dtype} == {torch.float32} else 1e-2
        if wanted.dtype != found.dtype or wanted.shape != found.shape or not away <= allowed:
            return False
    return True
