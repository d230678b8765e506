"""Build an index of unit vectors, or go on with an earlier one, then measure it.

A build is cut into segments where `max_memory_gb` asks for it; each is learned once, filled block by block, and written before the
next begins. An earlier index of the same kind and model is gone on with while little of it is stale: its files are taken as they
are, rows whose document is gone or has another vector are marked as deleted, and what is new makes a segment of its own.

Built anew on a CPU, the same vectors in the same order and the same seed give the same bytes, however they are cut into shards and
however many threads run: rows are added in blocks of fixed size, and the HNSW builder of faiss >= 1.15 is deterministic. Centroids
from a GPU are others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexes._budget import Budget
from indexes._centroids import found_device, learned, nearest_centroids
from indexes._corpus import Corpus, Shards
from indexes._exam import Exam
from indexes._faiss import add_to_lists, last_line, load_faiss, read_index, set_parameters, write_index
from indexes._rows import Rows
from indexes._segments import Segment, file_names
from indexes.index import CARD_FILE, FORMAT, IDS_FILE, METRIC, TRAINED_FILE, Index, open_segments, read_card
from indexes.kind import CODE_BYTES, IndexKind
from ullme.artifacts import Inputs, sha256_file, write_atomic
from ullme.errors import ArtifactError, ContractError
from ullme.neighbours import MISSING_ROW, Neighbours, Searcher
from ullme.vector_file import VectorFile, VectorReader, read_vectors

__all__ = ["build", "found_device", "space"]

log = logging.getLogger(__name__)

MOST_SEARCHED, MOST_COMPARED = 4_096, 64
POINTS_PER_CENTROID = 32  # fewer than any kind learns from
CARD_BYTES, PER_VECTOR_SLACK = 4_000, 1.1


def build(
    kind: IndexKind,
    shards: Shards,
    *,
    out: Path,
    fingerprint: str,
    seed: int,
    queries: np.ndarray | None = None,
    earlier: Sequence[Path] = (),
    device: str | None = None,
) -> dict[str, Any]:
    """Build the index of a corpus of unit vectors and write it to the directory `out`.

    The corpus is walked up to four times (check, sample, add, compare with exact search); never more than a few blocks of rows and
    the training sample are held in memory beside the segment that is being filled.

    Args:
        kind: what to build.
        shards: `open_embeddings(path).shards`, or any function like it.
        out: existing directory; files of an earlier attempt are replaced.
        fingerprint: digest of the model that made the vectors.
        seed: of the training sample, k-means and the queries of the self-check.
        queries: Float[Q D], what people may ask: the index is measured and tuned with it. None, or few: with the corpus's own
            vectors, which are easier to find.
        earlier: directories of indexes that may be gone on with, the best first; what does not fit is passed over.
        device: where torch learns the centroids of inverted lists, finds the list of every vector and the true nearest of the
            queries; None = faiss and numpy do, on the CPU.

    Returns:
        count, dim, kind, factory, segments, bytes, bytes_per_vector, build_seconds, taken_over (rows of an earlier index), exam
        (`queries` or `documents`: what was searched for), recall_at_10 and recall_at_100 (the share of the true nearest documents
        that it finds; ties count as found), and the milliseconds of a search for 10, one query at a time and 32: p50_ms, p99_ms,
        p50_ms_of_32, p99_ms_of_32.

    Raises:
        ContractError: no vectors; not finite, zero or not of unit norm; dims differ; ids repeat or do not match.
        ConfigError: faiss is missing or installed twice; `max_memory_gb` is too little.
    """
    corpus = Corpus(shards, frugal=kind.max_memory_gb is not None)
    work = _Work(load_faiss(), kind, kind.chosen(corpus.count, corpus.dim), corpus, out, fingerprint, seed, device)
    exam = None
    for basis in (_basis(work, earlier), None):
        for file in (*out.glob("index*.faiss*"), *out.glob("vectors*.npy*"), out / TRAINED_FILE):
            file.unlink(missing_ok=True)
        started = time.monotonic()
        made = work.made(basis)
        seconds = time.monotonic() - started
        exam = exam or Exam.of(corpus, seed, queries, device=device or "cpu")
        tuned = _tuned(work.kind, lambda kind, made=made: work.searcher(made, kind), exam)
        measured = exam.measure(work.searcher(made, tuned))
        reached = tuned.min_recall is None or measured["recall_at_10"] >= tuned.min_recall
        if basis is None or reached:
            break
        log.info("index %s: built anew, since recall@10 fell to %.3f", tuned.kind, measured["recall_at_10"])
    size = work.write(made, tuned)
    log.info(
        "index %s: recall@10 %.3f and @100 %.3f for %d %s, against exact search; %.2f ms a query (%.2f ms at the 99th percentile)",
        tuned.kind, measured["recall_at_10"], measured["recall_at_100"], len(exam.queries), exam.of_what, measured["p50_ms"],
        measured["p99_ms"],
    )  # fmt: skip
    if not reached:
        log.warning(
            "index %s: recall@10 is %.3f, and min_recall %g was asked for; another kind, refine or more memory would reach it",
            *(tuned.kind, measured["recall_at_10"], tuned.min_recall),
        )
    return {
        "count": corpus.count,
        "dim": corpus.dim,
        "kind": tuned.kind,
        "factory": work.factory,
        "segments": len(made.segments),
        "bytes": size,
        "bytes_per_vector": round(size / corpus.count, 1),
        "build_seconds": round(seconds, 2),
        "taken_over": made.basis.rows if made.basis else 0,
        "exam": exam.of_what,
        **measured,
    }


def space(kind: IndexKind, inputs: Inputs) -> int:
    """Bytes of the index of `embeddings` at most: codes and links, what the kind learns (centroids, ranges), and the ids."""
    count, dim = inputs.ref("embeddings").meta["count"], inputs.ref("embeddings").meta["dim"]
    kind = kind.chosen(count, dim)
    ids = sum(size for name, size in inputs.sizes("embeddings").items() if name.endswith(".arrow"))
    learned = 4 * dim * (2 + kind.training_points(count) // POINTS_PER_CENTROID)
    copies = 2 + Budget.most_files(kind, count, dim)
    return int(PER_VECTOR_SLACK * count * kind.all_bytes_per_vector(dim)) + copies * learned + ids + CARD_BYTES


@dataclass(frozen=True)
class _Basis:
    """An earlier index that is gone on with. alive: Bool[n] of the rows it was built of; added: Bool[N], the corpus's other rows.

    order: Int64[alive], the corpus row of each row that is alive.
    """

    path: Path
    card: dict[str, Any]
    ids: Sequence[str]
    digests: np.ndarray
    alive: np.ndarray
    added: np.ndarray
    order: np.ndarray

    @property
    def rows(self) -> int:
        """Rows that are taken over."""
        return int(self.alive.sum())

    @property
    def stale(self) -> float:
        """Share of the earlier rows that are deleted, or of all that were added."""
        return 1 - self.rows / max(len(self.alive), self.rows + int(self.added.sum()))


@dataclass(frozen=True)
class _Made:
    """Segments, the last of which may not be written yet, and the table of their rows. built: segments of the first build."""

    segments: list[Segment]
    rows: Rows
    built: int
    basis: _Basis | None


@dataclass
class _Work:
    """A build. asked: the kind as configured; kind: what it stands for with so many vectors.

    Attributes: factory, and first_rows, the vectors that it is meant for: of an earlier index, those that this one was built of.
    """

    faiss: Any
    asked: IndexKind
    kind: IndexKind
    corpus: Corpus
    out: Path
    fingerprint: str
    seed: int
    device: str | None

    def __post_init__(self) -> None:
        count, dim = self.corpus.count, self.corpus.dim
        self.factory = self.kind.factory(count, dim)
        self.first_rows = count
        expected = self.kind.all_bytes_per_vector(dim)
        log.info(
            "index %s (%s): %s x %d, about %s bytes per vector, %.1f MiB in all",
            *(self.kind.kind, self.factory, f"{count:,}", dim, f"{expected:,.0f}", count * expected / 2**20),
        )
        self.budget = Budget.of(self.kind, count, dim)

    def made(self, basis: _Basis | None) -> _Made:
        """Every segment, those of the earlier index first."""
        if basis is None:
            self.factory, self.first_rows = self.kind.factory(self.corpus.count, self.corpus.dim), self.corpus.count
            self._learn()
            segments = self._filled(0, self.corpus.count, self.corpus.blocks())
            return _Made(segments, Rows.of(self.corpus.ids, self.corpus.digests), len(segments), None)
        log.info(
            "index %s: %s of %s vectors are those of %s, %s are new, %s are gone",
            self.kind.kind, f"{basis.rows:,}", f"{self.corpus.count:,}", basis.path.name, f"{basis.added.sum():,}",
            f"{len(basis.alive) - basis.rows:,}",
        )  # fmt: skip
        self.factory, self.first_rows = basis.card["factory"], len(basis.alive)
        built = basis.card["built"]["segments"]
        for name in [name for number in range(built) for name in file_names(number)] + [TRAINED_FILE]:
            if name in basis.card["files"]:
                _link(basis.path / name, self.out / name)
        segments = open_segments(self.out, {**basis.card, "segments": built}, self.kind)
        new = np.flatnonzero(basis.added)
        segments += self._filled(built, len(new), self.corpus.blocks(basis.added)) if len(new) else []
        rows = Rows(
            [*basis.ids, *(self.corpus.ids[row] for row in new.tolist())],
            np.concatenate([basis.digests, self.corpus.digests[new]]),
            np.concatenate([basis.alive, np.ones(len(new), dtype=bool)]),
        )
        return _Made(segments, rows, built, basis)

    def searcher(self, made: _Made, kind: IndexKind) -> Searcher:
        """What is examined: rows are those of the corpus, and no more of the files stays in memory than is allowed."""
        for segment in made.segments:
            segment.frugal = self.budget.frugal
            set_parameters(self.faiss, segment.index, kind.search_parameters())
        index = Index({"count": self.corpus.count, "dim": self.corpus.dim}, made.rows, kind, made.segments)
        if made.basis is None:
            return index
        return _Examined(index, np.concatenate([made.basis.order, np.flatnonzero(made.basis.added)]))

    def write(self, made: _Made, kind: IndexKind) -> int:
        """The last segment, the table of rows and the card; returns the bytes of what is searched."""
        last = len(made.segments) - 1
        if not (self.out / file_names(last)[0]).is_file():
            write_index(self.faiss, made.segments[last].index, self.out / file_names(last)[0])
        made.rows.write(self.out / IDS_FILE)
        names = [name for number in range(len(made.segments)) for name in file_names(number)[: 2 if kind.refine else 1]]
        size = sum((self.out / name).stat().st_size for name in names)
        learned = [TRAINED_FILE] if (self.out / TRAINED_FILE).is_file() else []
        card = {
            "format": FORMAT,
            "metric": METRIC,
            "dim": self.corpus.dim,
            "count": self.corpus.count,
            "rows": len(made.rows),
            "segments": len(made.segments),
            "built": {"segments": made.built, "rows": sum(map(len, made.segments[: made.built]))},
            "fingerprint": self.fingerprint,
            "kind": kind.model_dump(mode="json"),
            "asked": self.asked.model_dump(mode="json"),
            "factory": self.factory,
            "bytes_per_vector": round(size / self.corpus.count, 1),
            "seed": self.seed,
            "files": {name: sha256_file(self.out / name) for name in [*names, *learned, IDS_FILE]},
        }
        write_atomic(self.out / CARD_FILE, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False))
        return size

    def _learn(self) -> None:
        """Keep the index without a row, where the kind learns something."""
        kind, count = self.kind, self.corpus.count
        index = self._empty()
        inverted = self.faiss.try_extract_index_ivf(index)
        if inverted is not None:
            inverted.cp.seed = self.seed % 2**31
            inverted.cp.min_points_per_centroid = 1  # the kind already keeps lists few enough; faiss would print to stdout
        wanted = min(count, kind.training_points(count))
        points = min(wanted, self.budget.points)
        if points:
            less = f" (max_memory_gb leaves no room for {wanted:,})" if points < wanted else ""
            log.info("index %s: learning from %s of %s vectors%s", kind.kind, f"{points:,}", f"{count:,}", less)
            chosen = np.sort(np.random.default_rng(self.seed).choice(count, size=points, replace=False))
            sample = self.corpus.gather(chosen)
            if inverted is not None and self.device:
                inverted.quantizer.add(learned(sample, inverted.nlist, seed=self.seed, device=self.device))
            index.train(sample)  # faiss leaves centroids that are there as they are
        if not index.is_trained:
            raise ContractError(f"index {kind.kind}: '{self.factory}' has to be trained, but training_points() is 0")
        if points:
            write_index(self.faiss, index, self.out / TRAINED_FILE)

    def _empty(self) -> Any:
        dim = self.corpus.dim
        if (self.out / TRAINED_FILE).is_file():
            beside = self.kind.reading_bytes(self.first_rows, dim)
            index = read_index(self.faiss, self.out / TRAINED_FILE, beside, mapped=False)
        else:
            try:
                index = self.faiss.index_factory(dim, self.factory, self.faiss.METRIC_INNER_PRODUCT)
            except RuntimeError as error:
                said = f"faiss does not accept '{self.factory}' for dim {dim} ({last_line(error)})"
                raise ContractError(f"index {self.kind.kind}: {said}") from error
        set_parameters(self.faiss, index, self.kind.build_parameters())
        return index

    def _filled(self, first: int, rows: int, blocks: Iterator[np.ndarray]) -> list[Segment]:
        """Segments of so many rows; all but the last are written and mapped. first: number of the first."""
        counts = [min(self.budget.rows, rows - start) for start in range(0, rows, self.budget.rows)]
        if len(counts) > 1:
            log.info("index %s: %d files of %s vectors, for max_memory_gb", self.kind.kind, len(counts), f"{counts[0]:,}")
        made = []
        for number, count in enumerate(counts, start=first):
            name, beside = (self.out / name for name in file_names(number))
            index, vectors = self._empty(), None
            if self.kind.refine:
                dtype = np.float32 if CODE_BYTES[self.kind.refine] == 4 else np.float16
                vectors = VectorFile(beside, (count, self.corpus.dim), dtype)
            while index.ntotal < count:
                block = next(blocks)
                self._add(index, block)
                if vectors is not None:
                    vectors.append(block)
            if vectors is not None:
                vectors.close()
            if number + 1 < first + len(counts):
                write_index(self.faiss, index, name)
                index = read_index(self.faiss, name, self.kind.reading_bytes(self.first_rows, self.corpus.dim))
            made.append(Segment(index, None if vectors is None else (VectorReader if self.budget.frugal else read_vectors)(beside)))
        return made

    def _add(self, index: Any, block: np.ndarray) -> None:
        inverted = self.faiss.try_extract_index_ivf(index)
        if inverted is None or not self.device:
            index.add(block)
            return
        centroids = inverted.quantizer.reconstruct_n(0, inverted.nlist)
        add_to_lists(inverted, block, nearest_centroids(block, centroids, device=self.device))


@dataclass(frozen=True)
class _Examined:
    """An index whose rows are read as those of the corpus. order: Int64[n], the corpus row of each of its rows."""

    index: Index
    order: np.ndarray

    @property
    def ids(self) -> Sequence[str]:
        return self.index.ids

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        found = self.index.search(vectors, k)
        return Neighbours(np.where(found.rows == MISSING_ROW, MISSING_ROW, self.order[found.rows]), found.scores)


def _tuned(kind: IndexKind, opened: Callable[[IndexKind], Searcher], exam: Exam) -> IndexKind:
    """The kind that searches no more than `min_recall` takes, on one half of the exam's queries; itself where nothing is asked.

    First as many candidates are compared once more as it takes when as much as possible is searched, then less is searched.
    """
    goal = kind.min_recall
    if goal is None or not kind.knob:
        return kind

    def recall(searched: int) -> float:
        return exam.sure_recall(opened(kind.model_copy(update={kind.knob: searched})))

    while kind.refine and kind.k_factor < MOST_COMPARED and recall(MOST_SEARCHED) < goal:
        kind = kind.model_copy(update={"k_factor": min(MOST_COMPARED, 2 * kind.k_factor)})
    value = 1
    while (reached := recall(value)) < goal and value < MOST_SEARCHED:
        value *= 2
    compared = f" and k_factor {kind.k_factor}" if kind.refine else ""
    log.info("index %s: %s %d%s, where recall@10 is %.3f or more", kind.kind, kind.knob, value, compared, reached)
    return kind.model_copy(update={kind.knob: value})


def _basis(work: _Work, earlier: Sequence[Path]) -> _Basis | None:
    """The first of these indexes of which little enough is stale."""
    for path in earlier if work.kind.max_stale else ():
        try:
            basis = _read_basis(path, work)
        except ArtifactError as error:
            log.warning("index: nothing is taken over from a damaged one: %s", error)
            continue
        if basis is None:
            continue
        if basis.stale <= work.kind.max_stale:
            return basis
        log.info("index %s: built anew, %.0f%% of %s is stale (max_stale %g)", work.kind.kind, 100 * basis.stale, path.name,
                 work.kind.max_stale)  # fmt: skip
    return None


def _read_basis(path: Path, work: _Work) -> _Basis | None:
    """None where the index is of another model, kind, seed or format."""
    card, kind = read_card(path)
    alike = (card["fingerprint"], card["dim"], card["seed"]) == (work.fingerprint, work.corpus.dim, work.seed)
    if card["format"] != FORMAT or not alike or card["asked"] != work.asked.model_dump(mode="json"):
        return None
    tuned = {name: getattr(work.kind, name) for name in (work.kind.knob, "k_factor") if name}
    if kind.kind != work.kind.kind or kind.model_copy(update=tuned) != work.kind:
        return None
    for name, sha256 in card["files"].items():
        if not (path / name).is_file() or sha256_file(path / name) != sha256:
            raise ArtifactError(f"{path}: {name} is missing or damaged")
    rows, built = Rows.read(path / IDS_FILE), card["built"]["rows"]
    first = Rows(rows.ids[:built], rows.digests[:built], rows.alive[:built])
    places = first.places(work.corpus.ids, work.corpus.digests)
    added = places == MISSING_ROW
    order = np.full(built, MISSING_ROW, dtype=np.int64)
    order[places[~added]] = np.flatnonzero(~added)
    alive = order != MISSING_ROW
    return _Basis(path, card, first.ids, first.digests, alive, added, order[alive])


def _link(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; a copy elsewhere. Files of an index are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
