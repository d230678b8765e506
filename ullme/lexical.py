"""BM25 over texts and source code: the first round's miner, and the baseline that every model is measured beside.

Ours, because the libraries keep every text's words in memory while they build; what they score is the same (a test compares).
Identifiers are split into their words, and ties have one order on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
from pydantic import Field

from ullme.artifacts import write_atomic
from ullme.components import Section
from ullme.errors import ArtifactError, ContractError
from ullme.neighbours import MISSING_ROW, Neighbours

__all__ = ["BM25Searcher", "LexicalConfig", "tokenise", "words_bytes"]

POSTING = np.dtype([("word", "<u8"), ("row", "<i4"), ("count", "<i4")])
SCORED = np.dtype([("row", "<i4"), ("score", "<f4")])
SEGMENT_POSTINGS, RANGES = 2**17, 256
POSTINGS_SHARE = 2.2  # bytes of postings while they are sorted, over those of the texts: 1.0 to 2.1 on four collections
SORTED_SHARE = 0.6  # of that, at most, when they are sorted
POSTINGS, FILES, COUNT_FILE = "postings.bin", ("words.u64", "ends.i64", "scored.bin"), "texts.json"
WORD = re.compile(r"[^\W_]+")
# HTTPServer -> HTTP Server; parseDate -> parse Date; utf8 -> utf 8
CASE_OR_DIGIT = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Scripts written without spaces: one character is one token.
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
# fmt: off
STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of", "on", "or",
    "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
})
# fmt: on


class LexicalConfig(Section):
    """BM25 (Lucene's form) and its tokenisation.

    k1: how fast repeated words saturate. b: how much long documents are discounted (0 = not at all).
    stem: take plural endings off (after Harman's S-stemmer, "How effective is suffixing?", 1991).
    stop_words: leave out the commonest English words.
    """

    k1: float = Field(default=1.5, ge=0)
    b: float = Field(default=0.75, ge=0, le=1)
    stem: bool = True
    stop_words: bool = True


def tokenise(text: str, config: LexicalConfig | None = None) -> list[str]:
    """Lower-case words: snake_case and camelCase are split, single letters and (if so set) stop words left out."""
    config = config or LexicalConfig()
    tokens = []
    for word in WORD.findall(text):
        if word.isascii():
            parts = [part.lower() for part in CASE_OR_DIGIT.findall(word)]
            parts = [part for part in parts if (len(part) > 1 or part.isdigit()) and not (config.stop_words and part in STOP_WORDS)]
        else:
            parts = UNSPACED.findall(word.casefold())
        tokens += [_singular(part) for part in parts] if config.stem else parts
    return tokens


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s"):
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    return word if word.endswith(("us", "ss")) else word[:-1]


class BM25Searcher:
    """The documents that share words with a query, best first; documents that share none are not found.

    The scores are those of Lucene's BM25, as `bm25s` computes them: of every document and each of its words once, when the index
    is made, so that a search adds up what it finds. With a folder, words and scores lie there and are read word by word.
    """

    def __init__(self, texts: Iterable[str], config: LexicalConfig | None = None, *, folder: Path | None = None) -> None:
        """texts: N, read once; rows are places among them, ties go to the lower. folder: for what does not fit in memory.

        Raises:
            ContractError: no texts.
        """
        self._config = config or LexicalConfig()
        postings = _Postings(folder)
        lengths = array("i")
        for text in texts:
            tokens = tokenise(text, self._config)
            postings.add(len(lengths), Counter(tokens))
            lengths.append(len(tokens))
        self.count = len(lengths)
        if not lengths:
            raise ContractError("BM25Searcher: expected texts to search in, got none")
        words = np.frombuffer(lengths, dtype=np.int32)
        k1, b, mean = self._config.k1, self._config.b, float(words.mean())

        def scored(rows: np.ndarray, counts: np.ndarray, documents: np.ndarray) -> np.ndarray:
            rarity = np.log(1 + (len(words) - documents + 0.5) / (documents + 0.5))
            return rarity * counts / (counts + k1 * (1 - b + b * words[rows] / mean))

        self._words, self._starts, self._scored = postings.finish(scored)
        if folder is not None:
            write_atomic(folder / COUNT_FILE, json.dumps({"texts": self.count}))

    @classmethod
    def open(cls, folder: Path, config: LexicalConfig | None = None) -> BM25Searcher:
        """What was made in a folder, with the same settings; it is not read into memory.

        Raises:
            ArtifactError: something of it is missing or damaged.
        """
        searcher = cls.__new__(cls)
        try:
            searcher._config = config or LexicalConfig()
            searcher.count = int(json.loads((folder / COUNT_FILE).read_text(encoding="utf-8"))["texts"])
            searcher._words, searcher._starts, searcher._scored = _opened(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder}: not the words of a corpus ({error}); delete the folder, it is made again") from error
        return searcher

    def scores(self, text: str) -> np.ndarray:
        """Float32[N]: the score of every document; 0 where no word is shared."""
        found = np.zeros(self.count, dtype=np.float32)
        for token in tokenise(text, self._config):
            word = _number(token)
            place = int(np.searchsorted(self._words, word))
            if place < len(self._words) and self._words[place] == word:
                scored = self._scored[int(self._starts[place]) : int(self._starts[place + 1])]
                found[scored["row"]] += scored["score"]
        return found

    def search(self, texts: Sequence[str], k: int, *, among: np.ndarray | None = None) -> Neighbours:
        """The k best documents of each query text. among: Int64[n], the rows that may be found, ascending; None = all."""
        rows = np.full((len(texts), k), MISSING_ROW, dtype=np.int64)
        scores = np.full((len(texts), k), -np.inf, dtype=np.float32)
        for number, text in enumerate(texts):
            found = self.scores(text) if among is None else self.scores(text)[among]
            best = best_above_zero(found, k)
            rows[number, : len(best)] = best if among is None else among[best]
            scores[number, : len(best)] = found[best]
        return Neighbours(rows, scores)


def words_bytes(texts_bytes: float) -> tuple[int, int]:
    """The most that the words of texts of so many bytes take on the disk: while they are sorted, and afterwards."""
    return int(POSTINGS_SHARE * texts_bytes), int(SORTED_SHARE * POSTINGS_SHARE * texts_bytes)


def best_above_zero(scores: np.ndarray, k: int) -> np.ndarray:
    """Int64[at most k]: where the highest of Float[N] stand that are above 0, best first; of equal ones the lower place first."""
    candidates = np.flatnonzero(scores > 0)
    if k < len(candidates):
        least = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= least]
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


class _Postings:
    """How often which word stands in which document, brought from the order of documents into that of words.

    Words are numbers (`_number`). What is gathered is put away in segments, sorted by the numbers' first byte; in the end each of
    the 256 ranges is read from all segments and sorted as a whole.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._words, self._rows, self._counts = array("Q"), array("i"), array("i")
        self._segments: list[np.ndarray] = []  # without a folder
        self._ranges: list[np.ndarray] = []  # of each segment, where each of its ranges starts in the file
        self._written = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / POSTINGS).write_bytes(b"")

    def add(self, row: int, counts: Mapping[str, int]) -> None:
        """One document: word -> how often."""
        self._words.extend(map(_number, counts))
        self._counts.extend(counts.values())
        self._rows.extend([row] * len(counts))
        if len(self._rows) >= SEGMENT_POSTINGS:
            self._settle()

    def finish(self, scored: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray | _Scores]:
        """(UInt64[V] words, Int64[V + 1] starts, [P] of SCORED): the documents of word w are at starts[w] : starts[w + 1].

        scored: (row and count of each posting, in how many documents its word is) -> scores.
        """
        self._settle()
        columns: list[list[np.ndarray]] = [[], [], []]
        total = 0
        with ExitStack() as stack:
            files = [stack.enter_context((self._folder / name).open("wb")) for name in FILES] if self._folder is not None else []
            for number in range(RANGES):
                some = self._range(number)
                words, counts = np.unique(some["word"], return_counts=True)
                best = np.empty(len(some), dtype=SCORED)
                best["row"] = some["row"]
                best["score"] = scored(some["row"], some["count"], np.repeat(counts, counts))
                ends = total + np.cumsum(counts)
                total += len(some)
                for place, column in enumerate((words, ends, best)):
                    if files:
                        files[place].write(column.tobytes())
                    else:
                        columns[place].append(column)
        if self._folder is None:
            words, ends, best = (np.concatenate(column) for column in columns)
            return words, np.concatenate([[0], ends]), best
        (self._folder / POSTINGS).unlink()
        return _opened(self._folder)

    def _range(self, number: int) -> np.ndarray:
        """All postings of one range, by word; of a word by row."""
        parts = []
        for segment, starts in zip_longest(self._segments, self._ranges):
            start, stop = int(starts[number]), int(starts[number + 1])
            if self._folder is None:
                parts.append(segment[start:stop])
            elif stop > start:
                parts.append(np.fromfile(self._folder / POSTINGS, POSTING, stop - start, offset=start * POSTING.itemsize))
        found = np.concatenate(parts) if parts else np.empty(0, POSTING)
        return found[np.argsort(found["word"], kind="stable")]

    def _settle(self) -> None:
        """Sort what is gathered, and put it away."""
        segment = np.empty(len(self._rows), dtype=POSTING)
        segment["word"], segment["row"], segment["count"] = self._words, self._rows, self._counts
        ranges = (segment["word"] >> np.uint64(56)).astype(np.uint8)
        segment = segment[np.argsort(ranges, kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(ranges, minlength=RANGES))])
        if self._folder is None:
            self._segments.append(segment)
            self._ranges.append(starts)
        else:
            with (self._folder / POSTINGS).open("ab") as out:
                out.write(segment.tobytes())
            self._ranges.append(self._written + starts)
            self._written += len(segment)
        self._words, self._rows, self._counts = array("Q"), array("i"), array("i")


def _opened(folder: Path) -> tuple[np.ndarray, np.ndarray, _Scores]:
    """What `_Postings.finish` wrote: words and starts in memory, scores where they lie."""
    words, ends = (np.fromfile(folder / name, dtype) for name, dtype in zip(FILES[:2], (np.uint64, np.int64), strict=True))
    if len(words) != len(ends):
        raise ValueError(f"{len(words)} words, {len(ends)} ends")
    return words, np.concatenate([[0], ends]), _Scores(folder / FILES[2])


class _Scores:
    """What `_Postings` found, in a file: read a range at a time, since pages of a mapping would stay in memory."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, span: slice) -> np.ndarray:
        size = SCORED.itemsize
        return np.frombuffer(os.pread(self._file, (span.stop - span.start) * size, span.start * size), dtype=SCORED)


@lru_cache(2**16)
def _number(word: str) -> int:
    """64 bits of a word's digest: a word's number, without a table of all words. That two share one does not happen."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
