"""Token batches: what an encoder eats, and how rows of different lengths are cut into chunks by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ullme.errors import ContractError

__all__ = ["PASS_TOKENS", "Batch", "TokenRow", "chunk_by_tokens", "chunk_end", "collate", "longest_first", "with_some_left_out"]

PASS_TOKENS = 40
"""What a forward pass costs beside its tokens, in tokens: measured with 135M weights on a CPU (187 ms for 128, 332 for 256)."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as token ids; the first `prompt` of them are attended to but neither pooled nor scored."""

    ids: Sequence[int] | np.ndarray
    prompt: int = 0
    lost: int = 0
    """Tokens of the text that were cut off."""

    def __len__(self) -> int:
        return len(self.ids)


def with_some_left_out(row: TokenRow, share: float, random: np.random.Generator, *, ending: int = 0) -> TokenRow:
    """The text without `share` of its tokens, drawn one by one; prompt and the last `ending` tokens stay, and one of the text."""
    ids = np.asarray(row.ids)
    text = slice(row.prompt, len(ids) - ending)
    left = random.random(len(ids[text])) >= share
    if len(left) and not left.any():
        left[int(random.integers(len(left)))] = True
    return TokenRow(np.concatenate([ids[: row.prompt], ids[text][left], ids[text.stop :]]), row.prompt, row.lost)


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    input_ids: Int[B S]; attention_mask: Bool[B S], True = a real token; prompt_mask: Bool[B S], True = not pooled.
    """

    input_ids: Int[Tensor, "B S"]
    attention_mask: Bool[Tensor, "B S"]
    prompt_mask: Bool[Tensor, "B S"]

    @property
    def pooled_mask(self) -> Bool[Tensor, "B S"]:
        """True where a token counts for pooling or scoring."""
        return self.attention_mask & ~self.prompt_mask

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`. The way to a GPU does not wait for what runs there."""
        return Batch(*(_moved(tensor, device) for tensor in (self.input_ids, self.attention_mask, self.prompt_mask)))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(rows: Sequence[TokenRow], *, pad_id: int, padding_side: str = "right") -> Batch:
    """Pad rows to the longest of them.

    Raises:
        ContractError: a row whose every token belongs to the prompt.
    """
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int64, count=len(rows))
    prompts = np.fromiter((row.prompt for row in rows), dtype=np.int64, count=len(rows))
    empty = np.flatnonzero(lengths <= prompts)
    if len(empty):
        position = int(empty[0])
        raise ContractError(
            f"collate: row {position} has {lengths[position]} tokens, all of them prompt; a text must add at least one token"
        )
    width = int(lengths.max(initial=0))
    start = (np.zeros_like(lengths) if padding_side == "right" else width - lengths)[:, None]
    column = np.arange(width)
    real = (column >= start) & (column < start + lengths[:, None])
    prompt = (column >= start) & (column < start + prompts[:, None])
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    if len(rows):
        ids[real] = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])  # row by row, as `real` is read
    return Batch(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(prompt))


def longest_first(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions in the order of falling length, equal ones as they came: Int64[n]."""
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


def chunk_end(falling: np.ndarray, start: int, max_tokens: int, *, padding: int = PASS_TOKENS) -> int:
    """Where the chunk ends that begins at `start`, of lengths that fall: rows x longest <= max_tokens, at least one row.

    It also ends before it would hold more than `padding` tokens of padding. Where that is what a forward pass costs beside
    its tokens, no other number makes less work of lengths that fall evenly.
    """
    width = max(1, int(falling[start]))
    rows = falling[start : start + max(1, max_tokens // width)]
    return start + int(np.searchsorted(np.cumsum(width - rows), padding, side="right"))


def chunk_by_tokens(lengths: Sequence[int], max_tokens: int, *, padding: int = PASS_TOKENS) -> Iterator[list[int]]:
    """Positions grouped by length, longest first, so that rows x longest <= max_tokens; a longer row stands alone.

    padding: most padded tokens of a chunk, so that short queries are not padded to the length of passages (see `chunk_end`).
    """
    order = longest_first(lengths)
    falling = np.asarray(lengths, dtype=np.int64)[order]
    start = 0
    while start < len(order):
        end = chunk_end(falling, start, max_tokens, padding=padding)
        yield order[start:end].tolist()
        start = end
