"""Sequences of different lengths side by side in one row, without padding, and without seeing each other.

Packing by position ids alone leaks between sequences under bidirectional attention. Here each sequence attends to itself
only: a function registered with transformers' AttentionInterface takes the borders of the sequences (cu_seq_lens_q) from
the keywords of the forward call. No [T, T] mask is built: what the model's own mask function says is read off at a few
positions and handed on as (left, right), how many tokens a token sees on either side. So causal, bidirectional and
sliding-window layers mean here what they mean in a padded batch. For inference: attention dropout is not applied.

The kernels: flash-attn's variable-length function where that package is installed, else torch's own
(torch.nn.attention.varlen), both for half precision on a GPU; ullme.packed_attention for half precision on a CPU; everywhere
else scaled_dot_product_attention, one call per run of sequences of equal length.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ullme.attention import SlidingWindow, _mode, decoder_layers, hidden_states, is_encoder, trunk
from ullme.errors import ContractError
from ullme.fused import fused_layers
from ullme.packed_attention import grouped_attention, in_window

__all__ = [
    "HALF",
    "Packed",
    "Packing",
    "fast_kernel",
    "kernel",
    "pack",
    "packed_at_once",
    "packed_hidden_states",
    "proven_packing",
    "supports_packing",
    "unpack",
]

logger = logging.getLogger(__name__)

NAME = "ullme_varlen"
Kernel = Literal["flash_attn", "torch", "segments"]
Packing = Literal["plain", "float32_residual"]
"""float32_residual: a model in half precision adds up its layers in float32 (see `packed_hidden_states`)."""
HALF = (torch.float16, torch.bfloat16)
PROBE_LENGTHS = (7, 12, 4, 9)
LONGEST_GROUPED = 1024  # longer sequences' scores are better never written out


@dataclass(frozen=True)
class Packed:
    """Sequences in one row.

    input_ids, position_ids: Int[1 T], positions start again at 0 in each; borders: Int32[N+1], the first is 0, the last T.
    """

    input_ids: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    borders: Int[Tensor, " N1"]
    longest: int


def pack(rows: Sequence[Sequence[int] | np.ndarray], *, device: torch.device | str = "cpu") -> Packed:
    """Token ids of several sequences, each of at least one token, side by side.

    Raises:
        ContractError: nothing to pack, or an empty sequence.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if not len(lengths) or not lengths.min():
        raise ContractError(f"pack: expected sequences of at least one token, got lengths {lengths[:8].tolist()}")
    borders = np.concatenate([[0], lengths.cumsum()])
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    positions = np.arange(len(ids)) - np.repeat(borders[:-1], lengths)
    made = [torch.from_numpy(values) for values in (ids[None], positions[None], borders.astype(np.int32))]
    if torch.device(device).type == "cuda":  # from pinned memory, so that the copy does not wait for the batch before
        made = [tensor.pin_memory().to(device, non_blocking=True) for tensor in made]
    return Packed(*made, longest=int(lengths.max()))


def packed_hidden_states(
    model: nn.Module,
    packed: Packed,
    *,
    is_causal: bool,
    sliding_window: SlidingWindow = "symmetric",
    float32_residual: bool = False,
) -> Float[Tensor, "T D"]:
    """Last hidden states of the trunk, adapters included, in the order of the packed tokens.

    The model's attention is switched for this call and switched back after it, whatever happens. With `float32_residual` a
    model in half precision adds up its layers in float32: the products stay in half precision, the sum is not rounded to it
    sixty times. The result is then float32.
    """
    settings: Any = {"is_causal": is_causal, "sliding_window": sliding_window, "float32_residual": float32_residual}
    return packed_at_once(model, [packed], **settings)[0]


