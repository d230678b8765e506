"""Which input positions a layer's output depends on, measured on the running model.

The gradient of the output at one position, with respect to the layer's input, is exactly zero where nothing is seen and
nothing else where something is: a perturbation without a size. So there is no threshold: not for bfloat16, not beside a
residual stream a thousand times larger than what attention adds, not for experts that sort tokens differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

__all__ = ["reach"]


def reach(layers: Sequence[nn.Module], forward: Callable[[], Any], *, position: int) -> list[Bool[Tensor, "B S"]]:
    """Per layer: True where its input moves its output at `position`, in one run of `forward`.

    The lowest and the highest layer are measured after `forward` has returned, as gradient checkpointing recomputes them: what
    they do must be in their arguments. A layer whose derivative is not finite counts as seeing nothing there.
    """
    try:
        return _by_gradient(layers, forward, position)
    except RuntimeError:  # something without a backward, such as flex_attention on a CPU
        return _by_trial(layers, forward, position)


@dataclass(frozen=True)
class Call:
    """What a layer was called with."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The states [B S D] that came in."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call on other states."""
        return ((hidden, *self.args[1:]), self.kwargs) if self.args else ((), {**self.kwargs, "hidden_states": hidden})

    def again(self, hidden: Tensor) -> Tensor:
        """The layer's output [B S D] for other states."""
        args, kwargs = self.arguments(hidden)
        return _states(self.layer(*args, **kwargs))


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _direction(hidden: Tensor) -> Tensor:
    """A fixed random direction [D], so that nothing cancels by chance."""
    return torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden.device)


def _by_gradient(layers: Sequence[nn.Module], forward: Callable[[], Any], position: int) -> list[Tensor]:
    calls: list[Call] = []
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(Call(layer, args, dict(kwargs)))
        leaves.append(calls[-1].hidden.detach().requires_grad_())  # cut off from the layer below
        return calls[-1].arguments(leaves[-1].clone())  # some layers add to their input in place

    def leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del layer, args, kwargs
        outputs.append(_states(output))

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave, with_kwargs=True) for layer in layers]
    try:
        with torch.enable_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    for index in {0, len(calls) - 1} if calls else ():
        leaves[index] = calls[index].hidden.detach().requires_grad_()
        with torch.enable_grad():
            outputs[index] = calls[index].again(leaves[index].clone())
    return [_nonzero_slope(output[:, position], leaf) for output, leaf in zip(outputs, leaves, strict=True)]


def _nonzero_slope(output: Tensor, leaf: Tensor) -> Tensor:
    with torch.enable_grad():
        total = (output.float() * _direction(output)).sum()
    (slope,) = torch.autograd.grad(total, leaf)
    return (slope.isfinite() & (slope != 0)).any(-1).cpu()


@torch.no_grad()
def _by_trial(layers: Sequence[nn.Module], forward: Callable[[], Any], position: int) -> list[Tensor]:
    """The same by changing one input position after the other, beyond the rounding of the layer's own precision."""
    calls: list[Call] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(Call(module, args, dict(kwargs))), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [_moved_by_trial(call, position).cpu() for call in calls]


def _moved_by_trial(call: Call, position: int) -> Tensor:
    hidden = call.hidden
    push = 10 * hidden.abs().mean().clamp_min(1e-3) * _direction(hidden)
    plain = call.again(hidden)[:, position].float()
    tolerance = 4 * torch.finfo(hidden.dtype).eps * plain.abs().amax(-1)
    moved = []
    for changed_position in range(hidden.shape[1]):
        changed = hidden.clone()
        changed[:, changed_position] += push.to(hidden.dtype)
        moved.append((call.again(changed)[:, position].float() - plain).abs().amax(-1) > tolerance)
    return torch.stack(moved, 1)
