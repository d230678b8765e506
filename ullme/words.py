"""The words stage: BM25 over a corpus, made once and opened by whatever ranks by words.

It is not a step of the pipeline: evaluation and search ask the store for it when they need it, and find it there the next time.
"""

from __future__ import annotations

import logging

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.data import Dataset
from ullme.errors import LimitExceeded
from ullme.lexical import BM25Searcher, LexicalConfig

__all__ = ["WORDS", "words_of"]

logger = logging.getLogger(__name__)


def index_words(section: LexicalConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: the searchable documents of `data` -> what BM25 looks up, rows as in `Dataset.corpus`."""
    draft.restart()
    corpus = Dataset.open(inputs["data"]).corpus()
    BM25Searcher((document.content for document in corpus), section, folder=draft.path)
    draft.meta |= {"documents": len(corpus)}


WORDS = Stage("words", "words", 1, index_words)


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
