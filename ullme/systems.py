"""What can be measured: BM25, or a model over its stored vectors, exactly and through an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ullme.artifacts import ArtifactRef, Inputs, Store, digest_of
from ullme.data import Dataset
from ullme.encoding import ENCODE, EncodeConfig, open_embeddings
from ullme.errors import ContractError
from ullme.lexical import BM25Searcher, LexicalConfig
from ullme.neighbours import ExactSearcher, Neighbours, Searcher

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["EncodedSearcher", "LexicalSystem", "OpenIndex", "System", "TextSearcher", "VectorSystem"]

OpenIndex = Callable[[Path, str], Searcher]
"""(index artifact, fingerprint of the model that will query it) -> its searcher."""


class TextSearcher(Protocol):
    """Finds documents for query texts."""

    @property
    def ids(self) -> Sequence[str]:
        """Document ids; `Neighbours.rows` are positions in it."""
        ...

    def search(self, texts: Sequence[str], k: int) -> Neighbours:
        """The k best documents of each text."""
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

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
        """`exact`, and `index` where there is one, over the run's own corpus or over `other`, a data artifact."""
        ...


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
        return digest_of(["bm25", version("bm25s"), self.config.identity()])

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
        """`exact` only."""
        corpus = Dataset.open(self.inputs["data"] if other is None else self.store.open(other, "data")).corpus()
        return {"exact": BM25Searcher([doc.content for doc in corpus], [doc.id for doc in corpus], self.config)}


class EncodedSearcher:
    """Query texts through an encoder, its vectors through a searcher. A text is encoded once: `known` holds what was."""

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray], searcher: Searcher, known: dict[str, np.ndarray]) -> None:
        self._encode, self._searcher, self._known = encode, searcher, known

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self._searcher.ids

    def search(self, texts: Sequence[str], k: int) -> Neighbours:
        """The k best documents of each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
        return self._searcher.search(np.stack([self._known[text] for text in texts]), k)


@dataclass(frozen=True)
class VectorSystem:
    """A model over its stored vectors, exactly and through the index where one is given.

    batch_tokens: padded tokens of queries per forward pass.
    """

    inputs: Inputs
    store: Store
    open_index: OpenIndex | None
    batch_tokens: int
    name: str = "model"
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of the model artifact."""
        return self.inputs.ref("model").digest

    @cached_property
    def encoder(self) -> Encoder:
        """The model."""
        from ullme.encoder import Encoder

        return Encoder.load(self.inputs["model"])

    def _encode(self, queries: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(queries, prompt="query", batch_tokens=self.batch_tokens)

    def searchers(self, other: ArtifactRef | None = None) -> Mapping[str, TextSearcher]:
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
        vectors = np.concatenate([block for _, block in stored.shards()])
        found = {"exact": EncodedSearcher(self._encode, ExactSearcher(vectors, stored.ids), self._known)}
        if other is None and "index" in self.inputs:
            if self.open_index is None:
                raise ContractError("evaluate: an index was given, but nothing to open it with (open_index)")
            found["index"] = EncodedSearcher(self._encode, self.open_index(self.inputs["index"], self.fingerprint), self._known)
        return found
