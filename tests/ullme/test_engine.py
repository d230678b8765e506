"""The engine with an encoder that a test can see through: its vector is (first token, number of tokens)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import tiny_encoder

from ullme import engine
from ullme.batches import TokenRow, collate
from ullme.engine import Budget, embed_rows, stream, stream_windows
from ullme.errors import LimitExceeded, NotFinite


class Glass:
    """An encoder whose work is known. room: tokens that fit into its memory; pack: its batches have no padding."""

    device = torch.device("cpu")

    def __init__(self, room: int = 10**9, failure: str = "", *, pack: bool = False) -> None:
        self.room, self.failure, self.pack = room, failure, pack
        self.shapes: list[tuple[int, int]] = []
        self.tokenised: list[int] = []

    def tokenise(self, texts: Sequence[str]) -> list[TokenRow]:
        self.tokenised.append(len(texts))
        return [TokenRow([ord(letter) for letter in text[:20]], lost=max(0, len(text) - 20)) for text in texts]

    def prepared(self) -> AbstractContextManager[None]:
        return nullcontext()

    def packs(self, tokens: int) -> bool:
        return self.pack

    def embed_rows(self, rows: Sequence[TokenRow], *, packed: bool = False) -> Tensor:
        assert packed == self.pack
        batch = collate(rows, pad_id=0)
        shape = tuple(batch.input_ids.shape)
        if (int(batch.attention_mask.sum()) if packed else batch.input_ids.numel()) > self.room:
            raise RuntimeError(self.failure)
        self.shapes.append((shape[0], shape[1]))
        return torch.stack([batch.input_ids[:, 0].float(), batch.attention_mask.sum(1).float()], 1)


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [chr(33 + int(random.integers(90))) * int(random.integers(1, 40)) for _ in range(count)]


def gathered(encoder: Any, items: Sequence[str], **settings: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Vectors in the order of `items`, (tokens, lost) of each, and how many texts were encoded. Each comes exactly once."""
    vectors, counts = np.full((len(items), 2), np.nan, dtype=np.float32), np.zeros((len(items), 2), dtype=int)
    encoded = 0
    for block in stream(encoder, iter(items), encoder.tokenise, **settings):
        assert np.isnan(vectors[block.positions]).all()
        vectors[block.positions] = block.vectors
        counts[block.positions] = np.stack([block.tokens, block.lost], 1)
        encoded += block.encoded
    return vectors, counts, encoded


def expected(items: Sequence[str]) -> np.ndarray:
    return np.array([(ord(text[0]), min(20, len(text))) for text in items], dtype=np.float32)


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
@pytest.mark.parametrize("pack", [False, True])
def test_every_text_gets_its_own_vector_whatever_the_windows_and_batches(window: int, batch_tokens: int, pack: bool) -> None:
    items = texts(150)
    vectors, counts, _ = gathered(Glass(pack=pack), items, window=window, batch_tokens=batch_tokens)
    assert np.array_equal(vectors, expected(items))
    assert counts.tolist() == [[len(text), max(0, len(text) - 20)] for text in items]


def test_the_order_of_the_texts_does_not_matter() -> None:
    encoder = tiny_encoder()
    items = [f"{number} {text}" for number, text in enumerate(texts(60))]
    order = np.random.default_rng(1).permutation(60)

    def vectors(of: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(of), encoder.dim), dtype=np.float32)
        for block in stream(encoder, of, partial(encoder.tokenise, role="document"), batch_tokens=256, window=25):
            found[block.positions] = block.vectors
        return found

    assert np.abs(vectors(items)[order] - vectors([items[place] for place in order])).max() <= 1e-5


def test_a_window_gives_the_same_bytes_whatever_comes_before_it() -> None:
    encoder = tiny_encoder()
    items = texts(40)
    tokenise = partial(encoder.tokenise, role="document")
    alone = [block.vectors for block in stream_windows(encoder, [items], tokenise, batch_tokens=300)]
    after = [b.vectors for b in stream_windows(encoder, [texts(30, 9), items], tokenise, batch_tokens=300) if b.window == 1]
    assert all(np.array_equal(one, other) for one, other in zip(alone, after, strict=True))


def test_equal_texts_of_a_window_are_encoded_once() -> None:
    items = ["same", "other", "same", "third", "same", "other"]
    for window, count in ((6, 3), (3, 2 + 3), (1, 6)):
        glass = Glass()
        vectors, counts, encoded = gathered(glass, items, window=window)
        assert encoded == count == sum(rows for rows, _ in glass.shapes)
        assert np.array_equal(vectors, expected(items))
        assert counts[:, 0].tolist() == [4, 5, 4, 5, 4, 5]


def test_batches_hold_rows_of_like_length_within_the_budget() -> None:
    glass = Glass()
    gathered(glass, texts(500), batch_tokens=200, window=500)
    assert max(rows * width for rows, width in glass.shapes) <= 200
    padded = sum(rows * width for rows, width in glass.shapes)
    assert padded <= 1.05 * sum(min(20, len(text)) for text in set(texts(500)))


def test_packed_batches_are_filled_whatever_the_lengths() -> None:
    glass = Glass(pack=True)
    gathered(glass, texts(500), batch_tokens=200, window=500)
    assert len(glass.shapes) <= 1 + sum(min(20, len(text)) for text in set(texts(500))) // (200 - 20)


