"""What several texts begin with, computed once: a query's tokens before each of its candidates, in causal mode.

    condition    the query                                 each token sees those before it
    branches     the candidates, behind it side by side    each token sees the condition and those of its own branch before it

The positions of every branch go on where the condition ends, so each state, and every gradient, is that of condition and branch in
a row of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ullme.attention import _mode, decoder_layers, hidden_states, is_encoder, trunk
from ullme.batches import TokenRow, chunk_by_tokens, collate
from ullme.bottleneck import model_masks
from ullme.distributed import is_sharded

__all__ = ["Branches", "branched_states", "shared_states", "shares_prefix", "side_by_side"]

LONGEST = 640
"""Tokens of a row with several branches: attention is computed between those that do not see each other, too."""
PROBE_CONDITIONS, PROBE_BRANCHES = (5, 3), ((4, 7, 2), (6,))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference that rounding makes, with room (eager attention has a float32 softmax whatever it is given); in half
precision 0.1, and a wrong position or mask makes more."""
_proven: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype, str], bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Branches:
    """A condition and what goes on from it, token by token in one row.

    ids: the condition's tokens, then each branch's. branch: 0 in the condition, 1, 2, ... in the branches. position: what the model
    takes for the token's place. before: where in the row the token before it stands, for the tokens of branches.
    """

    ids: Int[np.ndarray, " S"]
    branch: Int[np.ndarray, " S"]
    position: Int[np.ndarray, " S"]
    before: Int[np.ndarray, " S"]

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> Branches:
        """The rows, which share their prompt, behind one prompt."""
        prompt = rows[0].prompt
        texts = [np.asarray(row.ids[prompt:], dtype=np.int64) for row in rows]
        ids = np.concatenate([np.asarray(rows[0].ids[:prompt], dtype=np.int64), *texts])
        branch = np.repeat(np.arange(len(rows) + 1), [prompt, *map(len, texts)])
        position = np.concatenate([np.arange(prompt), *(prompt + np.arange(len(text)) for text in texts)])
        before = np.arange(len(ids)) - 1
        before[position == prompt] = prompt - 1
        return cls(ids, branch, position, before)

    def __len__(self) -> int:
        return len(self.ids)


def shared_states(
    model: nn.Module, groups: Sequence[Sequence[TokenRow]]
) -> tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Int[Tensor, " T"]]:
    """What the causal trunk holds before each token behind a prompt: states, tokens, and which row of all they belong to.

    The rows of a group share their prompt. Rows of branches that are about equally long go through the model together.
    """
    together = [some for group in groups for some in side_by_side(group)]
    rows = [Branches.of(some) for some in together]
    first = torch.tensor([0, *map(len, together)], device=next(model.parameters()).device).cumsum(0)
    lengths = list(map(len, rows))
    parts = []
    for places in chunk_by_tokens(lengths, len(rows) * max(lengths)):
        states, tokens, row, branch = branched_states(model, [rows[place] for place in places])
        parts.append((states, tokens, first[places][row] + branch))
    states, tokens, owners = zip(*parts, strict=True)
    return torch.cat(states), torch.cat(tokens), torch.cat(owners)


def side_by_side(rows: Sequence[TokenRow]) -> Iterator[list[TokenRow]]:
    """The rows of a group in order, as many at a time as make the branches of one row within LONGEST tokens."""
    together: list[TokenRow] = []
    tokens = prompt = rows[0].prompt
    for row in rows:
        if together and tokens + len(row) - prompt > LONGEST:
            yield together
            together, tokens = [], prompt
        together.append(row)
        tokens += len(row) - prompt
    yield together


def branched_states(
    model: nn.Module, rows: Sequence[Branches]
) -> tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " T"]]:
    """What the causal trunk holds before each token of every branch, in one pass: states, those tokens, their row and branch."""
    inner: Any = trunk(model)
    device = next(model.parameters()).device
    ids, branch, positions, before = (
        _padded([getattr(row, name) for row in rows], fill, device)
        for name, fill in (("ids", 0), ("branch", -1), ("position", 0), ("before", 0))
    )
    seen = branches_mask(branch)
    with _mode(inner, is_causal=True, sliding_window="symmetric", tokens=ids.shape[1]):
        hidden = inner(
            input_ids=ids,
            attention_mask=model_masks(inner, seen, positions),
            position_ids=positions,
            use_cache=False,
            is_causal=True,
        ).last_hidden_state
    row, place = (branch > 0).nonzero(as_tuple=True)
    return hidden[row, before[row, place]], ids[row, place], row, branch[row, place] - 1


def branches_mask(branch: Int[Tensor, "B S"]) -> Bool[Tensor, "B S S"]:
    """True where the token of a row (second axis) sees that of a column (third). Padding (-1) sees itself alone."""
    row, column = branch.unsqueeze(2), branch.unsqueeze(1)
    itself = torch.eye(branch.shape[1], dtype=torch.bool, device=branch.device)
    return itself | (torch.ones_like(itself).tril() & (row >= 0) & ((column == 0) | (column == row)))


def _padded(rows: Sequence[np.ndarray], fill: int, device: torch.device) -> Int[Tensor, "B S"]:
    found = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return torch.from_numpy(found).to(device)


def shares_prefix(model: nn.Module) -> bool:
    """Whether `branched_states` gives what whole rows give, seen once per model on a few tokens.

    Not for attention that takes no mask, nor where layers carry a state from token to token, nor where weights are sharded: every
    process must then run the model equally often.
    """
    inner: Any = trunk(model)
    weight = next(model.parameters())
    if is_encoder(model) or any(map(is_sharded, model.parameters())):
        return False
    implementation = inner.config.get_text_config()._attn_implementation
    place = (weight.device.type, weight.dtype, implementation)
    proven = _proven.setdefault(inner, {})
    if place not in proven:
        takes_them = "position_ids" in inspect.signature(inner.forward).parameters and "flash" not in implementation
        proven[place] = takes_them and _sees_only_tokens(inner) and _is_equal(model, weight)
    return proven[place]


def _sees_only_tokens(inner: Any) -> bool:
    kinds = getattr(inner.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) <= {"full_attention", "sliding_attention"} and bool(decoder_layers(inner))


@torch.no_grad()
def _is_equal(model: nn.Module, weight: Tensor) -> bool:
    inner: Any = trunk(model)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = [(3 + 37 * place) % vocabulary for place in range(64)]
    groups = [
        [TokenRow([*ids[:condition], *ids[20 + 9 * number :][:length]], condition) for number, length in enumerate(lengths)]
        for condition, lengths in zip(PROBE_CONDITIONS, PROBE_BRANCHES, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        found, _, row, branch = branched_states(model, [Branches.of(group) for group in groups])
        for number, group in enumerate(groups):
            for place, text in enumerate(group):
                whole = collate([text], pad_id=0).to(weight.device)
                states = hidden_states(model, whole.input_ids, whole.attention_mask, is_causal=True)[0]
                expected = states[text.prompt - 1 : -1].float()
                difference = (found[(row == number) & (branch == place)].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
                if not bool((difference <= TOLERANCE.get(states.dtype, 0.1)).all()):
                    return False
        return True
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False  # it takes no such mask
    finally:
        model.train(was_training)
