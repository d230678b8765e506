"""Every family of decoder-only LLMs, every attention implementation that it has, padding on either side."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    DECODERS,
    ENCODERS,
    IMPLEMENTATIONS,
    MIXED,
    SWITCHING,
    WINDOW,
    build,
    random_ids,
    stay_causal,
    uncompiled,
)
from torch import Tensor

from ullme.attention import (
    AttentionReport,
    check_bidirectional,
    decoder_layers,
    hidden_states,
    is_encoder,
    layer_reach,
    trunk,
)
from ullme.errors import ConfigError

EVERY = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EVERY_SLOW_FLEX = pytest.mark.parametrize(
    "implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
FAST = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
DOCUMENT = Path(__file__).parents[2] / "docs" / "attention.md"


def compiled(implementation: str) -> Any:
    return uncompiled() if implementation == "flex_attention" else nullcontext()


def supported(family: str, implementation: str) -> Any:
    if (family, implementation) == ("gpt_oss", "flex_attention"):
        pytest.skip("attention sinks with flex_attention need a GPU; the refusal has its own test")
    return build(family, implementation)


def documented(family: str) -> list[str]:
    """The cells of a family's row: name, eager, sdpa, flex_attention, layers."""
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[0] == f"`{family}`" and len(row) == 5]
    return row


def in_words(report: AttentionReport) -> str:
    words = [f"{layer.kind} {layer.window}" if layer.window else layer.kind for layer in report.layers]
    return ", ".join(word + ("" if layer.bidirectional else " (causal)") for word, layer in zip(words, report.layers, strict=True))


@EVERY
@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_the_self_test_passes_and_the_documentation_says_so(family: str, implementation: str) -> None:
    model = supported(family, implementation)
    with compiled(implementation):
        report = check_bidirectional(model, where_possible=family in MIXED)
    assert len(report.layers) == model.config.num_hidden_layers
    assert bool(report.causal_layers) == (family in MIXED)
    row = documented(family)
    assert row[1 + IMPLEMENTATIONS.index(implementation)] == "yes"
    assert row[4] == in_words(report)


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_the_documentation_says_what_an_architecture_lacks(family: str) -> None:
    model = build(family, "eager")
    row = documented(family)
    assert [cell != "no" for cell in row[2:4]] == [model._supports_sdpa, model._supports_flex_attn]


@EVERY
@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_padding_on_either_side_changes_no_real_token(family: str, implementation: str) -> None:
    model = supported(family, implementation)
    short, pads = random_ids(1, 14), 13  # padding beyond the window, so that some rows of the mask are empty
    long = random_ids(1, 14 + pads)
    for is_causal in (False,) if is_encoder(model) else (False, True):
        with torch.no_grad(), compiled(implementation):
            alone = hidden_states(model, short, torch.ones(1, 14, dtype=torch.bool), is_causal=is_causal)
            whole = hidden_states(model, long, torch.ones_like(long, dtype=torch.bool), is_causal=is_causal)
            for start in (0, pads):
                ids, mask = long.repeat(2, 1), torch.ones(2, 14 + pads, dtype=torch.bool)
                ids[0], mask[0] = 0, False
                ids[0, start : start + 14], mask[0, start : start + 14] = short[0], True
                given = mask.clone()
                padded = hidden_states(model, ids, mask, is_causal=is_causal)
                assert torch.equal(mask, given)
                assert (padded[0, start : start + 14] - alone[0]).abs().max() <= 1e-5
                assert (padded[1] - whole[0]).abs().max() <= 1e-5


@EVERY
@pytest.mark.parametrize("family", DECODERS)
def test_causal_mode_is_the_models_own_forward(family: str, implementation: str) -> None:
    model = supported(family, implementation)
    ids = random_ids(2, 11)
    with torch.no_grad(), compiled(implementation):
        plain = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        for is_causal in (False, True):  # whatever came before
            ours = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), is_causal=is_causal)
            assert torch.equal(ours, plain) == is_causal


@FAST
@pytest.mark.parametrize("family", DECODERS)
def test_any_single_layer_that_stays_causal_is_found(family: str, implementation: str) -> None:
    layers = len(decoder_layers(build(family, implementation)))
    knowingly = {"lfm2": [0, 2], "qwen3_next": [0, 2], "llama4_text": [0, 2]}.get(family, [])
    for broken in set(range(layers)) - set(knowingly):
        model = build(family, implementation)
        stay_causal(decoder_layers(model)[broken])
        with pytest.raises(ConfigError, match=rf"backbone\.attention: \w+: layers \[{broken}\] stay causal"):
            check_bidirectional(model, where_possible=True)


@FAST
@pytest.mark.parametrize("family", DECODERS)
def test_recomputation_in_the_backward_sees_the_mode_of_its_forward(family: str, implementation: str) -> None:
    model = build(family, implementation).train()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False  # and none padded, which takes another path
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # for dropout
        for rows in (mask, torch.ones_like(mask)):
            both = [hidden_states(model, ids, rows, is_causal=is_causal)[rows] for is_causal in (False, True)]
            sum((states * states.detach().roll(1, 0)).sum() for states in both).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def widths(rows: list[Tensor], position: int) -> list[tuple[int, int]]:
    """Per layer: how many tokens it sees to the left and to the right, without a gap."""
    result = []
    for row in rows:
        seen = row[0].nonzero().flatten()
        assert len(seen) == seen[-1] - seen[0] + 1
        result.append((position - int(seen[0]), int(seen[-1]) - position))
    return result


@EVERY_SLOW_FLEX
@pytest.mark.parametrize("family", [name for name in SWITCHING if "sliding" in "".join(documented(name))])
def test_a_sliding_window_is_symmetric_or_full_by_choice(family: str, implementation: str) -> None:
    model = supported(family, implementation)
    windowed = ["sliding" in layer for layer in documented(family)[4].split(", ")]
    tokens, position = 2 * WINDOW + 4, WINDOW + 1
    left, right = position, tokens - 1 - position
    side = WINDOW - 1
    for pads in (0, 2):
        mask = torch.ones(1, tokens, dtype=torch.bool)
        mask[0, tokens - pads :] = False
        expected = {
            (True, "symmetric"): [(side, 0) if window else (left, 0) for window in windowed],
            (False, "symmetric"): [(side, side) if window else (left, right - pads) for window in windowed],
            (False, "full"): [(left, right - pads)] * len(windowed),
        }
        for (is_causal, choice), wanted in expected.items():
            with compiled(implementation):
                seen = layer_reach(model, mask, position=position, is_causal=is_causal, sliding_window=choice)
            assert widths(seen, position) == wanted


@FAST
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "gemma2", "falcon-alibi", "gpt2"])
def test_bfloat16_gives_no_false_alarm_and_hides_no_causal_layer(family: str, implementation: str) -> None:
    model = build(family, implementation).to(torch.bfloat16)
    check_bidirectional(model)
    stay_causal(decoder_layers(model)[-1])
    with pytest.raises(ConfigError, match="stay causal"):
        check_bidirectional(model)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_model_is_bidirectional_and_refuses_to_be_causal(family: str) -> None:
    model = build(family, "eager")
    assert is_encoder(model)
    assert trunk(model) is model
    with pytest.raises(ConfigError, match="is an encoder and always bidirectional; set attention: bidirectional"):
        hidden_states(model, random_ids(1, 5), torch.ones(1, 5, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_model_gives_what_it_gives_by_itself(family: str) -> None:
    model = build(family, "eager")
    ids = random_ids(2, 9)
    with torch.no_grad():
        ours = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), is_causal=False)
        assert torch.equal(ours, model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
