"""A query's tokens go through the language model once for all of its candidates, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gradcache import GRL, cached, errors
from torch import nn
from toys import gradients, tiny_encoder, toy_batch

from ullme import shared_prefix
from ullme.attention import trunk
from ullme.batches import TokenRow
from ullme.encoder import Encoder
from ullme.gradcache import step
from ullme.objectives import Objective
from ullme.objectives.preference import Preference
from ullme.objectives.sft import Sft
from ullme.shared_prefix import shares_prefix
from ullme.training import LoraConfig

FULL = ["llama", "gpt2", "gpt_neox", "opt", "phi", "olmo2", "gemma", "granite", "cohere", "stablelm"]
WINDOWED_OR_WITH_STATE = ["gemma2", "mixtral", "gpt_oss", "lfm2", "mamba", "qwen3_next"]
LORA = LoraConfig(rank=4, alpha=8)


def rows(encoder: Encoder) -> list[list[TokenRow]]:
    """Three groups, of one, two and three candidates, of all lengths."""
    prompts = ["what is it\n", "why\n", "a longer question than the others\n"]
    passages = [["alpha beta"], ["gamma", "delta lambda omega"], ["sigma", "kappa theta", "zeta iota rho rho"]]
    ids: Any = encoder.tokenizer
    return [
        [TokenRow([*(start := ids(prompt)["input_ids"]), *ids(passage)["input_ids"]], len(start)) for passage in group]
        for prompt, group in zip(prompts, passages, strict=True)
    ]


def shared(patch: pytest.MonkeyPatch, *, on: bool) -> None:
    patch.setattr("ullme.encoder.SHARED_FROM", 0 if on else 10**9)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many conditions went through the model each time that they were shared."""
    seen: list[int] = []
    plain = shared_prefix.continued_states

    def counted(model: nn.Module, conditions: Any, *others: Any) -> torch.Tensor:
        seen.append(len(conditions.input_ids))
        return plain(model, conditions, *others)

    monkeypatch.setattr("ullme.encoder.continued_states", counted)
    return seen


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_log_probabilities_are_those_of_whole_rows(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    encoder = tiny_encoder(family, dtype=torch.float64)
    if not trunk(encoder.model)._supports_sdpa and implementation == "sdpa":
        pytest.skip(f"{family} has no sdpa")
    encoder.model.set_attn_implementation(implementation)
    encoder.model.eval()
    found = {}
    for on in (False, True):
        shared(monkeypatch, on=on)
        with torch.no_grad():
            found[on] = encoder.candidate_logprobs(rows(encoder))
    assert passes == [3], "the model was found to share prefixes, and did"
    assert torch.equal(found[True][1], found[False][1])
    exact = 1e-10 if implementation == "sdpa" else 1e-6  # transformers' eager softmax is in float32 whatever it is given
    assert torch.allclose(found[True][0], found[False][0], rtol=exact)


@pytest.mark.parametrize("family", WINDOWED_OR_WITH_STATE)
def test_layers_with_a_window_or_a_state_read_whole_rows(family: str, monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    encoder = tiny_encoder(family)
    shared(monkeypatch, on=True)
    with torch.no_grad():
        total, _ = encoder.candidate_logprobs(rows(encoder))
    assert torch.isfinite(total).all()
    assert not passes
    assert not shares_prefix(encoder.model)


@pytest.mark.parametrize("objective", [GRL, Preference(), Sft()], ids=["grl", "preference", "sft"])
@pytest.mark.parametrize(("family", "exact"), [("gpt_neox", 1e-9), ("llama", 2e-7)])
def test_the_gradient_is_that_of_whole_rows(
    family: str, exact: float, objective: Objective, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    """llama's norms compute in float32: there the sum of the candidates' gradients is rounded, not each of them."""
    encoder = tiny_encoder(family, dtype=torch.float64, lora=LORA)
    batch = toy_batch(encoder)
    shared(monkeypatch, on=False)
    report, expected = cached(encoder, objective, batch, 100_000)
    assert not passes
    shared(monkeypatch, on=True)
    for budget in (60, 100_000):
        found, got = cached(encoder, objective, batch, budget)
        assert found.terms == pytest.approx(report.terms, rel=1e-10)
        whole, worst = errors(got, expected)
        assert whole <= exact
        assert worst <= exact
    assert max(passes) > 1


def test_in_single_precision_shared_and_separate_differ_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for on in (False, True):
        shared(monkeypatch, on=on)
        encoder = tiny_encoder(lora=LORA)
        step(encoder, GRL, toy_batch(encoder), chunk_tokens=100_000)
        found[on] = gradients(encoder)
    whole, worst = errors(found[True], found[False])
    assert whole <= 1e-4
    assert worst <= 1e-4


def test_a_cache_that_gives_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares; positions that do not go on after the condition must not pass."""
    plain = shared_prefix._run

    def restarted(inner: Any, input_ids: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, cache: Any) -> torch.Tensor:
        return plain(inner, input_ids, mask, start * 0, cache)

    monkeypatch.setattr(shared_prefix, "_run", restarted)
    assert not shares_prefix(tiny_encoder().model)
    monkeypatch.undo()
    assert shares_prefix(tiny_encoder().model)


def test_checkpointing_goes_without_a_cache(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    shared(monkeypatch, on=True)
    encoder = tiny_encoder(lora=LORA)
    encoder.model.activation_checkpointing_enable({"use_reentrant": False})
    encoder.model.train()
    step(encoder, GRL, toy_batch(encoder), chunk_tokens=100_000)
    assert not passes


def test_few_shared_tokens_are_not_worth_a_pass_of_their_own(passes: list[int]) -> None:
    encoder = tiny_encoder()
    few, many = rows(encoder)[:1], [group * 4 for group in rows(encoder)]
    with torch.no_grad():
        encoder.candidate_logprobs(few)
        assert not passes
        encoder.candidate_logprobs(many)
    assert passes == [3]
