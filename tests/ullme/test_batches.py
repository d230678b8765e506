from __future__ import annotations

import numpy as np
import pytest
import torch

from ullme.batches import PASS_TOKENS, TokenRow, chunk_by_tokens, collate
from ullme.errors import ContractError

ROWS = [TokenRow([5, 6, 7], 1), TokenRow([8]), TokenRow([9, 10, 11, 12], 3)]


def test_rows_are_padded_to_the_longest_on_the_right() -> None:
    batch = collate(ROWS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.prompt_mask.int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.pooled_mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_padding_on_the_left_moves_all_three_masks() -> None:
    batch = collate(ROWS, pad_id=3, padding_side="left")
    assert batch.input_ids.tolist() == [[3, 5, 6, 7], [3, 3, 3, 8], [9, 10, 11, 12]]
    assert batch.pooled_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_a_real_token_that_has_the_padding_id_still_counts() -> None:
    assert collate([TokenRow([0, 0]), TokenRow([4])], pad_id=0).attention_mask.int().tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("row", [TokenRow([]), TokenRow([1, 2], 2)])
def test_a_row_without_a_token_of_its_own_is_refused_by_position(row: TokenRow) -> None:
    with pytest.raises(ContractError, match="row 1 has"):
        collate([TokenRow([1]), row], pad_id=0)


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
@pytest.mark.parametrize("padding", [0, 40, 10_000])
def test_chunks_hold_every_position_once_within_the_budget(budget: int, padding: int) -> None:
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    chunks = list(chunk_by_tokens(lengths, budget, padding=padding))
    assert sorted(position for chunk in chunks for position in chunk) == list(range(50))
    assert all(len(chunk) == 1 or len(chunk) * max(lengths[p] for p in chunk) <= budget for chunk in chunks)
    assert all(sum(lengths[chunk[0]] - lengths[position] for position in chunk) <= padding for chunk in chunks)
    assert [lengths[position] for chunk in chunks for position in chunk] == sorted(lengths, reverse=True)


def test_short_rows_are_not_padded_to_the_length_of_long_ones() -> None:
    lengths = [100] * 4 + [10] * 40
    assert [len(chunk) for chunk in chunk_by_tokens(lengths, 10_000)] == [4, 40]
    assert [len(chunk) for chunk in chunk_by_tokens(lengths, 10_000, padding=10_000)] == [44]


def test_no_rows_give_no_chunk() -> None:
    assert list(chunk_by_tokens([], 10)) == []


def test_a_batch_whose_masks_differ_in_shape_is_refused() -> None:
    batch = collate(ROWS, pad_id=0)
    with pytest.raises(TypeError, match=r"(?i)type-check"):
        type(batch)(batch.input_ids, batch.attention_mask[:2], batch.prompt_mask)


def test_chunks_cost_nearly_as_little_as_the_best_that_there_are() -> None:
    """Cost: rows x longest, and what a forward pass costs beside. The best cut of sorted lengths by dynamic programming."""
    random = np.random.default_rng(0)
    lengths = np.sort(np.minimum(256, random.lognormal(4.5, 0.6, 500).astype(int) + 8))[::-1]
    best = np.zeros(len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        starts = np.arange(max(0, end - 4_096 // lengths[end - 1]), end)
        fits = starts[(end - starts) * lengths[starts] <= 4_096]
        best[end] = (best[fits] + PASS_TOKENS + (end - fits) * lengths[fits]).min()
    cost = sum(PASS_TOKENS + len(chunk) * lengths[chunk[0]] for chunk in chunk_by_tokens(lengths.tolist(), 4_096))
    assert best[-1] <= cost <= 1.02 * best[-1]
