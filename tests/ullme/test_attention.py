from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from ullme.attention import check_bidirectional, decoder_layers, expand_mask, leaks, trunk
from ullme.errors import ConfigError
from ullme.tiny import tiny_causal_lm

BOTH = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "olmo2", "smollm3", "gpt_neox", "gpt2"]


def tiny(family: str, implementation: str) -> Any:
    model, _ = tiny_causal_lm(family)
    model.set_attn_implementation(implementation)
    return model.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BOTH)
def test_architectures_that_switch_pass(family: str, implementation: str) -> None:
    model = tiny(family, implementation)
    check_bidirectional(model)
    assert leaks(model, is_causal=True) == [False, False]


def test_dropout_is_off_during_the_check_and_back_on_after_it() -> None:
    model = tiny("gpt2", "eager").train()  # its configuration drops out a tenth
    check_bidirectional(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("family", "implementation"), [("stablelm", "sdpa"), ("bloom", "eager"), ("falcon", "eager")])
def test_architectures_that_stay_causal_are_refused_with_their_layers(family: str, implementation: str) -> None:
    model, _ = tiny_causal_lm(family)
    if family == "stablelm":
        model.set_attn_implementation(implementation)
    with pytest.raises(ConfigError, match=r"layers \[0, 1\] stay causal.*attention: causal with pooling: last"):
        check_bidirectional(model)


def change_mask(layer: nn.Module, *, causal: bool) -> None:
    """Make this layer see a causal mask, or none at all, whatever the model hands it."""
    plain = layer.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        width = hidden_states.shape[1]
        blocked = torch.full((width, width), torch.finfo(hidden_states.dtype).min).triu(1) if causal else torch.zeros(width, width)
        kwargs["attention_mask"] = blocked[None, None]
        return plain(hidden_states, *args, **kwargs)

    layer.forward = MethodType(forward, layer)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_single_layer_that_stays_causal_is_found(broken: int, implementation: str) -> None:
    model = tiny("llama", implementation)
    change_mask(decoder_layers(model)[broken], causal=True)
    with pytest.raises(ConfigError, match=rf"LlamaModel: layers \[{broken}\] stay causal"):
        check_bidirectional(model)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_single_layer_that_sees_later_tokens_in_causal_mode_is_found(broken: int) -> None:
    model = tiny("llama", "eager")
    change_mask(decoder_layers(model)[broken], causal=False)
    with pytest.raises(ConfigError, match=rf"layers \[{broken}\] see later tokens in causal mode"):
        check_bidirectional(model)


def test_the_decoder_and_its_layers_are_found_through_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = tiny_causal_lm("llama")
    layers = decoder_layers(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert trunk(wrapped) is model.model
    assert decoder_layers(wrapped) == layers
    check_bidirectional(wrapped)


def test_a_mask_is_handed_on_only_when_something_is_padded() -> None:
    assert expand_mask(torch.ones(2, 3, dtype=torch.bool)) is None
    padded = expand_mask(torch.tensor([[True, False]]))
    assert padded is not None
    assert padded.tolist() == [[1, 0]]
