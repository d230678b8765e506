"""Attention of packed sequences in half precision on a CPU, where short calls and odd lengths cost more than the products.

Sequences whose lengths round up to the same multiple of 32 are computed together, padded to it within the attention alone: a
softmax over another number of keys leaves the vector unit for its last ones (twice the time at 80 keys), and a call per length
costs a quarter of a millisecond. The query heads of a key head stand below each other, so keys and values are not repeated.
What goes where is planned once per batch, for all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["grouped_attention", "in_window"]

WIDTH_STEP = 32
SCORES_AT_ONCE = 2**21  # 4 MB in bfloat16: what stays in a CPU's cache between the two products


@dataclass(frozen=True)
class _Group:
    """Sequences that are computed together.

    queries, keys: Int64, rows of the flat states [T x heads]; shape: of the scores, (key heads x sequences, query heads per key
    head x width, width); added: 0 where a token is seen and -inf elsewhere, broadcast to the scores, or None if all are seen.
    """

    queries: Int[Tensor, " N"]
    keys: Int[Tensor, " M"]
    shape: tuple[int, int, int]
    added: Tensor | None


def grouped_attention(
    query: Float[Tensor, "1 H T E"],
    key: Float[Tensor, "1 G T E"],
    value: Float[Tensor, "1 G T F"],
    borders: tuple[int, ...],
    window: tuple[int, int],
    scale: float | None,
) -> Float[Tensor, "1 T H F"]:
    """softmax(scale Q K^T) V within each sequence; `borders` 0, ..., T; window: tokens seen to the left and right, -1 = all.

    Softmax rounds as it does in eager attention.
    """
    heads, tokens, width = query.shape[1:]
    groups, back = _plan(borders, heads, key.shape[1], window, query.dtype)
    # as a projection leaves them, token by token, so that this is a view
    flat_query, flat_key, flat_value = (states.transpose(1, 2).reshape(-1, states.shape[-1]) for states in (query, key, value))
    out = query.new_empty(sum(group.shape[0] * group.shape[1] for group in groups), value.shape[-1])
    nothing = query.new_zeros(1, 1, 1)
    start = 0
    for group in groups:
        batch, below, keys_per_row = group.shape
        queries = flat_query.index_select(0, group.queries).view(batch, below, width)
        keys = flat_key.index_select(0, group.keys).view(batch, keys_per_row, width)
        values = flat_value.index_select(0, group.keys).view(batch, keys_per_row, -1)
        added, beta = (nothing, 0) if group.added is None else (group.added, 1)
        scores = torch.baddbmm(added, queries, keys.transpose(1, 2), beta=beta, alpha=scale or width**-0.5)
        end = start + batch * below
        torch.bmm(scores.softmax(-1), values, out=out[start:end].view(batch, below, -1))
        start = end
    return out.index_select(0, back).view(1, tokens, heads, -1)


@lru_cache(maxsize=4)  # a model has one or two kinds of window
def _plan(
    borders: tuple[int, ...], heads: int, key_heads: int, window: tuple[int, int], dtype: torch.dtype
) -> tuple[list[_Group], Int[Tensor, " R"]]:
    """The groups, and for each (token, query head) its row of their outputs one after the other."""
    below, tokens = heads // key_heads, borders[-1]
    starts, lengths = np.array(borders[:-1]), np.diff(borders)
    widths = -(-lengths // WIDTH_STEP) * WIDTH_STEP
    query_head, key_head = np.arange(heads).reshape(key_heads, 1, below, 1), np.arange(key_heads)[:, None, None]
    groups: list[_Group] = []
    back = np.empty((tokens, heads), dtype=np.int64)
    rows = 0
    for width in np.unique(widths).tolist():
        alike = np.flatnonzero(widths == width)
        most = max(1, SCORES_AT_ONCE // (heads * width**2))
        for some in (alike[place : place + most] for place in range(0, len(alike), most)):
            count, places = len(some), np.arange(width)
            inside = places < lengths[some][:, None]
            token = starts[some][:, None] + np.where(inside, places, 0)  # beyond its end a sequence repeats its first token
            shape = (key_heads * count, below * width, width)
            outputs = rows + np.arange(shape[0] * shape[1]).reshape(key_heads, count, below, width)
            back[token[inside]] = outputs.transpose(1, 3, 0, 2).reshape(count, width, heads)[inside]
            rows += shape[0] * shape[1]
            groups.append(
                _Group(
                    torch.from_numpy((heads * token[:, None] + query_head).reshape(-1)),
                    torch.from_numpy((key_heads * token + key_head).reshape(-1)),
                    shape,
                    _added(torch.from_numpy(inside), window, shape, dtype),
                )
            )
    return groups, torch.from_numpy(back.reshape(-1))


def _added(inside: Bool[Tensor, "C W"], window: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
    count, width = inside.shape
    seen = inside[:, None]  # of every query of a sequence, those beyond its end too: nobody reads them
    band = in_window(width, window, inside.device)
    if band is None and inside.all():
        return None
    if band is not None:
        seen = (seen & band).repeat(1, shape[1] // width, 1)
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return added.repeat(shape[0] // count, 1, 1)


def in_window(length: int, window: tuple[int, int], device: torch.device) -> Bool[Tensor, "L L"] | None:
    """What a token of a sequence of this length sees, or None if it sees all of it."""
    left, right = (length - 1 if side < 0 else min(side, length - 1) for side in window)
    if left == right == length - 1:
        return None
    places = torch.arange(length, device=device)
    away = places[None, :] - places[:, None]
    return (away >= -left) & (away <= right)
