"""What a miner works with: the train queries, the pool of candidates, and the teachers that rank one for the other."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ullme.artifacts import Inputs
from ullme.data import Dataset, Document, Query
from ullme.errors import ConfigError, ContractError
from ullme.lexical import BM25Searcher, LexicalConfig
from ullme.neighbours import ExactSearcher, Neighbours, best_places
from ullme.records import normalise
from ullme.reranking import FUSION_CONSTANT

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["FusedRanker", "LexicalRanker", "MiningContext", "Ranker", "VectorRanker", "model_vectors"]

logger = logging.getLogger(__name__)


class Ranker(Protocol):
    """Ranks the pool for train queries, both by position in `MiningContext`."""

    @property
    def name(self) -> str:
        """What the reports call it."""
        ...

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        ...

    def score(self, query: int, rows: Sequence[int]) -> np.ndarray:
        """Float32[len(rows)]: this query's score of these pool rows."""
        ...


@dataclass(frozen=True)
class LexicalRanker:
    """BM25 over the pool."""

    context: MiningContext
    searcher: BM25Searcher
    name: str = "bm25"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        return self.searcher.search([self.context.queries[query].text for query in queries], k)

    def score(self, query: int, rows: Sequence[int]) -> np.ndarray:
        """BM25 of these pool rows."""
        return self.searcher.scores(self.context.queries[query].text)[list(rows)] if rows else np.empty(0, np.float32)


@dataclass(frozen=True)
class VectorRanker:
    """Exact inner product. queries: Float32[Q D]; documents: Float[N D]."""

    queries: np.ndarray
    documents: np.ndarray
    name: str = "model"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        searcher = ExactSearcher(self.documents, range(len(self.documents)))  # type: ignore[arg-type]
        return searcher.search(self.queries[list(queries)], k)

    def score(self, query: int, rows: Sequence[int]) -> np.ndarray:
        """Inner product with these pool rows."""
        return self.documents[list(rows)].astype(np.float32) @ self.queries[query]


@dataclass(frozen=True)
class FusedRanker:
    """Several rankings of a pool of `size` documents as one.

    by: `ranks`, 1 / (60 + rank) summed (reciprocal-rank fusion), or `scores`, their mean as standard deviations over the pool.
    """

    rankers: Sequence[Ranker]
    size: int
    by: Literal["ranks", "scores"]
    name: str = "fused"

    def search(self, queries: Sequence[int], k: int) -> Neighbours:
        """The k best pool rows of each query."""
        scores = np.stack([self.score(query, range(self.size)) for query in queries])
        places = best_places(scores, min(k, self.size))
        return Neighbours(places, np.take_along_axis(scores, places, axis=1))

    def score(self, query: int, rows: Sequence[int]) -> np.ndarray:
        """The fused score of these pool rows."""
        parts = []
        for ranker in self.rankers:
            scores = ranker.score(query, range(self.size)).astype(np.float64)
            if self.by == "scores":
                parts.append((scores - scores.mean()) / max(float(scores.std()), 1e-9) / len(self.rankers))
            else:
                ascending = np.sort(scores)
                above = len(scores) - np.searchsorted(ascending, scores, side="right")
                parts.append(1 / (FUSION_CONSTANT + 1 + above))
        return np.sum(parts, axis=0)[list(rows)].astype(np.float32)


@dataclass(frozen=True)
class MiningContext:
    """What a miner sees: the train queries, the pool of candidates, and the teachers (made when first asked for).

    vectors: makes the model's vectors, or None when the stage was given no model.
    """

    queries: Sequence[Query]
    documents: Sequence[Document]
    seed: int
    vectors: Callable[[MiningContext], VectorRanker] | None = None
    _lexical: dict[LexicalConfig, LexicalRanker] = field(default_factory=dict)

    def bm25(self, config: LexicalConfig) -> LexicalRanker:
        """BM25 over the pool."""
        if config not in self._lexical:
            searcher = BM25Searcher([doc.content for doc in self.documents], [doc.id for doc in self.documents], config)
            self._lexical[config] = LexicalRanker(self, searcher)
        return self._lexical[config]

    @cached_property
    def model(self) -> VectorRanker:
        """Exact search with the vectors of the model that the stage was given.

        Raises:
            ConfigError: it was given none.
        """
        if self.vectors is None:
            raise ConfigError(
                "mining.miner: this kind needs a model's vectors, and the stage was given no model; mine with kind: bm25"
            )
        return self.vectors(self)

    @cached_property
    def keys(self) -> list[int]:
        """One number per pool row: equal where the texts read the same (case, punctuation and spacing aside)."""
        return [hash(normalise(document.content)) for document in self.documents]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Pool row of a document id."""
        return {document.id: row for row, document in enumerate(self.documents)}

    @cached_property
    def _rows_of_key(self) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {}
        for row, key in enumerate(self.keys):
            rows.setdefault(key, []).append(row)
        return rows

    def positive_rows(self, query: int) -> list[int]:
        """Pool rows of the query's positives."""
        return [self.row_of[doc] for doc in self.queries[query].positives if doc in self.row_of]

    def forbidden_rows(self, query: int) -> set[int]:
        """Pool rows that must not become negatives: the positives, and whatever reads the same as one."""
        return {row for positive in self.positive_rows(query) for row in self._rows_of_key[self.keys[positive]]}

    def random(self, query: int) -> np.random.Generator:
        """A generator that depends on the seed and the query's id, not on its position."""
        return np.random.default_rng([self.seed, zlib.crc32(self.queries[query].id.encode())])


def model_vectors(
    inputs: Inputs, data: Dataset, encoder: Callable[[], Encoder], *, batch_tokens: int
) -> Callable[[MiningContext], VectorRanker]:
    """Encodes train queries and pool with what `encoder` opens, when first called; what `embeddings` holds is taken from there.

    Raises, when called:
        ContractError: the embeddings are of another model.
    """

    def vectors(context: MiningContext) -> VectorRanker:
        from ullme.encoding import open_embeddings

        model = encoder()
        documents = np.zeros((len(context.documents), model.dim), dtype=np.float16)
        missing = dict(context.row_of)
        if "embeddings" in inputs:
            stored = open_embeddings(inputs["embeddings"])
            if stored.fingerprint != inputs.ref("model").digest:
                raise ContractError(
                    f"mine: the embeddings were made by model {stored.fingerprint[:12]}, the model given is "
                    f"{inputs.ref('model').digest[:12]}; encode the corpus with it first"
                )
            for ids, block in stored.shards():
                here = [(position, missing.pop(name)) for position, name in enumerate(ids) if name in missing]
                if here:
                    positions, rows = (list(part) for part in zip(*here, strict=True))
                    documents[rows] = block[positions]
        if missing:
            logger.info("mine: encoding %d documents of the pool", len(missing))
            here = [data.document(name) for name in missing]
            documents[list(missing.values())] = model.encode(
                [document.content for document in here],
                prompt="document",
                dataset=[document.dataset or data.name for document in here],
                batch_tokens=batch_tokens,
            )
        queries = model.encode(
            [query.text for query in context.queries],
            prompt="query",
            dataset=[query.dataset or data.name for query in context.queries],
            instructions=[query.instruction for query in context.queries],
            batch_tokens=batch_tokens,
        )
        return VectorRanker(queries, documents)

    return vectors
