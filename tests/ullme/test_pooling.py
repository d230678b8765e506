from __future__ import annotations

import pytest
import torch

from ullme.errors import ContractError
from ullme.pooling import POOLINGS, pool

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [5.0, 0.0], [100.0, 100.0]], [[2.0, 0.0], [0.0, 2.0], [4.0, 4.0], [1.0, 1.0]]])
MASK = torch.tensor([[True, True, True, False], [False, True, True, True]])
BY_HAND = {
    "mean": [[3.0, -2 / 3], [5 / 3, 7 / 3]],
    "weighted_mean": [[(1 + 6 + 15) / 6, (-4 + 4 + 0) / 6], [(0 + 8 + 3) / 6, (2 + 8 + 3) / 6]],
    "last": [[5.0, 0.0], [1.0, 1.0]],
    "first": [[1.0, -4.0], [0.0, 2.0]],
    "max": [[5.0, 2.0], [4.0, 4.0]],
}


@pytest.mark.parametrize("kind", POOLINGS)
def test_each_kind_equals_the_value_by_hand_and_has_unit_norm(kind: str) -> None:
    expected = torch.tensor(BY_HAND[kind])
    assert torch.allclose(POOLINGS[kind](HIDDEN, MASK), expected, atol=1e-6)
    assert torch.allclose(pool(kind, HIDDEN, MASK), expected / expected.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("kind", POOLINGS)
def test_arguments_are_not_edited(kind: str) -> None:
    hidden, mask = HIDDEN.clone(), MASK.clone()
    pool(kind, hidden, mask)
    assert torch.equal(hidden, HIDDEN)
    assert torch.equal(mask, MASK)


@pytest.mark.parametrize("kind", POOLINGS)
def test_the_side_and_the_content_of_the_padding_do_not_matter(kind: str) -> None:
    tokens = torch.randn(1, 3, 4)
    noise = torch.full((1, 2, 4), 1e4)
    real, padding = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    alone = pool(kind, tokens, real)
    assert torch.equal(pool(kind, torch.cat([tokens, noise], 1), torch.cat([real, padding], 1)), alone)
    assert torch.equal(pool(kind, torch.cat([noise, tokens], 1), torch.cat([padding, real], 1)), alone)


@pytest.mark.parametrize("kind", POOLINGS)
def test_half_precision_is_pooled_in_float32_and_float64_stays(kind: str) -> None:
    hidden = torch.randn(2, 4, 8)
    assert pool(kind, hidden.bfloat16(), MASK).dtype == torch.float32
    assert torch.equal(pool(kind, hidden.bfloat16(), MASK), pool(kind, hidden.bfloat16().float(), MASK))
    assert pool(kind, hidden.double(), MASK).dtype == torch.float64


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_row_without_any_counted_token_is_refused(kind: str) -> None:
    with pytest.raises(ContractError, match="at least one token"):
        pool(kind, HIDDEN, MASK & torch.tensor([[True], [False]]))


def test_weights_count_the_positions_of_the_prompt_too() -> None:
    mask, attended = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[2 * 3.0 + 3 * 5.0, 2 * 2.0 + 3 * 0.0]])
    assert torch.allclose(pool("weighted_mean", HIDDEN[:1], mask, attended), expected / expected.norm())


def test_an_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(ContractError, match="mean, weighted_mean, last, first, max, got 'median'"):
        pool("median", HIDDEN, MASK)


def test_wrong_shapes_do_not_pass_unseen() -> None:
    with pytest.raises(TypeError, match=r"(?i)type-check"):
        pool("mean", HIDDEN, MASK[:, :2])
