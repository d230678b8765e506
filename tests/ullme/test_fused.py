from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from toys import tiny_encoder

from ullme.fused import ROTATION, _forward_of, _rotation, fused_layers, ordered_weights
from ullme.tiny import tiny_causal_lm
from ullme.training import LoraConfig

BF16 = torch.bfloat16
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN has products in bfloat16 for this CPU (AVX-512 or AVX-NE-CONVERT)."""


def replaced(model: nn.Module) -> set[str]:
    """Classes whose forward is another one within the block."""
    with torch.no_grad(), fused_layers(model):
        return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "mistral", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_hidden_states_stay_the_same(family: str, dtype: torch.dtype) -> None:
    model = tiny_causal_lm(family)[0].to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0.5, 0.2)  # weights of their own, or 1 + w looks like w
    ids = torch.randint(5, 100, (2, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()
        with fused_layers(model):
            found = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_which_layers_are_replaced_and_that_they_come_back() -> None:
    assert replaced(tiny_causal_lm("llama")[0]) == {"LlamaRMSNorm"}
    assert replaced(tiny_causal_lm("llama")[0].to(BF16)) == {"LlamaRMSNorm"} | ({"LlamaMLP"} if HAS_BF16 else set())
    gemma = tiny_causal_lm("gemma2")[0].to(BF16)
    assert replaced(gemma) == {"Gemma2RMSNorm"}  # its MLP has another activation
    assert not any("forward" in vars(module) for module in gemma.modules())
    assert replaced(tiny_causal_lm("gpt2")[0].to(BF16)) == set()


def test_ordered_weights_give_the_same_as_long_as_the_block_lasts() -> None:
    model = tiny_causal_lm("qwen2")[0].to(BF16).eval()  # its attention has biases
    ids = torch.randint(5, 100, (2, 9))

    def states() -> Tensor:
        with torch.no_grad(), fused_layers(model):
            return model(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()

    wanted = states()
    with ordered_weights(model, rows=100):
        assert ("Linear" in replaced(model)) == HAS_BF16
        found = states()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()  # a copy is used: this is not seen
        assert torch.equal(states(), found) == HAS_BF16
    assert "Linear" not in replaced(model)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    assert not torch.equal(states(), found)


def test_weights_of_large_models_and_of_single_precision_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with ordered_weights(tiny_causal_lm("llama")[0], rows=100):
        assert "Linear" not in replaced(tiny_causal_lm("llama")[0])
    model = tiny_causal_lm("llama")[0].to(BF16)
    monkeypatch.setattr("ullme.fused.ORDERED_BYTES", 1000)
    with ordered_weights(model, rows=100):
        assert "Linear" not in replaced(model)


@pytest.mark.parametrize(("family", "fast"), [("llama", True), ("qwen3", True), ("cohere", False), ("gpt2", False)])
def test_rotation_is_replaced_where_halves_are_rotated_and_comes_back(family: str, fast: bool) -> None:
    model = tiny_causal_lm(family)[0].eval()
    source = sys.modules[type(model).__module__]
    own = getattr(source, ROTATION, None)
    with torch.no_grad(), fused_layers(model):
        assert (getattr(source, ROTATION, None) is not own) == fast
    assert getattr(source, ROTATION, None) is own
    with fused_layers(model):
        assert getattr(source, ROTATION, None) is own


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_fast_rotation_is_the_familys_own(dtype: torch.dtype) -> None:
    source = sys.modules[type(tiny_causal_lm("llama")[0]).__module__]
    own = getattr(source, ROTATION)
    found = _rotation(source)
    assert found is not None
    made = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 7, heads, 16, generator=made).transpose(1, 2).to(dtype) for heads in (6, 2))
    angles = torch.randn(2, 7, 8, generator=made).repeat(1, 1, 2)
    for rotations in ((angles.cos().to(dtype), angles.sin().to(dtype)), (angles.cos(), angles.sin())):
        with torch.no_grad():
            for one, other in zip(found.fast(q, k, *rotations), own(q, k, *rotations), strict=True):
                assert one.dtype == other.dtype
                assert torch.allclose(one.float(), other.float(), atol=1e-6 if dtype == torch.float32 else 0.04)


def test_a_gradient_or_an_adapter_leaves_them_alone() -> None:
    model = tiny_causal_lm("llama")[0].to(BF16)
    with fused_layers(model):
        assert not any("forward" in vars(module) for module in model.modules())
    adapted = tiny_encoder(dtype=BF16, lora=LoraConfig(rank=2))
    with torch.no_grad(), fused_layers(adapted.model):
        assert not any("forward" in vars(m) for m in adapted.model.modules() if type(m).__name__ == "LlamaMLP")


def test_weights_that_change_are_seen() -> None:
    model = tiny_causal_lm("llama")[0]
    norm: Any = model.model.norm
    x = torch.randn(1, 3, norm.weight.numel())
    with torch.no_grad(), fused_layers(model):
        before = norm(x)
        norm.weight.data.mul_(2)
        assert torch.allclose(norm(x), 2 * before)


class OddRMSNorm(nn.Module):
    """Calls itself one, but takes the mean away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class OddMLP(nn.Module):
    """The names of a gated MLP, and a residual of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(width, width, bias=False, dtype=BF16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("odd", [OddRMSNorm, OddMLP])
def test_a_layer_that_only_looks_alike_is_left_as_it_is(odd: Any) -> None:
    assert _forward_of(odd(16)) is None
