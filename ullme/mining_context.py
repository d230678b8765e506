"""What a miner works with: the train queries, the pool of candidates, and the teachers, each made when it is first asked for.

Of a document, a number and a few flags are in memory: texts, vectors and the words of BM25 lie in files (`ullme.documents`,
`ullme.vector_file`, `ullme.lexical`), so that a pool may be far larger than memory.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ullme.artifacts import Inputs, digest_of
from ullme.data import Document, Query
from ullme.errors import ConfigError, ContractError
from ullme.lexical import BM25Searcher, LexicalConfig
from ullme.progress import Progress
from ullme.rankers import LexicalRanker, VectorRanker
from ullme.records import normalise
from ullme.vector_file import VectorFile, VectorReader

if TYPE_CHECKING:
    from ullme.encoder import Encoder
    from ullme.shards import Embeddings

__all__ = ["MiningContext", "encoded_vectors"]

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 4096
"""Documents whose vectors are written down together: what a crash costs at most."""
COMPARED_AT_ONCE = 2**16
ID_BYTES = 16


@dataclass(frozen=True)
class MiningContext:
    """What a miner sees.

    documents: the pool, read one after the other or by row. vectors: makes the model's vectors, or None when the stage was given no
    model. folder: where what does not fit in memory is put; None = it does fit.
    """

    queries: Sequence[Query]
    documents: Sequence[Document]
    seed: int
    vectors: Callable[[MiningContext], VectorRanker] | None = None
    folder: Path | None = None
    _lexical: dict[LexicalConfig, LexicalRanker] = field(default_factory=dict)

    def bm25(self, config: LexicalConfig) -> LexicalRanker:
        """BM25 over the pool."""
        if config not in self._lexical:
            folder = self.folder / f"bm25-{digest_of(config.identity())[:8]}" if self.folder is not None else None
            texts = (document.content for document in self.documents)
            searcher = BM25Searcher(texts, config, folder=folder)
            self._lexical[config] = LexicalRanker([query.text for query in self.queries], searcher)
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
    def keys(self) -> np.ndarray:
        """Int64[N]: one number per pool row, equal where the texts read the same (case, punctuation and spacing aside)."""
        return np.fromiter((hash(normalise(document.content)) for document in self.documents), np.int64, len(self.documents))

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Pool row of every document that a query has judged and that is in the pool."""
        judged = {name for query in self.queries for name in (*query.positives, *query.negatives)}
        return {document.id: row for row, document in enumerate(self.documents) if document.id in judged}

    @cached_property
    def _copies(self) -> dict[int, list[int]]:
        """Text key of each positive -> the rows that have it."""
        rows = [row for query in range(len(self.queries)) for row in self.positive_rows(query)]
        wanted = np.unique(self.keys[rows])
        found: dict[int, list[int]] = {int(key): [] for key in wanted}
        for start in range(0, len(self.keys), COMPARED_AT_ONCE):
            block = self.keys[start : start + COMPARED_AT_ONCE]
            for place in np.flatnonzero(np.isin(block, wanted)).tolist():
                found[int(block[place])].append(start + place)
        return found

    def positive_rows(self, query: int) -> list[int]:
        """Pool rows of the query's positives."""
        return [self.row_of[doc] for doc in self.queries[query].positives if doc in self.row_of]

    def forbidden_rows(self, query: int) -> set[int]:
        """Pool rows that must not become negatives: the positives, and whatever reads the same as one."""
        return {row for positive in self.positive_rows(query) for row in self._copies[int(self.keys[positive])]}

    def random(self, query: int) -> np.random.Generator:
        """A generator that depends on the seed and the query's id, not on its position."""
        return np.random.default_rng([self.seed, zlib.crc32(self.queries[query].id.encode())])

    def ids(self, rows: Iterable[int]) -> dict[int, str]:
        """Document ids of these pool rows."""
        return {row: self.documents[row].id for row in sorted(set(rows))}