def test_an_empty_window_gives_an_empty_block_in_its_turn() -> None:
    glass = Glass()
    blocks = list(stream_windows(glass, [["a"], [], ["bb"], []], glass.tokenise))
    assert [(block.window, block.positions.tolist()) for block in blocks] == [(0, [0]), (1, []), (2, [0]), (3, [])]
    assert list(stream(glass, [], glass.tokenise)) == []


def test_a_window_of_long_texts_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOW_CHARACTERS", 10)
    assert [len(window) for window in engine.windows(["abcde"] * 5 + ["x"] * 4, 3)] == [2, 2, 3, 2]


# Memory


@pytest.mark.parametrize(
    "failure",
    [
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_the_smaller_budget_stays(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    glass, items = Glass(room=130, failure=failure), texts(200)
    vectors, _, _ = gathered(glass, items, batch_tokens=1_000, window=100)
    assert np.array_equal(vectors, expected(items))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3  # 1000 -> 500 -> 250 -> 120, in the first window; the second starts there
    assert warned[-1].endswith("do not fit into memory; going on with 120 at once")


def test_a_packed_batch_is_halved_by_its_tokens() -> None:
    glass, items = Glass(room=130, failure="CUDA out of memory.", pack=True), texts(200)
    vectors, _, _ = gathered(glass, items, batch_tokens=400, window=100)
    assert np.array_equal(vectors, expected(items))
    assert 1 + len(glass.shapes) >= sum(min(20, len(text)) for text in set(items)) // 130


def test_an_out_of_memory_error_of_torch_is_one_too() -> None:
    class Full(Glass):
        def embed_rows(self, rows: Sequence[TokenRow], *, packed: bool = False) -> Tensor:
            if len(rows) > 2:
                raise torch.OutOfMemoryError
            return super().embed_rows(rows, packed=packed)

    glass, budget = Full(), Budget(1_000)
    rows = glass.tokenise(["abc"] * 8)
    assert sorted(row for chosen, _ in embed_rows(glass, rows, budget) for row in chosen.tolist()) == list(range(8))
    assert budget.tokens == 6


def test_one_text_that_does_not_fit_is_one_line() -> None:
    glass = Glass(room=10, failure="CUDA out of memory. Tried to allocate 2.00 GiB\nand a long story")
    with pytest.raises(
        LimitExceeded, match=r"a text of 20 tokens alone does not fit .* \(CUDA out of memory.*GiB\); lower"
    ) as caught:
        gathered(glass, ["x" * 30, "short"])
    assert "\n" not in str(caught.value)


def test_another_error_of_the_model_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gathered(Glass(room=1, failure="mat1 and mat2 shapes cannot be multiplied"), ["abc"])


def test_a_vector_that_is_not_finite_is_named() -> None:
    block = next(stream(Glass(), ["a", "b"], Glass().tokenise))
    block.vectors[1] = np.nan
    with pytest.raises(NotFinite, match=r"documents: text 1\)"):
        block.check_finite([f"text {place}" for place in block.positions])


# The thread that runs ahead


def ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "encode ahead"]


def endless(taken: list[int]) -> Iterator[str]:
    while True:
        taken.append(1)
        yield f"text {len(taken)}"


def test_texts_are_read_ahead_but_not_far() -> None:
    taken: list[int] = []
    glass = Glass()
    blocks = stream(glass, endless(taken), glass.tokenise, window=10)
    for _ in range(3):
        next(blocks)
    deadline = time.monotonic() + 5
    while len(taken) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 30 < len(taken) <= 60  # in work, ready, and in the making
    blocks.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert ahead() == []


def test_closing_early_or_failing_ends_the_thread() -> None:
    glass = Glass()
    for block in stream(glass, endless([]), glass.tokenise, window=5):
        assert block.window == 0
        break
    assert ahead() == []
    with pytest.raises(RuntimeError, match="broken"):
        gathered(Glass(room=1, failure="broken"), ["some", "texts"] * 20, window=3)
    assert ahead() == []


def test_an_error_in_reading_or_tokenising_reaches_the_caller() -> None:
    def unreadable() -> Iterator[str]:
        yield from texts(10)
        raise OSError("the disk is gone")

    glass = Glass()
    with pytest.raises(OSError, match="the disk is gone"):
        list(stream(glass, unreadable(), glass.tokenise, window=4))

    def refuse(items: Sequence[str]) -> list[TokenRow]:
        raise ValueError("no tokens")

    with pytest.raises(ValueError, match="no tokens"):
        list(stream(glass, texts(10), refuse, window=4))
    assert ahead() == []


def test_several_threads_tokenise_in_order() -> None:
    encoder = tiny_encoder()
    items = [f"text number {number}" for number in range(2_000)]
    tokenise = partial(encoder.tokenise, role="document")
    one, four = (next(engine._tokenised([items], tokenise, threads)) for threads in (1, 4))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one.rows, four.rows, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_vectors_are_those_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    items = [f"{number} {text}" for number, text in enumerate(texts(300))]
    found = []
    for device in ("cpu", "cuda"):
        encoder = tiny_encoder()
        encoder.model.to(device)
        vectors = np.zeros((len(items), encoder.dim), dtype=np.float32)
        for block in stream(encoder, items, partial(encoder.tokenise, role="document"), batch_tokens=512, window=100):
            vectors[block.positions] = block.vectors
        found.append(vectors)
    assert np.abs(found[0] - found[1]).max() <= 1e-4
