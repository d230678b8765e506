"""What can be measured: BM25, or a model over its stored vectors, exactly, through an index, and together with BM25."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ullme.artifacts import ArtifactRef, Inputs, Store, digest_of
from ullme.data import Dataset, Query
from ullme.encoding import ENCODE, EncodeConfig, open_embeddings
from ullme.errors import ContractError
from ullme.lexical import LexicalConfig
from ullme.neighbours import MISSING_ROW, ExactSearcher, Neighbours, Searcher
from ullme.reranking import fused, fused_depth
from ullme.words import words_of

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["EncodedSearcher", "LexicalSystem", "OpenIndex", "QuerySearcher", "System", "VectorSystem"]

OpenIndex = Callable[[Path, str], Searcher]
"""(index artifact, fingerprint of the model that will query it) -> its searcher."""
Asked = tuple[str, str, str]
"""What decides a query's vector: the name of its data set, its text, its own instruction."""


class QuerySearcher(Protocol):
    """Finds documents for queries."""

    @property
    def ids(self) -> Sequence[str]:
        """Document ids; `Neighbours.rows` are positions in it."""
        ...

    def search(self, queries: Sequence[Query], k: int) -> Neighbours:
        """The k best documents of each query."""
        ...


class System(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """`bm25` or `model`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the answers may."""
        ...

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, QuerySearcher]:
        """`exact`, and where there are such `index` and `hybrid`, over the run's own corpus or over `other`, a data artifact."""
        ...


class LexicalSearcher:
    """BM25 of the queries' texts."""

    def __init__(self, store: Store, data: ArtifactRef, config: LexicalConfig) -> None:
        self._ids = Dataset.open(store.open(data, "data")).corpus().ids()
        self._searcher = words_of(store, data, config)

    @classmethod
    def over(cls, inputs: Inputs, scratch: Store, other: ArtifactRef | None, config: LexicalConfig) -> LexicalSearcher:
        """Over the run's own corpus, whose words its store keeps, or over `other` in a store for the occasion."""
        return cls(inputs.store, inputs.ref("data"), config) if other is None else cls(scratch, other, config)

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._ids

    def search(self, queries: Sequence[Query], k: int) -> Neighbours:
        """The k best documents of each query."""
        return self._searcher.search([query.text for query in queries], k)


@dataclass(frozen=True)
class LexicalSystem:
    """BM25 over the corpus."""

    inputs: Inputs
    store: Store
    config: LexicalConfig
    name: str = "bm25"

    @property
    def fingerprint(self) -> str:
        """Digest of the settings: the method itself has no weights."""
        return digest_of(["bm25", "lucene", self.config.identity()])

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, QuerySearcher]:
        """`exact` only."""
        return {"exact": LexicalSearcher.over(self.inputs, self.store, other, self.config)}


class EncodedSearcher:
    """Queries of one data set through an encoder, its vectors through a searcher."""

    def __init__(self, system: VectorSystem, searcher: Searcher, dataset: str) -> None:
        self._system, self._searcher, self._dataset = system, searcher, dataset

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._searcher.ids

    def search(self, queries: Sequence[Query], k: int) -> Neighbours:
        """The k best documents of each query."""
        vectors = self._system.encode([(self._dataset, query.text, query.instruction) for query in queries])
        return self._searcher.search(vectors, k)


@dataclass(frozen=True)
class HybridSearcher:
    """The ranks of two searchers over the same documents, fused (see `ullme.reranking.fused`)."""

    first: QuerySearcher
    second: QuerySearcher

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order, those of the first."""
        return self.first.ids

    def search(self, queries: Sequence[Query], k: int) -> Neighbours:
        """The k best documents of each query."""
        depth = min(len(self.ids), fused_depth(k))
        place = {name: row for row, name in enumerate(self.ids)}
        other = np.array([place[name] for name in self.second.ids], dtype=np.int64)
        rankings = [self.first.search(queries, depth).rows, self.second.search(queries, depth).rows]
        rankings[1] = np.where(rankings[1] == MISSING_ROW, MISSING_ROW, other[rankings[1]])
        rows = np.full((len(queries), k), MISSING_ROW, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for number, both in enumerate(zip(*rankings, strict=True)):
            best = fused([[int(row) for row in ranking if row != MISSING_ROW] for ranking in both])[:k]
            rows[number, : len(best)] = [row for row, _ in best]
            scores[number, : len(best)] = [score for _, score in best]
        return Neighbours(rows, scores)


@dataclass(frozen=True)
class VectorSystem:
    """A model over its stored vectors, exactly and through the index where one is given.

    batch_tokens: padded tokens of queries per forward pass. lexical: measure it together with BM25, too.
    """

    inputs: Inputs
    store: Store
    open_index: OpenIndex | None
    batch_tokens: int
    name: str = "model"
    lexical: LexicalConfig | None = None
    _known: dict[Asked, np.ndarray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of the model artifact."""
        return self.inputs.ref("model").digest

    @cached_property
    def encoder(self) -> Encoder:
        """The model."""
        from ullme.encoder import Encoder

        return Encoder.load(self.inputs["model"])

    def encode(self, asked: Sequence[Asked]) -> np.ndarray:
        """Float32[Q D]. A query is encoded once, however many searchers and data sets it is asked in."""
        new = [key for key in dict.fromkeys(asked) if key not in self._known]
        for dataset in {key[0] for key in new}:
            keys = [key for key in new if key[0] == dataset]
            vectors = self.encoder.encode(
                [text for _, text, _ in keys],
                prompt="query",
                dataset=dataset,
                instructions=[said for _, _, said in keys],
                batch_tokens=self.batch_tokens,
            )
            self._known.update(zip(keys, vectors, strict=True))
        return np.stack([self._known[key] for key in asked])

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, QuerySearcher]:
        """Over the stored vectors; another corpus is encoded first (in shards that a crash does not lose)."""
        if other is None:
            path = self.inputs["embeddings"]
        else:
            refs = {"data": other, "model": self.inputs.ref("model")}
            section = EncodeConfig.model_validate({"runtime": {"batch_tokens": self.batch_tokens}})
            path = self.store.open(self.store.produce(ENCODE, section, refs, seed=0), "embeddings")
        stored = open_embeddings(path)
        if stored.fingerprint != self.fingerprint:
            raise ContractError(
                f"evaluate: the embeddings were made by model {stored.fingerprint[:12]}, the model given is "
                f"{self.fingerprint[:12]}; encode the corpus with it first"
            )
        data = Dataset.open(self.inputs["data"] if other is None else self.store.open(other, "data"))
        found: dict[str, QuerySearcher] = {
            "exact": EncodedSearcher(self, ExactSearcher(stored, stored.ids, device=str(self.encoder.device)), data.name)
        }
        if other is None and "index" in self.inputs:
            if self.open_index is None:
                raise ContractError("evaluate: an index was given, but nothing to open it with (open_index)")
            found["index"] = EncodedSearcher(self, self.open_index(self.inputs["index"], self.fingerprint), data.name)
        if self.lexical is not None:
            words = LexicalSearcher.over(self.inputs, self.store, other, self.lexical)
            found["hybrid"] = HybridSearcher(found.get("index", found["exact"]), words)
        return found
