from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from ullme.lora import speed_up
from ullme.tiny import tiny_causal_lm

IDS = torch.arange(2, 26).view(3, 8)


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_causal_lm("llama")[0].to(dtype),
        LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **settings),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.1
        if parameter.requires_grad and dtype == torch.float64:
            parameter.data = parameter.data.double()
    return model.train()


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.manual_seed(3)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_values_and_gradients_equal_those_of_peft(settings: dict[str, Any]) -> None:
    plain = adapted(**settings)
    fast = copy.deepcopy(plain)
    assert speed_up(fast) == sum(isinstance(module, Linear) for module in fast.modules()) == 14
    (expected, wanted), (got, gradients) = run(plain), run(fast)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-11)
    assert gradients.keys() == wanted.keys()
    assert len(gradients) == 28  # A and B of 14 layers; no frozen weight
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-9, atol=1e-10 * float(wanted[name].abs().max())), name


def test_a_half_precision_trunk_keeps_float32_adapters_and_their_gradients() -> None:
    plain = adapted(torch.bfloat16)
    fast = copy.deepcopy(plain)
    speed_up(fast)
    (expected, wanted), (got, gradients) = run(plain), run(fast)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected.float(), atol=0.05 * float(expected.abs().max()))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_an_input_without_gradient_still_trains_the_first_layer() -> None:
    layer = adapted().get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    fast = copy.deepcopy(layer)
    assert speed_up(fast) == 1
    states = torch.randn(2, 5, 64, dtype=torch.float64)
    for module in (layer, fast):
        module(states).square().sum().backward()
    for expected, got in zip(layer.parameters(), fast.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.allclose(got.grad, expected.grad)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # peft: such an adapter cannot be merged
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_is_left_to_peft(settings: dict[str, Any]) -> None:
    model = adapted(torch.float32, **settings)
    assert speed_up(model) == 0
    assert all("forward" not in vars(module) for module in model.modules() if isinstance(module, Linear))


def test_layers_with_a_bias_are_left_to_peft() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_causal_lm("qwen2")[0], LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    left = [name for name, module in model.named_modules() if isinstance(module, Linear) and module.base_layer.bias is not None]
    assert len(left) == 3 * model.config.num_hidden_layers  # q, k and v
    assert speed_up(model) == 7 * model.config.num_hidden_layers - len(left)


def test_switching_off_and_merging_follow_peft() -> None:
    plain: Any = adapted()
    fast: Any = copy.deepcopy(plain)
    speed_up(fast)
    with torch.no_grad(), plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with torch.no_grad():
        before = fast(input_ids=IDS).logits
        merged = fast.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, before, rtol=1e-10, atol=1e-10)
