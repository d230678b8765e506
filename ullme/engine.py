"""The encode engine: a stream of texts -> a stream of vectors, as fast as the model allows and in bounded memory.

    texts -> windows -> tokenised ahead, in threads -> equal texts once -> longest first -> batches by token budget -> vectors

It knows neither files nor stores. A window is sorted and batched by itself, so the vectors of a window are the same bytes
whatever comes before it. While one window runs through the model the next one is tokenised. Where memory does not suffice a
batch is halved, and the smaller budget stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, Queue
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ullme.batches import PASS_TOKENS, TokenRow, chunk_end, longest_first
from ullme.errors import LimitExceeded, NotFinite

__all__ = [
    "BATCH_TOKENS",
    "WINDOW",
    "Block",
    "Budget",
    "Embedder",
    "batch_tokens_for",
    "embed_rows",
    "out_of_memory",
    "stream",
    "stream_windows",
    "windows",
]

logger = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Hashable)
Made = TypeVar("Made")

BATCH_TOKENS, CPU_BATCH_TOKENS = 16_384, 8_192
"""Tokens per forward pass on a GPU and on a CPU, whose cache does not hold more of them."""
WINDOW = 16_384
"""Texts that are sorted together; more of them would save little padding."""
WINDOW_CHARACTERS = 2**25
"""A window of long texts ends before it takes too much memory."""
GPU_PADDING = 2_048
"""Most padded tokens of a batch on a GPU, where a forward pass has a larger fixed part. Reckoned, not measured."""
PIECE = 256
"""Texts handed to the tokenizer at once."""
PREPARED_FROM = 4_096
"""Tokens of a window from which it pays to prepare for its passes."""
MOST_THREADS = 8
OUT_OF_MEMORY_WORDS = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC")


class Embedder(Protocol):
    """What the engine needs of an encoder, which must be in evaluation mode."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def packs(self, tokens: int) -> bool:
        """Whether rows of so many tokens in all need no padding."""
        ...

    def prepared(self) -> contextlib.AbstractContextManager[None]:
        """What pays for itself over many passes, as long as the block lasts."""
        ...

    def embed_rows(self, rows: Sequence[TokenRow], *, packed: bool = False) -> Tensor:
        """Float32 [B D]."""
        ...


@dataclass(frozen=True)
class Block:
    """The vectors of some texts of one window; the blocks of a window hold each of its texts once, longest first.

    window: its number, from 0. positions: Int64[n], places of the texts in the window (from `stream`: among all texts).
    vectors: Float32[n D]. tokens: Int64[n], of each text, with those that were cut off. lost: Int64[n], of these the ones that
    were cut off. encoded: texts that went through the model: n without the repeated ones.
    """

    window: int
    positions: np.ndarray
    vectors: np.ndarray
    tokens: np.ndarray
    lost: np.ndarray
    encoded: int

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise NotFinite with the names (one per position) of the texts whose vector is NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(bad):
            raise NotFinite(None, "an embedding", [names[row] for row in bad.tolist()])


