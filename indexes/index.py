"""Build an index of unit vectors, and search it. faiss is called here and in `_faiss.py` only.

    index.faiss    vectors and search structure as faiss writes them, search parameters included
    ids.arrow      one column `id`: the document of each row (faiss knows only row numbers)
    vectors.npy    with `refine`: the vectors themselves, mapped into memory, to compare the best candidates once more
    index.json     metric, dim, count, fingerprint of the model, kind and its fields, sha256 of the files above

The same vectors in the same order and the same seed give the same bytes, however they are cut into shards and however
many threads run: rows are added in blocks of fixed size, and the HNSW builder of faiss >= 1.15 is deterministic.
Indexes are always built and written on the CPU; `Index.open(..., device="gpu")` searches a copy on the GPU.
"""

from __future__ import annotations

import json
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from indexes._corpus import (
    BLOCK_ROWS,
    Corpus,
    Shards,
    read_ids,
    read_vectors,
    rescored,
    write_ids,
    write_vectors,
)
from indexes._exam import Exam
from indexes._faiss import gpu_copy, last_line, load_faiss, read_index, selecting, set_parameters, stored_vectors, write_index
from ullme.artifacts import Inputs, sha256_file, write_atomic
from ullme.components import Component, resolve
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.neighbours import MISSING_ROW, ExactSearcher, Neighbours

__all__ = ["CODE_BYTES", "CODE_NAMES", "Codes", "Index", "IndexKind", "Refine", "Shards", "build", "range_training_points", "space"]

log = logging.getLogger(__name__)

FORMAT = 1
METRIC = "inner_product"
INDEX_FILE, IDS_FILE, VECTORS_FILE, CARD_FILE = "index.faiss", "ids.arrow", "vectors.npy", "index.json"
GPU_K_LIMIT = 2_048
MOST_SEARCHED = 4_096
EXACT_AMONG = 10_000
"""Of fewer rows all are compared when a search is among some only."""
UNIT = 1e-3
POINTS_PER_CENTROID = 32  # fewer than any kind learns from
CARD_BYTES, PER_VECTOR_SLACK = 4_000, 1.1

Codes = Literal["fp32", "fp16", "int8"]
"""How the components of a vector are stored; int8 learns a range per component from a sample."""
CODE_NAMES: dict[Codes, str] = {"fp32": "Flat", "fp16": "SQfp16", "int8": "SQ8"}
CODE_BYTES: dict[Codes, int] = {"fp32": 4, "fp16": 2, "int8": 1}


Refine = Literal["fp32", "fp16"]
"""How vectors are kept beside a coarser index, to compare the best candidates once more."""


def range_training_points(codes: Codes, count: int) -> int:
    """Vectors that int8 codes learn the range of each component from; the other codes learn nothing."""
    return min(count, BLOCK_ROWS) if codes == "int8" else 0


class IndexKind(Component):
    """A kind of index: its fields, and how they read as a faiss factory string and named parameters.

    A kind is one file beside this one with one subclass; nothing here has to change for it. Parameters are set by the
    names that `faiss.ParameterSpace` knows (`efConstruction`, `efSearch`, `nprobe`, `k_factor_rf`, ...).
    """

    refine: Refine | None = Field(
        default=None, description="vectors kept to compare the best candidates once more: fp32, fp16 or none"
    )
    k_factor: int = Field(default=4, ge=2, description="candidates compared once more, for each result that is wanted; with refine")
    min_recall: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the true 10 nearest that a search must find: how much is searched follows from it",
    )

    def chosen(self, count: int, dim: int) -> IndexKind:
        """What is built of so many vectors: this kind, unless it stands for others."""
        del count, dim
        return self

    @property
    def knob(self) -> str:
        """The field that a better recall is bought with by searching more; empty = there is none."""
        return ""

    @abstractmethod
    def factory(self, count: int, dim: int) -> str:
        """The faiss factory string for `count` vectors of `dim` components; valid for every count >= 1."""

    @abstractmethod
    def bytes_per_vector(self, dim: int) -> float:
        """Expected bytes of one vector in the file and in memory, without `refine` and what does not grow with the corpus."""

    def training_points(self, count: int) -> int:
        """How many of `count` vectors to learn from, drawn uniformly; 0 = this kind learns nothing."""
        del count
        return 0

    def build_parameters(self) -> Mapping[str, float]:
        """Parameters by name that are set before vectors are added."""
        return {}

    def search_parameters(self) -> Mapping[str, float]:
        """Parameters by name that travel with the saved index."""
        return {}

    @property
    def gpu_search(self) -> bool:
        """Whether faiss can search a copy of this index on a GPU."""
        return False

    def reading_bytes(self, count: int, dim: int) -> int:
        """What faiss reckons with, beside the file, when it reads an index of this kind."""
        del count, dim
        return 0

    def all_bytes_per_vector(self, dim: int) -> float:
        """Expected bytes of one vector, `refine` included."""
        return self.bytes_per_vector(dim) + (CODE_BYTES[self.refine] * dim if self.refine else 0)