def packed_at_once(
    model: nn.Module,
    parts: Sequence[Packed],
    *,
    is_causal: bool,
    sliding_window: SlidingWindow = "symmetric",
    float32_residual: bool = False,
) -> list[Float[Tensor, "T D"]]:
    """The same for several rows of sequences, each with its share of the CPU's threads, without gradient if there are several.

    While one part moves memory the other multiplies, and neither waits for the other's threads after every operation.
    """
    inner: Any = trunk(model)
    adding = _adding_in_float32(inner) if float32_residual else nullcontext()
    longest = max(packed.longest for packed in parts)
    mode = _mode(inner, is_causal=is_causal, sliding_window=sliding_window, tokens=longest)
    with mode, _switched(inner), adding, fused_layers(inner):
        if len(parts) == 1:
            return [_states(inner, parts[0], is_causal)]
        threads = torch.get_num_threads()

        def run(packed: Packed) -> Tensor:
            torch.set_num_threads(max(1, threads // len(parts)))  # of the thread that calls
            with torch.inference_mode():
                return _states(inner, packed, is_causal)

        running = [_pool(len(parts)).submit(run, packed) for packed in parts]
        try:
            wait(running)  # also where one has failed: the others still run in this mode
            return [one.result() for one in running]
        finally:
            torch.set_num_threads(threads)  # what threads begin with that are still to come


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="encode")


def _states(inner: Any, packed: Packed, is_causal: bool) -> Float[Tensor, "T D"]:
    return inner(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # all ones, not None: from restarting positions alone transformers would make masks of its own
        attention_mask=torch.ones_like(packed.input_ids),
        is_causal=is_causal,
        use_cache=False,
        cu_seq_lens_q=packed.borders,
        cu_seq_lens_k=packed.borders,
        max_length_q=packed.longest,
        max_length_k=packed.longest,
    ).last_hidden_state[0]


@contextmanager
def _adding_in_float32(inner: Any) -> Iterator[None]:
    """Embeddings come out in float32, and so does every sum with them; what goes into a layer's products is half again."""
    embeddings = inner.get_input_embeddings()
    dtype = embeddings.weight.dtype
    if dtype not in HALF:
        yield
        return
    norms = [part for layer in decoder_layers(inner) for part in layer.children() if "Norm" in type(part).__name__]
    rotations = [part for part in inner.children() if "RotaryEmbedding" in type(part).__name__]
    hooks = [embeddings.register_forward_hook(_casting(torch.float32))]
    hooks += [part.register_forward_hook(_casting(dtype)) for part in norms + rotations]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@lru_cache(maxsize=4)  # the same hook every time, so that compiled layers are not compiled again
def _casting(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(_module: nn.Module, _given: Any, out: Any) -> Any:
        return tuple(part.to(dtype) for part in out) if isinstance(out, tuple) else out.to(dtype)

    return cast


@contextmanager
def _switched(inner: Any) -> Iterator[None]:
    config = inner.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = {"": NAME}  # this configuration, none below it
    try:
        yield
    finally:
        config._attn_implementation = {"": before}


def unpack(hidden: Float[Tensor, "T D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """Packed states as padded rows, zeros where `mask` is False: the shape of the padded batch of the same sequences."""
    padded = hidden.new_zeros(*mask.shape, hidden.shape[-1])
    return padded.masked_scatter(mask.unsqueeze(-1), hidden)


# What may be packed


def proven_packing(model: nn.Module, *, is_causal: bool, sliding_window: SlidingWindow) -> Packing | None:
    """How sequences are packed where the weights are, by trial on these weights; None: they are better, or only right, padded."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" and not fast_kernel(model):
        return None
    ways: tuple[Packing, ...] = ("float32_residual", "plain") if weight.dtype in HALF else ("plain",)
    for way in ways:
        adding = way == "float32_residual"
        reason = supports_packing(model, is_causal=is_causal, sliding_window=sliding_window, float32_residual=adding)
        if reason is None:
            return way
        logger.debug("%s: %s", way, reason)
    return None


@torch.no_grad()
def supports_packing(
    model: nn.Module,
    *,
    is_causal: bool | None = None,
    sliding_window: SlidingWindow = "symmetric",
    float32_residual: bool = False,
) -> str | None:
    """None if packed sequences come out as they do one by one, else why not, for people. is_causal None: in both modes.

    Runs a few short sequences through the model: one by one, packed, and packed with one of them changed.
    """
    inner: Any = trunk(model)
    if is_encoder(model):
        return f"{type(inner).__name__} is an encoder; only decoders are packed"
    if not inner._can_set_attn_implementation():
        return f"{type(inner).__name__} computes attention in code of its own, not through transformers' AttentionInterface"
    if "chunked_attention" in (getattr(inner.config.get_text_config(), "layer_types", None) or ()):
        return f"{type(inner).__name__} attends in chunks, which is no band of neighbours"
    was_training = model.training
    model.eval()
    try:
        for causal in (False, True) if is_causal is None else (is_causal,):
            if reason := _difference(model, causal, sliding_window, float32_residual):
                return reason
        return None
    except ContractError as error:
        return str(error)
    except (ImportError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(inner).__name__} does not run on packed sequences ({str(error).strip().splitlines()[0]})"
    finally:
        model.train(was_training)


def _difference(model: nn.Module, is_causal: bool, sliding_window: SlidingWindow, float32_residual: bool) -> str | None:
    inner: Any = trunk(model)
    device, vocabulary = next(model.parameters()).device, inner.config.get_text_config().vocab_size
    mode: Any = {"is_causal": is_causal, "sliding_window": sliding_window}
    ids = [(2 + 37 * place) % vocabulary for place in range(sum(PROBE_LENGTHS))]
    rows = [ids[end - length : end] for length, end in zip(PROBE_LENGTHS, _ends(PROBE_LENGTHS), strict=True)]
    changed = [rows[0], [(token + 11) % vocabulary for token in rows[1]], *rows[2:]]
    one_row = [torch.tensor([row], device=device) for row in rows]
    alone = torch.cat([hidden_states(model, row, torch.ones_like(row, dtype=torch.bool), **mode)[0] for row in one_row])
    together, other = (
        packed_hidden_states(model, pack(sequences, device=device), float32_residual=float32_residual, **mode)
        for sequences in (rows, changed)
    )
    name, word = type(inner).__name__, "causal" if is_causal else "bidirectional"
    allowed = _tolerance(alone.dtype)
    # nothing of the others may move, in half precision neither: the shapes are the same (experts' may not quite be)
    moved = [part.max() for index, part in enumerate(_distances(other, together)) if index != 1]
    if not all(distance <= 1e-3 for distance in moved):
        return f"{name}: packed sequences see each other in {word} mode; a layer (convolution, recurrence?) ignores borders"
    away = [part.median() if alone.dtype in HALF else part.max() for part in _distances(together, alone)]
    if not all(distance <= allowed for distance in away):
        return f"{name}: packed sequences come out otherwise than one by one in {word} mode (relative difference {max(away):.1e})"
    return None


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding alone makes, with room; a wrong mode, window or position makes 0.15 and more.

    In half precision the middle token of a sequence is taken for this: single ones, those that all others attend to, come out
    differently with every order of summation.
    """
    return 0.1 if dtype in HALF else 1e-3


def _ends(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[: index + 1]) for index in range(len(lengths))]


def _distances(one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Per probe sequence: of each token the difference, relative to the token's norm."""
    difference = (one.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-6)
    return difference.split(PROBE_LENGTHS)


def kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """What runs the attention of packed sequences here; `segments` is right everywhere but no faster than padding on a GPU."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > 256:
        return "segments"
    return "flash_attn" if _flash_attn_module() else "torch"


def fast_kernel(model: nn.Module) -> bool:
    """Whether the kernel for packed sequences beats padded batches on a GPU."""
    inner: Any = trunk(model)
    weight, config = next(model.parameters()), inner.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kernel(weight.device, weight.dtype, head_dim) != "segments"


# The attention and mask functions that transformers calls


@torch.compiler.disable  # it reads numbers off tensors and calls kernels of their own: nothing to compile
def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H T E"],
    key: Float[Tensor, "1 G T E"],
    value: Float[Tensor, "1 G T F"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_unused: Any,
) -> tuple[Float[Tensor, "1 T H F"], None]:
    """Attention within the borders, as transformers calls it; `attention_mask` is what `varlen_mask` returned.

    Raises:
        ContractError: the model adds something to its scores that the kernels do not know, or hands on no borders.
    """
    added = {"a soft-cap": softcap, "attention sinks": s_aux, "a position bias": position_bias}
    if named := [name for name, given in added.items() if given is not None]:
        raise ContractError(f"{type(module).__name__} uses {named[0]}, which the variable-length kernels do not take")
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is None:
        raise ContractError(f"{type(module).__name__} was handed no sequence borders or no mask")
    left, right = attention_mask.tolist()
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotated in float32 where the model adds up in float32
    chosen = kernel(query.device, query.dtype, query.shape[-1]) if query.shape[-1] == value.shape[-1] else "segments"
    if chosen == "segments":
        borders, window = cu_seq_lens_q.tolist(), (left, right)
        if query.device.type == "cpu" and query.dtype in HALF and max_length_q <= LONGEST_GROUPED:
            return grouped_attention(query, key, value, tuple(borders), window, scaling), None
        return _by_segments(query, key, value, borders, window, scaling), None
    run = _flash_attn if chosen == "flash_attn" else torch_varlen
    flat_query, flat_key, flat_value = (states[0].transpose(0, 1) for states in (query, key, value))
    return run(flat_query, flat_key, flat_value, cu_seq_lens_q, max_length_q, (left, right), scaling)[None], None


def varlen_mask(*, mask_function: Callable[..., Tensor], q_length: int, **_unused: Any) -> Int[Tensor, " 2"]:
    """Instead of a mask: how many tokens a token sees to its left and right, -1 = all of them."""
    return torch.tensor(visible_band(mask_function, q_length))


def visible_band(mask_function: Callable[..., Any], tokens: int) -> tuple[int, int]:
    """(left, right) of an index-based mask function, read off its first, middle and last row.

    Raises:
        ContractError: the visible tokens are no band along the diagonal.
    """
    rows = torch.tensor(sorted({0, tokens // 2, tokens - 1}))[:, None]
    columns, zero = torch.arange(tokens)[None, :], torch.tensor(0)
    seen = torch.broadcast_to(mask_function(zero, zero, rows, columns), (len(rows), tokens))
    left, right = int(seen[-1].sum()) - 1, int(seen[0].sum()) - 1
    if not torch.equal(seen, (columns >= rows - left) & (columns <= rows + right)):
        raise ContractError("its attention mask is no band of neighbours, so it cannot be handed to a variable-length kernel")
    return -1 if left == tokens - 1 else left, -1 if right == tokens - 1 else right


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)


# The kernels: query [T H E], key and value [T G E] -> [T H E], window = (left, right)


def _by_segments(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], window: tuple[int, int], scale: float | None
) -> Float[Tensor, "1 T H F"]:
    """query [1 H T E], key and value [1 G T E]: one call per run of neighbours of equal length."""
    pieces = []
    start = 0
    for length, run in groupby(end - begin for begin, end in pairwise(borders)):
        count = len(list(run))
        end = start + count * length
        parts = [states[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)]
        mask = in_window(length, window, query.device)
        causal = mask is not None and window == (-1, 0)
        out = scaled_dot_product_attention(
            *parts,
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(pieces)[None]


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, window: tuple[int, int], scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _takes_groups():
            grouped = {"enable_gqa": True}
        else:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    out = varlen_attn(query, key, value, borders, borders, longest, longest, scale=scale, window_size=window, **grouped)
    return out if isinstance(out, Tensor) else out[0]


@lru_cache(maxsize=1)
def _takes_groups() -> bool:
    """False in torch 2.11, whose function wants as many key as query heads."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, window: tuple[int, int], scale: float | None
) -> Tensor:
    run = importlib.import_module(_flash_attn_module()).flash_attn_varlen_func
    options = {"softmax_scale": scale, "causal": window[1] == 0, "window_size": window}
    out = run(query, key, value, borders, borders, longest, longest, **options)
    return out if isinstance(out, Tensor) else out[0]  # version 3 has returned (out, lse) at times


@lru_cache(maxsize=1)
def _flash_attn_module() -> str:
    """The installed package's module, version 3 first; '' if there is none."""
    return next((name for name in ("flash_attn_interface", "flash_attn") if importlib.util.find_spec(name)), "")
