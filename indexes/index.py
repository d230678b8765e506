"""Search an index that `indexes.build` made.

    index.faiss    vectors and search structure as faiss writes them, search parameters included
    vectors.npy    with `refine`: the vectors themselves, mapped into memory, to compare the best candidates once more
    ids.arrow      of each row: `id` of its document (faiss knows only row numbers), digest of its `vector`, whether it is `alive`
    trained.faiss  where a kind learns from a sample: the index without a row, which later segments begin with
    index.json     metric, dim, count, fingerprint of the model, kind and its fields, sha256 of the files above

Further segments are `index-1.faiss` and `vectors-1.npy`, and so on: of an index that was built within a limit of memory, or of
documents that came later. Their rows follow those of the segments before; deleted ones stay in the files and are not found.
Files are always of the CPU; `Index.open(..., device="gpu")` searches a copy on the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from indexes._corpus import Shards
from indexes._faiss import gpu_copy, load_faiss, read_index, set_parameters
from indexes._rows import Rows
from indexes._segments import Found, Segment, file_names, merged
from indexes.kind import IndexKind
from ullme.artifacts import sha256_file
from ullme.components import resolve
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.neighbours import MISSING_ROW, Neighbours, nearest
from ullme.vector_file import read_vectors

__all__ = ["CARD_FILE", "FORMAT", "IDS_FILE", "METRIC", "TRAINED_FILE", "Index", "Shards", "open_segments", "read_card"]

FORMAT = 2
READABLE = (1, FORMAT)  # 1: one segment, nothing deleted, no digests
METRIC = "inner_product"
IDS_FILE, TRAINED_FILE, CARD_FILE = "ids.arrow", "trained.faiss", "index.json"
EXACT_AMONG = 10_000
"""Of fewer rows all are compared when a search is among some only."""


class Index:
    """A built index, opened for search: a `Searcher` over the documents `ids`."""

    def __init__(
        self,
        card: Mapping[str, Any],
        rows: Rows,
        kind: IndexKind,
        segments: Sequence[Segment],
    ) -> None:
        """Use `Index.open`. rows: those of the segments, one after another."""
        self._card, self._kind, self._segments = card, kind, segments
        self._starts = np.cumsum([0, *map(len, segments)])
        self._alive = None if rows.alive.all() else rows.alive
        self._living = np.flatnonzero(rows.alive)
        self._ids = rows.ids if self._alive is None else [rows.ids[row] for row in self._living.tolist()]

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
        card, kind = read_card(path)
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
        rows = Rows.read(path / IDS_FILE)
        segments = open_segments(path, card, kind, device=device)
        held = sum(map(len, segments))
        if (held, int(rows.alive.sum()), len(rows)) != (card["rows"], card["count"], card["rows"]):
            raise ArtifactError(
                f"{path}: {CARD_FILE} says {card['count']} vectors in {card['rows']} rows, its faiss files hold {held} and "
                f"{IDS_FILE} {len(rows)}, of which {int(rows.alive.sum())} are alive; build the index again"
            )
        return cls(card, rows, kind, segments)

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
        where = "cpu" if self._segments[0].gpu is None else "gpu"
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
            found, places = self._searched(queries, reach, among)
            if self._alive is not None:
                places = np.where(places == MISSING_ROW, MISSING_ROW, np.searchsorted(self._living, places))
            rows[:, : places.shape[1]], scores[:, : places.shape[1]] = places, found
        return Neighbours(rows, scores)

    def _searched(self, queries: np.ndarray, reach: int, among: np.ndarray | None) -> Found:
        """Rows of the segments."""
        found, k_factor = [], self._kind.k_factor
        only = among if among is None or self._alive is None else self._living[among]
        for segment, start in zip(self._segments, self._starts, strict=False):
            stop = start + len(segment)
            if only is None:
                alive = None if self._alive is None else self._alive[start:stop]
                scores, rows = segment.nearest(queries, min(reach, len(segment)), k_factor, alive)
            else:
                inside = only[slice(*np.searchsorted(only, (start, stop)))] - start
                if not len(inside):
                    continue
                near = min(reach, len(inside))
                if len(only) <= EXACT_AMONG:
                    best = nearest(queries, segment.stored(inside), near)
                    scores, rows = best.scores, inside[best.rows]
                else:
                    scores, rows = segment.among(queries, near, k_factor, inside)
            found.append((scores, np.where(rows == MISSING_ROW, MISSING_ROW, rows + start)))
        return merged(found, reach)


def open_segments(
    path: Path, card: Mapping[str, Any], kind: IndexKind, *, device: Literal["auto", "cpu", "gpu"] = "cpu"
) -> list[Segment]:
    """The files of an index, mapped into memory, searching as `kind` says.

    Raises:
        ArtifactError: one cannot be read, or is not of this index. ConfigError: see `Index.open`.
    """
    faiss, segments = load_faiss(), []
    beside_file = kind.reading_bytes(card.get("built", card).get("rows", card["count"]), card["dim"])
    for number in range(card["segments"]):
        name, beside = file_names(number)
        index = read_index(faiss, path / name, beside_file)
        if index.d != card["dim"]:
            raise ArtifactError(
                f"{path}: {CARD_FILE} says vectors of dim {card['dim']}, {name} holds dim {index.d}; build it again"
            )
        set_parameters(faiss, index, kind.search_parameters())
        vectors = read_vectors(path / beside) if kind.refine else None
        if vectors is not None and vectors.shape != (index.ntotal, index.d):
            raise ArtifactError(f"{path}: {beside} is not of this index; build it again")
        segments.append(Segment(index, vectors, gpu_copy(faiss, index, kind, device)))
    return segments


def read_card(path: Path) -> tuple[dict[str, Any], IndexKind]:
    """What `index.json` says, and the kind it names.

    Raises:
        ArtifactError: there is none, or this version did not write it.
    """
    file = path / CARD_FILE
    if not file.is_file():
        raise ArtifactError(f"{path}: no {CARD_FILE} there, so it is not an index or was never finished; build it again")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if card["format"] not in READABLE or card["metric"] != METRIC:
            raise ValueError(
                f"format {card['format']} with metric {card['metric']}, this version reads format {FORMAT} with {METRIC}"
            )
        kind = resolve("indexes", card["kind"])
        if not isinstance(kind, IndexKind):
            raise ValueError(f"'{kind.kind}' is not a kind of index")
        if card["format"] == 1:
            card |= {"segments": 1, "rows": card["count"]}
        segments = [name for number in range(card["segments"]) for name in file_names(number)[: 2 if kind.refine else 1]]
        files = card["files"].keys() - {TRAINED_FILE}
        if not {"dim", "count", "rows", "fingerprint", "factory"} <= card.keys() or files != {IDS_FILE, *segments}:
            raise ValueError("a field is missing")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        reason = f"{error.error_count()} fields of its kind do not fit" if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: {CARD_FILE} is not one that this version wrote ({reason}); build the index again") from error
    return card, kind
