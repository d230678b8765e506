"""A query's tokens go through the language model once for all of its candidates, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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
from ullme.shared_prefix import Branches, shares_prefix, side_by_side
from ullme.training import LoraConfig

SHARING = ["llama", "gpt2", "gpt_neox", "opt", "phi", "olmo2", "gemma", "granite", "cohere", "stablelm"]
WINDOWED = ["gemma2", "mistral", "cohere2", "qwen3", "gemma3_text"]
WITH_STATE = ["lfm2", "mamba", "qwen3_next"]
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
    patch.setattr("ullme.encoder.SHARED_IN", (torch.float32, torch.float64) if on else ())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows with branches went through the model each time, those of the proof left out."""
    seen: list[int] = []
    states, plain = shared_prefix.shared_states, shared_prefix.branched_states

    def counted(model: nn.Module, rows: Sequence[Branches]) -> tuple[torch.Tensor, ...]:
        seen.append(len(rows))
        return plain(model, rows)

    def watched(model: nn.Module, groups: Sequence[Sequence[TokenRow]]) -> tuple[torch.Tensor, ...]:
        with monkeypatch.context() as patch:
            patch.setattr(shared_prefix, "branched_states", counted)
            return states(model, groups)

    monkeypatch.setattr("ullme.encoder.shared_states", watched)
    return seen


def both(encoder: Encoder, groups: list[list[TokenRow]], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of whole rows, and those of shared prompts; the numbers of tokens are equal."""
    found = {}
    encoder.model.eval()
    for on in (False, True):
        shared(monkeypatch, on=on)
        with torch.no_grad():
            found[on] = encoder.candidate_logprobs(groups)
    assert torch.equal(found[True][1], found[False][1])
    return found[False][0], found[True][0]


@pytest.mark.parametrize("family", [*SHARING, *WINDOWED])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_log_probabilities_are_those_of_whole_rows(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    """transformers' eager softmax is in float32 whatever it is given, and there a float64 mask turns padding into NaN."""
    encoder = tiny_encoder(family, dtype=torch.float64 if implementation == "sdpa" else torch.float32)
    if not trunk(encoder.model)._supports_sdpa and implementation == "sdpa":
        pytest.skip(f"{family} has no sdpa")
    encoder.model.set_attn_implementation(implementation)
    expected, got = both(encoder, rows(encoder), monkeypatch)
    assert sum(passes) == 3, "the model was found to share prefixes, and did"
    assert torch.allclose(got, expected, rtol=1e-10 if implementation == "sdpa" else 1e-5)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_reaches_back_in_each_branch_and_not_in_the_row(
    family: str, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    encoder = tiny_encoder(family)
    encoder.model.set_attn_implementation("eager")
    window = trunk(encoder.model).config.sliding_window
    ids: Any = encoder.tokenizer
    start = ids("why\n")["input_ids"]
    words = ids(" ".join(["alpha beta gamma delta"] * window))["input_ids"]
    group = [TokenRow([*start, *words[shift : shift + 2 * window + shift]], len(start)) for shift in (0, 1, 2)]
    expected, got = both(encoder, [group], monkeypatch)
    assert passes == [1]
    assert torch.allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("family", WITH_STATE)
def test_layers_with_a_state_read_whole_rows(family: str, passes: list[int]) -> None:
    encoder = tiny_encoder(family)
    with torch.no_grad():
        total, _ = encoder.candidate_logprobs(rows(encoder))
    assert torch.isfinite(total).all()
    assert not passes
    assert not shares_prefix(encoder.model)


def test_no_row_is_longer_than_the_longest_unless_a_single_candidate_is(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    group = [TokenRow([0] * (3 + length), 3) for length in (4, 4, 30, 1, 1, 1)]
    monkeypatch.setattr(shared_prefix, "LONGEST", 12)
    assert [[len(row) - 3 for row in some] for some in side_by_side(group)] == [[4, 4], [30], [1, 1, 1]]
    expected, got = both(encoder := tiny_encoder(dtype=torch.float64), rows(encoder), monkeypatch)
    assert sum(passes) > 3
    assert torch.allclose(got, expected, rtol=1e-10)


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


@pytest.mark.parametrize("wrong", ["positions", "mask"])
def test_what_gives_something_else_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares; positions that go on from branch to branch, or a branch that sees another, must not pass."""
    plain = Branches.of
    if wrong == "positions":
        monkeypatch.setattr(Branches, "of", lambda group: replace(made := plain(group), position=np.arange(len(made))))
    else:
        monkeypatch.setattr(shared_prefix, "branches_mask", lambda branch: torch.ones(*branch.shape, branch.shape[1]).bool().tril())
    assert not shares_prefix(tiny_encoder().model)
    monkeypatch.undo()
    assert shares_prefix(tiny_encoder().model)


def test_checkpointing_shares_too(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    found = {}
    for on in (False, True):
        shared(monkeypatch, on=on)
        encoder = tiny_encoder(dtype=torch.float64, lora=LORA)
        encoder.model.activation_checkpointing_enable({"use_reentrant": False})
        encoder.model.train()
        step(encoder, GRL, toy_batch(encoder), chunk_tokens=100_000)
        found[on] = gradients(encoder)
    assert passes
    whole, worst = errors(found[True], found[False])
    assert whole <= 2e-7
    assert worst <= 2e-7


def test_single_candidates_go_as_they_are(passes: list[int]) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.candidate_logprobs([group[:1] for group in rows(encoder)])
    assert not passes


def test_in_double_precision_rows_are_computed_one_by_one(passes: list[int]) -> None:
    encoder = tiny_encoder(dtype=torch.float64)
    with torch.no_grad():
        encoder.candidate_logprobs(rows(encoder))
    assert not passes