def encoded_vectors(
    inputs: Inputs, name: str, encoder: Callable[[], Encoder], *, batch_tokens: int
) -> Callable[[MiningContext], VectorRanker]:
    """Encodes train queries and pool with what `encoder` opens, when first called; what `embeddings` holds is taken from there.

    name: what the data set is called. With a folder, an interrupted attempt is gone on with after the last vectors it wrote.

    Raises, when called:
        ContractError: the embeddings are of another model.
    """

    def vectors(context: MiningContext) -> VectorRanker:
        from ullme.shards import open_embeddings

        stored = open_embeddings(inputs["embeddings"]) if "embeddings" in inputs else None
        if stored is not None and stored.fingerprint != inputs.ref("model").digest:
            raise ContractError(
                f"mine: the embeddings were made by model {stored.fingerprint[:12]}, the model given is "
                f"{inputs.ref('model').digest[:12]}; encode the corpus with it first"
            )
        model = encoder()
        at = stored_rows(context.documents, stored)
        missing = int((at < 0).sum())
        if missing:
            logger.info("mine: encoding %d documents of the pool", missing)

        def documents(rows: range) -> np.ndarray:
            block = np.empty((len(rows), model.dim), dtype=np.float16)
            there = np.flatnonzero(at[rows.start : rows.stop] >= 0)
            if stored is not None and len(there):
                block[there] = stored[at[rows.start + there]]
            new = np.flatnonzero(at[rows.start : rows.stop] < 0)
            if len(new):
                block_of = list(context.documents[rows.start : rows.stop])
                found = [block_of[place] for place in new.tolist()]
                called = [document.dataset or name for document in found]
                texts = [document.content for document in found]
                block[new] = model.encode(texts, prompt="document", dataset=called, batch_tokens=batch_tokens)
            return block

        def queries(rows: range) -> np.ndarray:
            asked = context.queries[rows.start : rows.stop]
            return model.encode(
                [query.text for query in asked],
                prompt="query",
                dataset=[query.dataset or name for query in asked],
                instructions=[query.instruction for query in asked],
                batch_tokens=batch_tokens,
            )

        folder = context.folder
        pool = _table(folder and folder / "pool.npy", (len(context.documents), model.dim), np.float16, documents)
        asked = _table(folder and folder / "queries.npy", (len(context.queries), model.dim), np.float32, queries)
        return VectorRanker(asked[: len(context.queries)], pool, device=str(model.device))

    return vectors


def stored_rows(documents: Sequence[Document], stored: Embeddings | None) -> np.ndarray:
    """Int64[N]: where the vector of each document is among the stored ones; -1 = nowhere."""
    at = np.full(len(documents), -1, dtype=np.int64)
    if stored is None:
        return at
    names = np.fromiter((_digest(document.id) for document in documents), f"S{ID_BYTES}", len(documents))
    order = np.argsort(names)
    names = names[order]
    first = 0
    for number in range(len(stored.sidecars)):
        ids = stored.table(number).column("id").to_pylist()
        digests = np.array([_digest(name) for name in ids], dtype=names.dtype)
        places = np.minimum(np.searchsorted(names, digests), len(names) - 1)
        same = names[places] == digests
        at[order[places[same]]] = first + np.flatnonzero(same)
        first += len(ids)
    return at


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=ID_BYTES).digest()


def _table(
    file: Path | None, shape: tuple[int, int], dtype: type[np.floating], block: Callable[[range], np.ndarray]
) -> np.ndarray | VectorReader:
    """All blocks one after the other: in a file, or in memory where there is none."""
    count = shape[0]
    starts = range(0, count, ENCODED_AT_ONCE)
    if file is None:
        return np.concatenate([block(range(start, min(start + ENCODED_AT_ONCE, count))).astype(dtype) for start in starts])
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            VectorFile(file, shape, dtype, resume=True) as out,
            Progress(count, f"vectors for mining ({file.stem})", unit="text", initial=out.rows) as progress,
        ):
            for start in range(out.rows, count, ENCODED_AT_ONCE):
                rows = range(start, min(start + ENCODED_AT_ONCE, count))
                out.append(block(rows))
                progress.advance(len(rows))
    return VectorReader(file)
