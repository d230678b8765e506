"""The words stage: BM25 over a corpus, made once and opened by whatever ranks by words.

It is not a step of the pipeline: evaluation and search ask the store for it when they need it, and find it there the next time.
"""

from __future__ import annotations

import logging

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.data import Dataset
from ullme.documents import DOCUMENTS_FILE
from ullme.errors import LimitExceeded
from ullme.lexical import BM25Searcher, LexicalConfig, words_bytes

__all__ = ["WORDS", "words_of", "words_space"]

logger = logging.getLogger(__name__)


def index_words(section: LexicalConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: the searchable documents of `data` -> what BM25 looks up, rows as in `Dataset.corpus`."""
    draft.restart()
    corpus = Dataset.open(inputs["data"]).corpus()
    BM25Searcher((document.content for document in corpus), section, folder=draft.path)
    draft.meta |= {"documents": len(corpus)}


def words_space(section: LexicalConfig, inputs: Inputs) -> int:  # noqa: ARG001 - the same signature for every stage
    """Bytes that the stage writes at most, which is while the words are sorted."""
    counts = inputs.ref("data").meta
    return words_bytes(inputs.sizes("data").get(DOCUMENTS_FILE, 0) * counts["searchable"] / counts["documents"])[0]


WORDS = Stage("words", "words", 1, index_words, words_space)


def words_of(store: Store, data: ArtifactRef, config: LexicalConfig | None = None) -> BM25Searcher:
    """BM25 over the corpus of a data artifact: from the store, or, where nothing can be written to it, made in memory."""
    config = config or LexicalConfig()
    try:
        ref = store.produce(WORDS, config, {"data": data}, seed=0)
    except (PermissionError, LimitExceeded) as error:
        logger.info("words: made in memory, the store keeps none (%s)", error)
        corpus = Dataset.open(store.open(data)).corpus()
        return BM25Searcher((document.content for document in corpus), config)
    return BM25Searcher.open(store.open(ref), config)