def batch_tokens_for(device: torch.device) -> int:
    """Tokens per forward pass, where nobody says how many."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


@dataclass
class Budget:
    """Tokens per forward pass, padding included; only ever falls."""

    tokens: int = BATCH_TOKENS

    def halve(self, lengths: Sequence[int], said: str, *, packed: bool) -> None:
        """Half of what did not fit: rows of these lengths.

        Raises:
            LimitExceeded: that was a single text.
        """
        rows, width = len(lengths), max(lengths)
        if rows <= 1:
            raise LimitExceeded(
                f"a text of {width} tokens alone does not fit into memory ({said}); lower max_tokens, or run it where there is more"
            )
        tokens = sum(lengths) if packed else rows * width
        self.tokens = max(1, tokens // 2)
        logger.warning("encode: %d texts, %d tokens do not fit into memory; going on with %d at once", rows, tokens, self.tokens)


def stream(
    embedder: Embedder,
    items: Iterable[Item],
    tokenise: Callable[[Sequence[Item]], Sequence[TokenRow]],
    *,
    batch_tokens: int | None = None,
    window: int = WINDOW,
) -> Iterator[Block]:
    """Vectors of all `items`, block by block, their positions counted from the first item.

    Args:
        embedder: the encoder.
        items: texts, or whatever else `tokenise` takes; equal ones of a window are encoded once. Read in another thread.
        tokenise: several items -> a row each; called from other threads than the caller's.
        batch_tokens: tokens per forward pass, padding included; None: as many as suit the device.
        window: items that are sorted together.

    Raises:
        LimitExceeded: one text alone does not fit into memory. Besides, what `items`, `tokenise` and `embedder` raise.
    """
    sizes: dict[int, int] = {}
    starts = {0: 0}

    def counted() -> Iterator[list[Item]]:
        for number, chunk in enumerate(windows(items, window)):
            sizes[number] = len(chunk)
            yield chunk

    for block in stream_windows(embedder, counted(), tokenise, batch_tokens=batch_tokens):
        if block.window not in starts:
            starts = {block.window: starts[block.window - 1] + sizes.pop(block.window - 1)}
        yield replace(block, positions=block.positions + starts[block.window])


def stream_windows(
    embedder: Embedder,
    windows: Iterable[Sequence[Item]],
    tokenise: Callable[[Sequence[Item]], Sequence[TokenRow]],
    *,
    batch_tokens: int | None = None,
) -> Iterator[Block]:
    """Like `stream`, for windows that the caller has cut. An empty window gives one empty block, in its turn."""
    budget = Budget(batch_tokens or batch_tokens_for(embedder.device))
    threads = 1 if embedder.device.type == "cpu" else max(1, min(MOST_THREADS, (os.cpu_count() or 1) - 1))
    with contextlib.closing(_ahead(_tokenised(windows, tokenise, threads))) as ready:
        for number, window in enumerate(ready):
            if not window.rows:
                yield window.block(number, np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32))
            for chosen, vectors in embed_rows(embedder, window.rows, budget):
                yield window.block(number, chosen, vectors)


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; fewer where texts are so long that the window's limit of characters is reached."""
    found: list[Item] = []
    characters = 0
    for item in items:
        found.append(item)
        characters += len(item) if isinstance(item, str) else 0
        if len(found) == size or characters >= WINDOW_CHARACTERS:
            yield found
            found, characters = [], 0
    if found:
        yield found


# Texts -> token rows, ahead of the model