class Index:
    """A built index, opened for search: a `Searcher` over the documents `ids`."""

    def __init__(
        self,
        card: Mapping[str, Any],
        ids: Sequence[str],
        kind: IndexKind,
        indexes: tuple[Any, Any],
        vectors: np.ndarray | None = None,
    ) -> None:
        """Use `Index.open`. indexes: the faiss index on the CPU, and its copy on the GPU or None; vectors: those of `refine`."""
        self._card, self._ids, self._kind = card, ids, kind
        self._cpu, self._gpu = indexes
        self._vectors = vectors

    @classmethod
    def open(cls, path: Path | str, *, fingerprint: str | None = None, device: Literal["auto", "cpu", "gpu"] = "cpu") -> Index:
        """Open the directory that `build` wrote, after checking sha256 of its files.

        On the CPU the file is mapped into memory, so several processes share it and opening takes no copy.

        Args:
            path: the directory.
            fingerprint: of the model that will encode the queries; None = do not compare.
            device: "gpu" searches a copy on every GPU; "auto" does so when faiss and the kind can.

        Raises:
            ArtifactError: a file is missing, damaged, or not of this index.
            ContractError: the index was built with another model.
            ConfigError: faiss is missing, installed twice, or cannot use the device that was asked for.
        """
        path = Path(path)
        card, kind = _read_card(path)
        if fingerprint is not None and fingerprint != card["fingerprint"]:
            raise ContractError(
                f"{path}: index was built with model {card['fingerprint'][:12]}, queries come from model {fingerprint[:12]}: "
                "encode and build again, or open the model that belongs to it"
            )
        for name in card["files"]:
            file = path / name
            if not file.is_file():
                raise ArtifactError(f"{path}: {name} is missing; build the index again")
            if sha256_file(file) != card["files"][name]:
                raise ArtifactError(
                    f"{path}: {name} is damaged or belongs to another index (its sha256 differs from {CARD_FILE}); build it again"
                )
        faiss = load_faiss()
        ids = read_ids(path / IDS_FILE)
        index = read_index(faiss, path / INDEX_FILE, kind.reading_bytes(card["count"], card["dim"]))
        if (index.ntotal, index.d, len(ids)) != (card["count"], card["dim"], card["count"]):
            raise ArtifactError(
                f"{path}: {CARD_FILE} says {card['count']} vectors of dim {card['dim']}, {INDEX_FILE} holds {index.ntotal} of dim "
                f"{index.d} and {IDS_FILE} {len(ids)} ids; build the index again"
            )
        vectors = read_vectors(path / VECTORS_FILE) if kind.refine else None
        if vectors is not None and vectors.shape != (card["count"], card["dim"]):
            raise ArtifactError(f"{path}: {VECTORS_FILE} is not of this index; build it again")
        return cls(card, ids, kind, (index, gpu_copy(faiss, index, kind, device)), vectors)

    @property
    def ids(self) -> Sequence[str]:
        """Document ids; `Neighbours.rows` are positions in it."""
        return self._ids

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._card["dim"]

    @property
    def count(self) -> int:
        """Indexed documents."""
        return self._card["count"]

    @property
    def metric(self) -> str:
        """`inner_product`: the cosine, since documents are unit vectors."""
        return self._card["metric"]

    @property
    def fingerprint(self) -> str:
        """Digest of the model that encoded the documents; only its queries have a meaning here."""
        return self._card["fingerprint"]

    @property
    def kind(self) -> IndexKind:
        """The kind and the fields it was built with."""
        return self._kind

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        where = "cpu" if self._gpu is None else "gpu"
        return f"Index({self._card['factory']}, {self.count:,} x {self.dim}, model {self.fingerprint[:12]}, {where})"

    def search(self, vectors: np.ndarray, k: int, *, among: np.ndarray | None = None) -> Neighbours:
        """The k nearest documents of each query.

        Args:
            vectors: Float[Q D], finite; Q may be 0.
            k: how many to return, >= 1. Places beyond what was found hold row -1 and score -inf.
            among: Int64[n], the rows that may be found, ascending and distinct; None = all.

        Raises:
            ContractError: another shape or dim, a query that is not finite, k < 1, or rows that are not there.
        """
        queries = np.asarray(vectors)
        if queries.ndim != 2 or queries.shape[1] != self.dim or queries.dtype.kind not in "fiu":
            raise ContractError(f"Index.search: expected [Q {self.dim}] numbers, got {list(queries.shape)} of {queries.dtype}")
        if k < 1:
            raise ContractError(f"Index.search: expected k >= 1, got {k}")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(bad):
            raise ContractError(
                f"Index.search: query {bad[0]} holds NaN or infinity ({len(bad)} of {len(queries)} do); encode it again"
            )
        if among is not None and len(among) and not (among[0] >= 0 and among[-1] < self.count and (np.diff(among) > 0).all()):
            raise ContractError(f"Index.search: expected ascending rows from 0 to {self.count - 1} to search among")
        rows = np.full((len(queries), k), MISSING_ROW, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        reach = min(k, self.count if among is None else len(among))
        if len(queries) and reach:
            if among is not None and len(among) <= EXACT_AMONG:
                found, places = self._compared(queries, reach, among)
            else:
                found, places = self._searched(queries, reach, among)
            rows[:, :reach] = places
            scores[:, :reach] = np.where(places == MISSING_ROW, -np.inf, found)
        return Neighbours(rows, scores)

    def _searched(self, queries: np.ndarray, reach: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(Float32[Q reach] scores, Int64[Q reach] rows), as the kind searches."""
        most = self.count if among is None else len(among)
        wide = reach if self._vectors is None else min(most, reach * self._kind.k_factor)
        index = self._cpu if self._gpu is None or wide > GPU_K_LIMIT or among is not None else self._gpu
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        scale = np.where((norms == 0) | (np.abs(norms - 1) < UNIT), 1, norms)  # some codes rank by more than the direction
        only = {} if among is None else {"params": selecting(index, among)}
        found, places = index.search(queries / scale, wide, **only)
        if self._vectors is not None:
            return rescored(self._vectors, queries, places, reach)
        return found * scale, places

    def _compared(self, queries: np.ndarray, reach: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same by comparing with each of some rows."""
        kept = stored_vectors(self._cpu, among) if self._vectors is None else self._vectors[among]
        nearest = ExactSearcher(kept, range(len(among))).search(queries, reach)  # type: ignore[arg-type]
        return nearest.scores, among[nearest.rows]


def build(
    kind: IndexKind, shards: Shards, *, out: Path, fingerprint: str, seed: int, queries: np.ndarray | None = None
) -> dict[str, Any]:
    """Build the index of a corpus of unit vectors and write it to the directory `out`.

    The corpus is walked up to four times (check, sample, add, compare with exact search); never more than one block of
    rows and the training sample are held in memory beside the index itself.

    Args:
        kind: what to build.
        shards: `open_embeddings(path).shards`, or any function like it.
        out: existing directory; files of an earlier attempt are replaced.
        fingerprint: digest of the model that made the vectors.
        seed: of the training sample, k-means and the queries of the self-check.
        queries: Float[Q D], what people may ask: the index is measured and tuned with it. None, or few: with the corpus's own
            vectors, which are easier to find.

    Returns:
        count, dim, kind, factory, bytes, bytes_per_vector, build_seconds, exam (`queries` or `documents`: what was searched for),
        recall_at_10 and recall_at_100 (the share of the true nearest documents that it finds; ties count as found), and the
        milliseconds of a search for 10, one query at a time and 32: p50_ms, p99_ms, p50_ms_of_32, p99_ms_of_32.

    Raises:
        ContractError: no vectors; not finite, zero or not of unit norm; dims differ; ids repeat or do not match.
        ConfigError: faiss is missing or installed twice.
    """
    faiss = load_faiss()
    corpus = Corpus(shards)
    count, dim = corpus.count, corpus.dim
    kind = kind.chosen(count, dim)
    factory = kind.factory(count, dim)
    expected = kind.all_bytes_per_vector(dim)
    log.info(
        "index %s (%s): %s x %d, about %s bytes per vector, %.1f MiB in all",
        kind.kind, factory, f"{count:,}", dim, f"{expected:,.0f}", count * expected / 2**20,
    )  # fmt: skip
    started = time.monotonic()
    index = _train(faiss, kind, factory, corpus, seed)
    for block in corpus.blocks():
        index.add(block)
    write_ids(corpus.ids, out / IDS_FILE)
    names, vectors = [INDEX_FILE, IDS_FILE], None
    if kind.refine:
        names.append(VECTORS_FILE)
        write_vectors(corpus, out / VECTORS_FILE, bytes_each=CODE_BYTES[kind.refine])
        vectors = read_vectors(out / VECTORS_FILE)
    seconds = time.monotonic() - started
    exam = Exam.of(corpus, seed, queries)

    def opened(kind: IndexKind) -> Index:
        set_parameters(faiss, index, kind.search_parameters())
        return Index({"count": count, "dim": dim}, corpus.ids, kind, (index, None), vectors)

    kind = _tuned(kind, opened, exam)
    measured = exam.measure(opened(kind))
    write_index(faiss, index, out / INDEX_FILE)
    size = sum((out / name).stat().st_size for name in names if name != IDS_FILE)
    card = {
        "format": FORMAT,
        "metric": METRIC,
        "dim": dim,
        "count": count,
        "fingerprint": fingerprint,
        "kind": kind.model_dump(mode="json"),
        "factory": factory,
        "bytes_per_vector": round(size / count, 1),
        "seed": seed,
        "files": {name: sha256_file(out / name) for name in names},
    }
    write_atomic(out / CARD_FILE, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False))
    log.info(
        "index %s: recall@10 %.3f and @100 %.3f for %d %s, against exact search; %.2f ms a query (%.2f ms at the 99th percentile)",
        *(
            kind.kind,
            measured["recall_at_10"],
            measured["recall_at_100"],
            len(exam.queries),
            exam.of_what,
            measured["p50_ms"],
            measured["p99_ms"],
        ),
    )
    if kind.min_recall is not None and measured["recall_at_10"] < kind.min_recall:
        log.warning(
            "index %s: recall@10 is %.3f, and min_recall %g was asked for; another kind, refine or more memory would reach it",
            *(kind.kind, measured["recall_at_10"], kind.min_recall),
        )
    return {
        "count": count,
        "dim": dim,
        "kind": kind.kind,
        "factory": factory,
        "bytes": size,
        "bytes_per_vector": card["bytes_per_vector"],
        "build_seconds": round(seconds, 2),
        "exam": exam.of_what,
        **measured,
    }


def _tuned(kind: IndexKind, opened: Callable[[IndexKind], Index], exam: Exam) -> IndexKind:
    """The kind that searches no more than `min_recall` takes, on one half of the exam's queries; itself where nothing is asked."""
    if kind.min_recall is None or not kind.knob:
        return kind
    value = 1
    while True:
        candidate = kind.model_copy(update={kind.knob: value})
        reached = exam.sure_recall(opened(candidate))
        if reached >= kind.min_recall or value >= MOST_SEARCHED:
            log.info("index %s: %s %d, where recall@10 is %.3f or more", kind.kind, kind.knob, value, reached)
            return candidate
        value *= 2


def space(kind: IndexKind, inputs: Inputs) -> int:
    """Bytes of the index of `embeddings` at most: codes and links, what the kind learns (centroids, ranges), and the ids."""
    count, dim = inputs.ref("embeddings").meta["count"], inputs.ref("embeddings").meta["dim"]
    kind = kind.chosen(count, dim)
    ids = sum(size for name, size in inputs.sizes("embeddings").items() if name.endswith(".arrow"))
    learned = 4 * dim * (2 + kind.training_points(count) // POINTS_PER_CENTROID)
    return int(PER_VECTOR_SLACK * count * kind.all_bytes_per_vector(dim)) + learned + ids + CARD_BYTES


def _train(faiss: Any, kind: IndexKind, factory: str, corpus: Corpus, seed: int) -> Any:
    """An empty faiss index, trained where the kind asks for it."""
    count, dim = corpus.count, corpus.dim
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ContractError(f"index {kind.kind}: faiss does not accept '{factory}' for dim {dim} ({last_line(error)})") from error
    set_parameters(faiss, index, kind.build_parameters())
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.cp.seed = seed % 2**31
        inverted.cp.min_points_per_centroid = 1  # the kind already keeps lists few enough; faiss would print to stdout
    points = min(count, kind.training_points(count))
    if points:
        log.info("index %s: learning from %s of %s vectors", kind.kind, f"{points:,}", f"{count:,}")
        chosen = np.sort(np.random.default_rng(seed).choice(count, size=points, replace=False))
        index.train(corpus.gather(chosen))
    if not index.is_trained:
        raise ContractError(f"index {kind.kind}: '{factory}' has to be trained, but training_points() is 0")
    return index


def _read_card(path: Path) -> tuple[dict[str, Any], IndexKind]:
    file = path / CARD_FILE
    if not file.is_file():
        raise ArtifactError(f"{path}: no {CARD_FILE} there, so it is not an index or was never finished; build it again")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if card["format"] != FORMAT or card["metric"] != METRIC:
            raise ValueError(
                f"format {card['format']} with metric {card['metric']}, this version reads format {FORMAT} with {METRIC}"
            )
        kind = resolve("indexes", card["kind"])
        if not isinstance(kind, IndexKind):
            raise ValueError(f"'{kind.kind}' is not a kind of index")
        files = {INDEX_FILE, IDS_FILE, *([VECTORS_FILE] if kind.refine else [])}
        if not {"dim", "count", "fingerprint", "factory"} <= card.keys() or files != card["files"].keys():
            raise ValueError("a field is missing")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        reason = f"{error.error_count()} fields of its kind do not fit" if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: {CARD_FILE} is not one that this version wrote ({reason}); build the index again") from error
    return card, kind
