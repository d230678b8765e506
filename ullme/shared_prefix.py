"""What several texts begin with, computed once: a query's tokens before each of its candidates, in causal mode.

The condition goes through the model once and leaves its keys and values in a cache; each continuation then attends to them. The
states, and every gradient through the cache, are those of condition and continuation in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from ullme.attention import _mode, decoder_layers, hidden_states, is_encoder, trunk
from ullme.batches import Batch, TokenRow, collate
from ullme.distributed import is_sharded

__all__ = ["continued_states", "shares_prefix"]

PROBE_CONDITIONS, PROBE_CONTINUATIONS = (5, 3), (4, 7, 2)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference that rounding makes, with room (eager attention has a float32 softmax whatever it is given); in half
precision 0.1, and a wrong position or mask makes more."""
_proven: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], bool]] = WeakKeyDictionary()


def continued_states(
    model: nn.Module, conditions: Batch, parts: Sequence[tuple[Batch, Int[Tensor, " N"]]]
) -> list[Float[Tensor, "N S D"]]:
    """What the causal trunk holds before each token of continuations, position by position: its state at the token before.

    conditions: G rows, padded on the right; parts: N continuations, likewise, with the condition of each; as many passes as parts.
    """
    inner: Any = trunk(model)
    cache = DynamicCache(config=inner.config)
    lengths = conditions.attention_mask.sum(1)
    width = max(continuations.input_ids.shape[1] for continuations, _ in parts)
    found = []
    with _mode(inner, is_causal=True, sliding_window="symmetric", tokens=conditions.input_ids.shape[1] + width):
        before = _run(inner, conditions.input_ids, conditions.attention_mask, torch.zeros_like(lengths), cache)
        last = before[torch.arange(len(lengths), device=before.device), lengths - 1]
        layers: list[Any] = list(cache.layers)
        shared = [(layer.keys, layer.values) for layer in layers]
        for continuations, owner in parts:
            for layer, (keys, values) in zip(layers, shared, strict=True):
                layer.keys, layer.values = keys[owner], values[owner]
            mask = torch.cat([conditions.attention_mask[owner], continuations.attention_mask], 1)
            after = _run(inner, continuations.input_ids, mask, lengths[owner], cache)
            found.append(torch.cat([last[owner].unsqueeze(1), after[:, :-1]], 1))
    return found


def _run(inner: Any, input_ids: Tensor, mask: Tensor, start: Tensor, cache: DynamicCache) -> Tensor:
    positions = start.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
    return inner(
        input_ids=input_ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        is_causal=True,
    ).last_hidden_state


def shares_prefix(model: nn.Module) -> bool:
    """Whether `continued_states` gives what whole rows give, seen once per model on a few tokens.

    Not for layers with a window (padding would count as part of it) or a state of their own, nor under gradient checkpointing,
    nor where weights are sharded: every process must then run the model equally often.
    """
    inner: Any = trunk(model)
    weight = next(model.parameters())
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if checkpointing or is_encoder(model) or any(map(is_sharded, model.parameters())):
        return False
    place = (weight.device.type, weight.dtype)
    proven = _proven.setdefault(inner, {})
    if place not in proven:
        proven[place] = _all_full(inner) and _is_equal(model, weight)
    return proven[place]


def _all_full(inner: Any) -> bool:
    config = inner.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or (["full_attention"] if not getattr(config, "sliding_window", None) else [])
    return bool(kinds) and set(kinds) == {"full_attention"} and bool(decoder_layers(inner))


@torch.no_grad()
def _is_equal(model: nn.Module, weight: Tensor) -> bool:
    inner: Any = trunk(model)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = [(3 + 37 * place) % vocabulary for place in range(64)]
    conditions = [ids[:length] for length in PROBE_CONDITIONS]
    continuations = [ids[20 + 9 * number :][:length] for number, length in enumerate(PROBE_CONTINUATIONS)]
    owner = [0, 1, 0]
    was_training = model.training
    model.eval()
    try:
        part = (_batch(continuations, weight), torch.tensor(owner).to(weight.device))
        found, again = continued_states(model, _batch(conditions, weight), [part, part])
        if not torch.equal(found, again):
            return False
        for number, (own, continuation) in enumerate(zip(owner, continuations, strict=True)):
            row = _batch([[*conditions[own], *continuation]], weight)
            whole = hidden_states(model, row.input_ids, row.attention_mask, is_causal=True)[0]
            expected = whole[len(conditions[own]) - 1 : -1].float()
            difference = (found[number, : len(continuation)].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            if not bool((difference <= TOLERANCE.get(whole.dtype, 0.1)).all()):
                return False
        return True
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False  # it keeps no keys and values, or not in this form
    finally:
        model.train(was_training)


def _batch(rows: list[list[int]], weight: Tensor) -> Batch:
    return collate([TokenRow(row) for row in rows], pad_id=0).to(weight.device)
