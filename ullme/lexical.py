"""BM25 over texts and source code: the first round's miner, and the baseline that every model is measured beside.

Scores come from `bm25s`; this module adds the tokenisation (identifiers are split into their words) and a search whose
ties have one order on every machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ullme.components import Section
from ullme.errors import ContractError
from ullme.neighbours import MISSING_ROW, Neighbours

__all__ = ["BM25Searcher", "LexicalConfig", "tokenise"]

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

    texts and ids: N each. Ties go to the lower row.

    Raises:
        ContractError: not one id per text, or no documents.
    """

    def __init__(self, texts: Sequence[str], ids: Sequence[str], config: LexicalConfig | None = None) -> None:
        if len(texts) != len(ids) or not texts:
            raise ContractError(f"BM25Searcher: expected N >= 1 texts and as many ids, got {len(texts)} texts and {len(ids)} ids")
        import bm25s

        # bm25s sets its own logger to DEBUG, which would pass the root logger's level by.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._ids, self._config = ids, config or LexicalConfig()
        vocabulary: dict[str, int] = {}
        rows = [[vocabulary.setdefault(token, len(vocabulary)) for token in tokenise(text, self._config)] for text in texts]
        self._vocabulary = vocabulary
        self._model = bm25s.BM25(k1=self._config.k1, b=self._config.b, method="lucene")
        if vocabulary:
            self._model.index((rows, vocabulary), create_empty_token=False, show_progress=False)

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._ids

    def scores(self, text: str) -> np.ndarray:
        """Float32[N]: the score of every document; 0 where no word is shared."""
        tokens = [self._vocabulary[token] for token in tokenise(text, self._config) if token in self._vocabulary]
        return self._model.get_scores_from_ids(tokens) if tokens else np.zeros(len(self._ids), dtype=np.float32)

    def search(self, texts: Sequence[str], k: int, *, among: np.ndarray | None = None) -> Neighbours:
        """The k best documents of each query text. among: Int64[n], the rows that may be found, ascending; None = all."""
        rows = np.full((len(texts), k), MISSING_ROW, dtype=np.int64)
        scores = np.full((len(texts), k), -np.inf, dtype=np.float32)
        for number, text in enumerate(texts):
            found = self.scores(text) if among is None else self.scores(text)[among]
            least = np.partition(found, -k)[-k] if k < len(found) else 0.0
            candidates = np.flatnonzero((found >= least) & (found > 0))
            best = candidates[np.argsort(-found[candidates], kind="stable")][:k]
            rows[number, : len(best)] = best if among is None else among[best]
            scores[number, : len(best)] = found[best]
        return Neighbours(rows, scores)
