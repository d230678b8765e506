"""Release and Retriever: a model and the index that belongs to it, together; what search and serving use."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ullme.artifacts import ArtifactRef, Store
from ullme.errors import ArtifactError, ContractError

if TYPE_CHECKING:
    from indexes.index import Index
    from ullme.data import Dataset
    from ullme.encoder import Encoder
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
    """One answer. rank starts at 1; score is the cosine of query and passage; excerpt is its beginning, for reading.

    id: of the document; what follows is that of its best passage, where it was cut into some, else of the document itself.
    passage: id of that passage. section: where in the document it stands. passages: how many of the document's passages were
    among those that were looked at.
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


class Retriever:
    """Texts in, documents out. Opens nothing that is damaged, nor a model and an index that do not belong together."""

    def __init__(self, encoder: Encoder, index: Index, dataset: Dataset) -> None:
        """Use `Retriever.open`."""
        self.encoder, self.index, self._dataset = encoder, index, dataset
        self._documents = {document.id: document for document in dataset.documents()}
        self._in_passages = any(document.parent for document in self._documents.values())
        missing = next((name for name in index.ids if name not in self._documents), None)
        if missing is not None:
            raise ContractError(
                f"the index holds '{missing}', which is not a document of {dataset.path}: it was built from other data; "
                "encode and build again"
            )

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
        return cls(encoder, index, Dataset.open(paths["data"]))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Float32[Q D] of query texts, unit norm."""
        return self.encoder.encode(texts, prompt="query", dataset=self._dataset.name)

    def search(self, texts: Sequence[str], k: int = 5) -> list[list[Hit]]:
        """The k best documents of each text, best first; fewer where the corpus has fewer.

        A document that was cut into passages is found by its best one.

        Raises:
            ContractError: k < 1.
        """
        if not texts:
            return []
        vectors = self.embed(texts)
        hits: list[list[Hit]] = [[] for _ in texts]
        wanting, reach = list(range(len(texts))), k
        while wanting:
            found = self.index.search(vectors[wanting], reach)
            for place, rows, scores in zip(wanting, found.rows, found.scores, strict=True):
                hits[place] = self._hits(rows, scores)
            if not self._in_passages or reach >= self.index.count:
                break
            wanting = [place for place in wanting if len(hits[place]) < k]
            reach = min(2 * reach, self.index.count)
        return [of_text[:k] for of_text in hits]

    def _hits(self, rows: Any, scores: Any) -> list[Hit]:
        """One hit for each document that the rows belong to, in the order of their best passages."""
        best: dict[str, tuple[Document, float]] = {}
        seen: Counter[str] = Counter()
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if row < 0:
                break
            document = self._documents[str(self.index.ids[row])]
            name = document.parent or document.id
            best.setdefault(name, (document, score))
            seen[name] += 1
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
