"""Release and Retriever: a model and the index that belongs to it, together; what search and serving use."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ullme.artifacts import ArtifactRef, Store
from ullme.errors import ArtifactError, ContractError
from ullme.filters import Filter
from ullme.neighbours import MISSING_ROW
from ullme.reranking import Reranker, fused, fused_depth

if TYPE_CHECKING:
    from indexes.index import Index
    from ullme.data import Dataset
    from ullme.encoder import Encoder
    from ullme.lexical import BM25Searcher
    from ullme.records import Document

__all__ = ["Hit", "Release", "Retriever"]

EXCERPT_CHARACTERS = 240


class Release(BaseModel):
    """What is released together, by reference: no bytes are copied.

    reports: the measurements by system (`tuned`, `base`, `bm25`).
    """

    model_config = ConfigDict(frozen=True)

    model: ArtifactRef
    index: ArtifactRef
    data: ArtifactRef
    reports: Mapping[str, ArtifactRef] = {}

    @property
    def digests(self) -> dict[str, str]:
        """What tells one release from another."""
        return {"model_digest": self.model.digest, "index_digest": self.index.digest, "data_digest": self.data.digest}

    def bare(self) -> Release:
        """The same without the counts for people."""

        def plain(ref: ArtifactRef) -> ArtifactRef:
            return ref.model_copy(update={"meta": {}})

        reports = {name: plain(ref) for name, ref in self.reports.items()}
        return Release(model=plain(self.model), index=plain(self.index), data=plain(self.data), reports=reports)

    @classmethod
    def read(cls, file: Path | str) -> Release:
        """The release that a JSON file describes.

        Raises:
            ArtifactError: not there, or not a release.
        """
        try:
            return cls.model_validate_json(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{file}: expected the JSON of a release ({str(error).splitlines()[0]})") from error


class Hit(BaseModel):
    """One answer. rank starts at 1; score is what the answers are ordered by: the cosine of query and passage, of a hybrid search
    the fused ranks, of a reranked one the reranker's; excerpt is its beginning, for reading.

    id: of the document; what follows is that of its best passage, where it was cut into some, else of the document itself.
    passage: id of that passage. section: where in the document it stands. passages: how many of the document's passages were
    among those that were looked at. metadata: of the document.
    """

    model_config = ConfigDict(frozen=True)

    rank: int
    score: float
    id: str
    title: str
    text: str
    excerpt: str
    passage: str
    section: str
    passages: int
    metadata: Mapping[str, Any] = {}


class Retriever:
    """Texts in, documents out. Opens nothing that is damaged, nor a model and an index that do not belong together."""

    def __init__(self, encoder: Encoder, index: Index, dataset: Dataset, words: Callable[[], BM25Searcher]) -> None:
        """Use `Retriever.open`. words: opens BM25 over the data set's corpus."""
        self.encoder, self.index, self._dataset, self._open_words = encoder, index, dataset, words
        self.seconds: dict[str, float] = {}
        corpus = dataset.corpus()
        places = corpus.places(set(index.ids))
        missing = next((name for name in index.ids if name not in places), None)
        if missing is not None:
            raise ContractError(
                f"the index holds '{missing}', which is not a document of {dataset.path}: it was built from other data; "
                "encode and build again"
            )
        self._places = np.array([places[name] for name in index.ids], dtype=np.int64)  # of the index's rows in the corpus
        self._rows = corpus.take(self._places)
        self._in_passages = any(parent for (parent,) in corpus.walk("parent"))

    @classmethod
    def open(cls, release: Release, *, device: str = "auto") -> Retriever:
        """Open what was released, after verifying every file of it.

        Raises:
            ArtifactError: something is missing, damaged, or not what was released.
            ContractError: the index was not built with this model, or not from this data.
        """
        from indexes.index import Index
        from ullme.data import Dataset
        from ullme.encoder import Encoder
        from ullme.words import words_of

        paths = {}
        for kind in ("index", "data", "model"):
            ref: ArtifactRef = getattr(release, kind)
            paths[kind] = Store(ref.path.parent.parent).open(ref, kind)
        index = Index.open(paths["index"], fingerprint=release.model.digest)
        encoder = Encoder.load(paths["model"], device=device)
        if encoder.dim != index.dim:
            raise ContractError(
                f"the model gives vectors of dim {encoder.dim}, the index holds dim {index.dim}: they do not belong together"
            )
        store = Store(release.data.path.parent.parent)
        return cls(encoder, index, Dataset.open(paths["data"]), lambda: words_of(store, release.data))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Float32[Q D] of query texts, unit norm."""
        return self.encoder.encode(texts, prompt="query", dataset=self._dataset.name)

    def search(
        self,
        texts: Sequence[str],
        k: int = 5,
        *,
        where: Mapping[str, Any] | Sequence[str] | Filter | None = None,
        hybrid: bool = False,
        rerank: Reranker | None = None,
    ) -> list[list[Hit]]:
        """The k best documents of each text, best first; fewer where there are fewer.

        A document that was cut into passages is found by its best one. `seconds` then says how long each part took.

        Args:
            texts: the questions.
            k: documents for each, >= 1.
            where: conditions on the documents' metadata, such as {"year": {"min": 2020}} (see `ullme.filters`).
            hybrid: put the model's ranking and that of BM25 together, by reciprocal-rank fusion.
            rerank: read the best of them once more, each together with its question.

        Raises:
            ContractError: k < 1. ConfigError: a filter that does not fit the documents; a reranker that cannot be had.
        """
        if k < 1:
            raise ContractError(f"search: expected k >= 1, got {k}")
        self.seconds = {}
        if not texts:
            return []
        among = self._allowed(where)
        started = time.perf_counter()
        vectors = self.embed(texts)
        self.seconds["encode"] = time.perf_counter() - started
        wanted = max(k, rerank.depth) if rerank else k
        started = time.perf_counter()
        rankings = self._hybrid(texts, vectors, wanted, among) if hybrid else self._nearest(vectors, wanted, among)
        self.seconds["search"] = time.perf_counter() - started
        if rerank:
            started = time.perf_counter()
            rankings = self._reranked(rerank, texts, rankings)
            self.seconds["rerank"] = time.perf_counter() - started
        return [self._hits(ranking)[:k] for ranking in rankings]

    @cached_property
    def _words(self) -> BM25Searcher:
        """BM25 over the corpus, opened when it is first asked for."""
        return self._open_words()

    @cached_property
    def _index_rows(self) -> np.ndarray:
        """Int64[M]: the index's row of each row of the corpus; -1 = none."""
        rows = np.full(self._words.count, MISSING_ROW, dtype=np.int64)
        rows[self._places] = np.arange(len(self._places))
        return rows

    def _lexical(self, texts: Sequence[str], k: int, among: np.ndarray | None) -> list[list[int]]:
        """The best rows of the index for each text by BM25, best first."""
        if among is not None or len(self._places) < self._words.count:
            among = np.sort(self._places if among is None else self._places[among])
        found = self._words.search(texts, k, among=among).rows
        return [self._index_rows[of[of != MISSING_ROW]].tolist() for of in found]

    def _allowed(self, where: Mapping[str, Any] | Sequence[str] | Filter | None) -> np.ndarray | None:
        """Int64[n]: the rows that a filter leaves; None = all."""
        conditions = Filter.of(where)
        return conditions.rows([document.metadata for document in self._rows]) if conditions.conditions else None

    def _nearest(self, vectors: np.ndarray, k: int, among: np.ndarray | None) -> list[list[tuple[int, float]]]:
        """(row, cosine) of the nearest passages of each query: enough for k documents, if there are as many."""
        found: list[list[tuple[int, float]]] = [[] for _ in vectors]
        wanting, reach = list(range(len(vectors))), k
        most = self.index.count if among is None else len(among)
        while wanting:
            near = self.index.search(vectors[wanting], reach, among=among)
            for place, rows, scores in zip(wanting, near.rows.tolist(), near.scores.tolist(), strict=True):
                found[place] = [(row, score) for row, score in zip(rows, scores, strict=True) if row != MISSING_ROW]
            if not self._in_passages or reach >= most:
                break
            wanting = [place for place in wanting if len({self._document_of(row) for row, _ in found[place]}) < k]
            reach = min(2 * reach, most)
        return found

    def _hybrid(self, texts: Sequence[str], vectors: np.ndarray, k: int, among: np.ndarray | None) -> list[list[tuple[int, float]]]:
        """(row, fused score): passages that the model or BM25 ranks high."""
        depth = fused_depth(k)
        dense = self._nearest(vectors, depth, among)
        words = self._lexical(texts, depth, among)
        return [fused([[row for row, _ in ranking], rows]) for ranking, rows in zip(dense, words, strict=True)]

    def _reranked(
        self, rerank: Reranker, texts: Sequence[str], rankings: Sequence[Sequence[tuple[int, float]]]
    ) -> list[list[tuple[int, float]]]:
        """(row, the reranker's score) of the best passages; the others are left out."""
        best = [[row for row, _ in ranking[: rerank.depth]] for ranking in rankings]
        scores = rerank.scores(self.encoder, texts, [[self._rows[row].content for row in rows] for rows in best])
        return [
            [(rows[place], float(of[place])) for place in np.argsort(-of, kind="stable")]
            for rows, of in zip(best, scores, strict=True)
        ]

    def _document_of(self, row: int) -> str:
        document = self._rows[row]
        return document.parent or document.id

    def _hits(self, ranking: Sequence[tuple[int, float]]) -> list[Hit]:
        """One hit for each document that the passages belong to, in the order of their best ones."""
        best: dict[str, tuple[Document, float]] = {}
        found = [(self._rows[row], score) for row, score in ranking]
        seen = Counter(document.parent or document.id for document, _ in found)
        for document, score in found:
            best.setdefault(document.parent or document.id, (document, score))
        return [
            Hit(
                rank=rank,
                score=score,
                id=name,
                title=document.title,
                text=document.text,
                excerpt=excerpt(document.text),
                passage=document.id,
                section=document.section,
                passages=seen[name],
                metadata=document.metadata,
            )
            for rank, (name, (document, score)) in enumerate(best.items(), start=1)
        ]


def excerpt(text: str) -> str:
    """The first lines of a text that have something on them, at most 240 characters, its indentation kept but not its margin."""
    lines = [line.rstrip() for line in textwrap.dedent(text).splitlines() if line.strip()]
    short = "\n".join(lines)
    if len(short) <= EXCERPT_CHARACTERS:
        return short
    cut = short[:EXCERPT_CHARACTERS]
    return cut[: max(cut.rfind("\n"), cut.rfind(" "), EXCERPT_CHARACTERS // 2)].rstrip() + " ..."