@dataclass(frozen=True)
class _Window:
    """Token rows of the different items of a window. which: Int64[n], item -> its row."""

    rows: Sequence[TokenRow]
    which: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[TokenRow], which: np.ndarray) -> _Window:
        """order, starts: the items of row r are order[starts[r] : starts[r + 1]]."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.bincount(which, minlength=len(rows)), out=starts[1:])
        return cls(rows, which, np.argsort(which, kind="stable"), starts)

    def block(self, number: int, chosen: np.ndarray, vectors: np.ndarray) -> Block:
        """The block of some rows, repeated for every item that has the same text."""
        rows = [self.rows[row] for row in chosen]
        lost = np.fromiter((row.lost for row in rows), dtype=np.int64, count=len(rows))
        tokens = np.fromiter((len(row.ids) - row.prompt for row in rows), dtype=np.int64, count=len(rows)) + lost
        if len(self.rows) == len(self.which):
            return Block(number, self.order[chosen], vectors, tokens, lost, len(rows))
        first, counts = self.starts[chosen], self.starts[chosen + 1] - self.starts[chosen]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self.order[np.repeat(first, counts) + within]
        vectors, tokens, lost = (np.repeat(values, counts, axis=0) for values in (vectors, tokens, lost))
        return Block(number, positions, vectors, tokens, lost, len(chosen))


def _tokenised(
    windows: Iterable[Sequence[Item]], tokenise: Callable[[Sequence[Item]], Sequence[TokenRow]], threads: int
) -> Generator[_Window, None, None]:
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenise") as pool:
        for items in windows:
            places: dict[Item, int] = {}
            which = np.fromiter((places.setdefault(item, len(places)) for item in items), dtype=np.int64, count=len(items))
            different = list(places)
            pieces = (different[start : start + PIECE] for start in range(0, len(different), PIECE))
            made = map(tokenise, pieces) if threads == 1 else pool.map(tokenise, pieces)
            yield _Window.of([_compact(row) for rows in made for row in rows], which)


def _compact(row: TokenRow) -> TokenRow:
    """The row with 4 bytes a token; a list of numbers takes 36."""
    return row if isinstance(row.ids, np.ndarray) else replace(row, ids=np.array(row.ids, dtype=np.int32))


def _ahead(made: Generator[Made, None, None]) -> Generator[Made, None, None]:
    """What `made` yields, made in a thread of its own while the caller is busy: one is ready, one is in the making.

    What it raises is raised here. The thread ends with this generator.
    """
    ready: Queue[tuple[Made | None, BaseException | None]] = Queue(maxsize=1)
    closed = threading.Event()

    def work() -> None:
        ended: BaseException | None = None
        try:
            with contextlib.closing(made):
                for item in made:
                    ready.put((item, None))
                    if closed.is_set():
                        break
        except BaseException as error:
            ended = error
        ready.put((None, ended or StopIteration()))

    thread = threading.Thread(target=work, name="encode ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if item is None:
                if isinstance(error, StopIteration):
                    return
                raise error or AssertionError
            yield item
    finally:
        closed.set()
        while thread.is_alive():
            with contextlib.suppress(Empty):
                ready.get_nowait()
            thread.join(0.01)


# Token rows -> vectors


def embed_rows(embedder: Embedder, rows: Sequence[TokenRow], budget: Budget) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions Int64[n], vectors Float32[n D]) batch after batch, longest rows first.

    On a GPU a batch is handed out when the next one has been started.

    Raises:
        LimitExceeded: one row alone does not fit into memory.
    """
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int64, count=len(rows))
    order = longest_first(lengths)
    falling = lengths[order]
    packed = embedder.packs(int(lengths.sum()))
    padding = PASS_TOKENS if embedder.device.type == "cpu" else GPU_PADDING
    ends = falling.cumsum()
    with embedder.prepared() if int(lengths.sum()) >= PREPARED_FROM else contextlib.nullcontext():
        running: tuple[np.ndarray, Callable[[], np.ndarray]] | None = None
        start = 0
        while start < len(order):
            if packed:
                before = ends[start] - falling[start]
                end = max(start + 1, int(np.searchsorted(ends, before + budget.tokens, side="right")))
            else:
                end = chunk_end(falling, start, budget.tokens, padding=padding)
            chosen = order[start:end]
            vectors = _embedded(embedder, [rows[row] for row in chosen], budget, packed=packed)
            if vectors is None:
                continue
            start = end
            fetch = _to_host(vectors)
            if running is not None:
                yield running[0], running[1]()
            running = (chosen, fetch)
            if vectors.device.type == "cpu":
                yield chosen, fetch()
                running = None
        if running is not None:
            yield running[0], running[1]()


def _embedded(embedder: Embedder, rows: Sequence[TokenRow], budget: Budget, *, packed: bool) -> Tensor | None:
    """Vectors of a batch, or None where it did not fit into memory: then the budget is smaller now."""
    try:
        with torch.inference_mode():
            return embedder.embed_rows(rows, packed=packed)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of the batch; without a GPU it does nothing
    budget.halve([len(row) for row in rows], said, packed=packed)
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def _to_host(vectors: Tensor) -> Callable[[], np.ndarray]:
    """Start the copy of a result into ordinary memory; the function returned waits for it."""
    if vectors.device.type != "cuda":
        return lambda: vectors.float().cpu().numpy()
    with torch.inference_mode():
        host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(vectors.device))

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait
