from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ullme import losses
from ullme.losses import entropy, info_nce, kl_alignment, kto, preference, token_logprobs


def softmax(*values: float) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def log_sigmoid(value: float) -> float:
    return -math.log(1 + math.exp(-value))


def test_info_nce_of_two_queries_and_two_passages_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.1], [0.3, 0.5]], dtype=torch.float64)
    loss = info_nce(similarity, torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.bool), temperature=0.5)
    assert loss.tolist() == pytest.approx([-math.log(softmax(1.8, 0.2)[0]), -math.log(softmax(0.6, 1.0)[1])], rel=1e-12)


def test_info_nce_leaves_ignored_candidates_out_of_value_and_gradient() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.8]], dtype=torch.float64, requires_grad=True)
    ignored = torch.tensor([[False, False, True]])
    loss = info_nce(similarity, torch.tensor([0]), ignored, temperature=0.1)
    loss.sum().backward()
    assert similarity.grad is not None
    assert float(similarity.grad[0, 2]) == 0
    assert loss.item() == pytest.approx(-math.log(softmax(9, 1)[0]), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_by_hand_with_label_smoothing(smoothing: float) -> None:
    margin = 0.1 * ((-10 + 12) - (-11 + 11.5))
    expected = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    difference = torch.tensor([[(-10.0 + 11.0) - (-12.0 + 11.5)]], dtype=torch.float64)
    assert preference(difference, "sigmoid", beta=0.1, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_dpo_is_log_two_where_policy_and_reference_agree() -> None:
    assert torch.allclose(preference(torch.zeros(3, 2), "sigmoid", beta=0.3), torch.full((3, 2), math.log(2)))


def test_ipo_wants_a_distance_and_hinge_no_more_than_one() -> None:
    difference = torch.tensor([[0.0, 2.5, 5.0, 20.0]])
    assert preference(difference, "ipo", beta=0.2).tolist() == [pytest.approx([6.25, 0, 6.25, 306.25])]
    assert preference(difference, "hinge", beta=0.2).tolist() == [pytest.approx([1, 0.5, 0, 0])]


def test_kto_by_hand_with_missing_negatives() -> None:
    gain = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, 99.0], [-4.0, 99.0, 99.0]], dtype=torch.float64)
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    loss = kto(gain, present, torch.tensor(0.25, dtype=torch.float64), beta=0.2)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def desirable(r: float) -> float:
        return 1 - sigmoid(0.2 * (r - 0.25))

    def undesirable(r: float) -> float:
        return 1 - sigmoid(0.2 * (0.25 - r))

    expected = [desirable(2) / 2 + (undesirable(-1) + undesirable(0.5)) / 4, (desirable(1) + undesirable(3)) / 2, desirable(-4) / 2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_kl_by_hand_with_a_missing_candidate() -> None:
    representation = torch.tensor([[0.8, 0.4, 77.0]], dtype=torch.float64)
    generation = torch.tensor([[-2.0, -3.0, 99.0]], dtype=torch.float64)
    present = torch.tensor([[True, True, False]])
    loss = kl_alignment(representation, generation, present, temperature=0.5, generation_temperature=2.0)
    target, student = softmax(-1.0, -1.5), softmax(1.6, 0.8)
    assert loss.item() == pytest.approx(sum(p * math.log(p / q) for p, q in zip(target, student, strict=True)), rel=1e-12)


def test_kl_moves_the_representations_only() -> None:
    representation, generation = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    kl_alignment(representation, generation, present, temperature=0.1, generation_temperature=1.0).sum().backward()
    assert generation.grad is None
    assert representation.grad is not None
    assert float(representation.grad[1, 2]) == 0
    assert bool(representation.grad[present].abs().min() > 0)


def test_kl_of_equal_distributions_and_of_a_single_candidate_is_zero() -> None:
    scores = torch.randn(1, 4, dtype=torch.float64)
    present = torch.ones(1, 4, dtype=torch.bool)
    assert kl_alignment(scores, scores, present, temperature=0.7, generation_temperature=0.7).item() == pytest.approx(0, abs=1e-12)
    alone = torch.tensor([[True, False, False, False]])
    assert kl_alignment(scores, -scores, alone, temperature=0.1, generation_temperature=1.0).item() == 0


def test_entropy_of_an_even_choice_is_the_log_of_the_candidates() -> None:
    present = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
    assert entropy(torch.zeros(3, 4), present, temperature=0.1).tolist() == pytest.approx([math.log(4), math.log(2), 0])


WAYS = ["frozen", "frozen in blocks", "fused", "chunks", "one chunk"]


def scored(way: str, hidden: Tensor, head: nn.Module, targets: Tensor, patch: pytest.MonkeyPatch) -> Tensor:
    """token_logprobs of a frozen head, with torch's fused loss, or without it in several or one checkpointed chunk."""
    if way.startswith("frozen"):
        head.requires_grad_(False)
        patch.setattr(losses, "LOGIT_BYTES", 4 * head.weight.shape[0] * 7 if "blocks" in way else 2**20)
    elif way == "fused":
        assert hasattr(nn, "LinearCrossEntropyOptions")
    else:
        patch.delattr(nn, "LinearCrossEntropyOptions")
        patch.setattr(losses, "LOGIT_BYTES", 4 * head.weight.shape[0] * 7 if way == "chunks" else 2**20)
    return token_logprobs(hidden, head, targets)


@pytest.mark.parametrize("way", WAYS)
def test_token_logprobs_equal_the_naive_ones_in_value_and_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 31, bias=False).double()
    targets = torch.randint(31, (40,))
    found = []
    for naive in (True, False):
        hidden = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)
        head.weight.grad = None
        if naive:
            values = head(hidden).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        else:
            values = scored(way, hidden, head, targets, monkeypatch)
        (values * torch.linspace(-1, 2, 40, dtype=torch.float64)).sum().backward()
        found.append((values.detach(), hidden.grad, head.weight.grad))
    for expected, got in list(zip(*found, strict=True))[: 2 if way.startswith("frozen") else 3]:
        assert expected is not None
        assert got is not None
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_token_logprobs_are_float32_for_a_half_precision_head(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).bfloat16()
    hidden, targets = torch.randn(32, 16).bfloat16(), torch.randint(50, (32,))
    got = scored(way, hidden, head, targets, monkeypatch)
    assert got.dtype == torch.float32
    expected = head.float()(hidden.float()).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert torch.allclose(got, expected, atol=0.05)


def test_token_logprobs_of_a_head_with_a_bias_use_it() -> None:
    head = nn.Linear(4, 9).double()
    hidden, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(9, (20,))
    expected = head(hidden).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert torch.allclose(token_logprobs(hidden, head, targets), expected)


def test_no_scored_token_gives_no_logprob() -> None:
    empty: Any = torch.zeros(0, 4)
    assert token_logprobs(empty, nn.Linear(4, 9, bias=False), torch.zeros(0, dtype=torch.long)).shape == (0,)
