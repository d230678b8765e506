"""Token batches: what an encoder eats, and how rows of different lengths are cut into chunks by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ullme.errors import ContractError

__all__ = ["Batch", "TokenRow", "chunk_by_tokens", "collate"]

DENSE_SHARE = 0.7  # rows shorter than this share of a chunk's longest start a new one
SMALL_CHUNK_TOKENS = 256  # below this a forward pass costs its fixed part, padded or not


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as token ids; the first `prompt` of them are attended to but neither pooled nor scored."""

    ids: Sequence[int]
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.ids)


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
        """The same batch on `device`."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.prompt_mask.to(device))


def collate(rows: Sequence[TokenRow], *, pad_id: int, padding_side: str = "right") -> Batch:
    """Pad rows to the longest of them.

    Raises:
        ContractError: a row whose every token belongs to the prompt.
    """
    for position, row in enumerate(rows):
        if len(row.ids) <= row.prompt:
            raise ContractError(
                f"collate: row {position} has {len(row.ids)} tokens, all of them prompt; a text must add at least one token"
            )
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    prompt = np.zeros((len(rows), width), dtype=bool)
    for position, row in enumerate(rows):
        start = 0 if padding_side == "right" else width - len(row)
        ids[position, start : start + len(row)] = row.ids
        real[position, start : start + len(row)] = True
        prompt[position, start : start + row.prompt] = True
    return Batch(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(prompt))


def chunk_by_tokens(lengths: Sequence[int], max_tokens: int, *, dense: bool = True) -> Iterator[list[int]]:
    """Positions grouped by length, longest first, so that rows x longest <= max_tokens; a longer row stands alone.

    `dense` also ends a chunk of some size where rows get much shorter than its longest: short queries are then not padded
    to the length of passages.
    """
    chunk: list[int] = []
    width = 0
    for position in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[position]
        sparse = dense and length < DENSE_SHARE * width and len(chunk) * width >= SMALL_CHUNK_TOKENS
        if chunk and (sparse or width * (len(chunk) + 1) > max_tokens):
            yield chunk
            chunk = []
        if not chunk:
            width = length
        chunk.append(position)
    if chunk:
        yield chunk
