"""Vectors on disk, in shards that are written one by one, and the memory-mapped way back.

    shard-00000.npy     float16 [n D], unit norm
    shard-00000.arrow   the n ids; digest of each text; how many tokens it has, and how many of them were cut off
    shard-00000.json    sidecar, written last: rows, sha256 of both files, shards in all, dim, model fingerprint, max_tokens ...
    queries.npy         float16 [Q D] of some of the data set's queries, where it has any: what an index is examined with

A sidecar that is there means that its shard is complete. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ullme.artifacts import sha256_file, write_atomic
from ullme.errors import ArtifactError
from ullme.records import Document
from ullme.vector_file import VectorReader

if TYPE_CHECKING:
    import pyarrow as pa

    from ullme.engine import Block

__all__ = [
    "DIGEST_BYTES",
    "QUERIES_FILE",
    "ROW_BYTES",
    "Embeddings",
    "Shard",
    "drop_shards_from",
    "finished_shard",
    "open_embeddings",
    "shard_name",
    "sidecars",
]

QUERIES_FILE = "queries.npy"
DIGEST_BYTES = 16
ROW_BYTES = 256
"""Of an id, its digest and what Arrow adds, generously."""
COMMON = {
    "fingerprint": "model",
    "dim": "length of vectors",
    "prompt": "prompt",
    "input": "input file",
    "shards": "number of shards",
}
"""What all shards of a folder share, in words."""


def shard_name(number: int) -> str:
    """`shard-00007`, without the suffix."""
    return f"shard-{number:05d}"


@dataclass
class Shard:
    """Vectors being gathered, of documents in the order of the corpus.

    digests: Bytes16[n] of the texts; done: Bool[n], whose vector is there; tokens, lost: Int32[n], as in `engine.Block`.
    """

    ids: list[str]
    digests: np.ndarray
    vectors: np.ndarray
    done: np.ndarray
    tokens: np.ndarray
    lost: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document], dim: int) -> Shard:
        """Nothing of it encoded yet."""
        count = len(documents)
        digests = [hashlib.sha256(document.content.encode()).digest()[:DIGEST_BYTES] for document in documents]
        return cls(
            [document.id for document in documents],
            np.frombuffer(b"".join(digests), dtype=f"S{DIGEST_BYTES}"),
            np.zeros((count, dim), dtype=np.float16),
            np.zeros(count, dtype=bool),
            np.zeros(count, dtype=np.int32),
            np.zeros(count, dtype=np.int32),
        )

    def take(self, places: np.ndarray, block: Block) -> None:
        """Keep the vectors of `block`, which belong to these rows.

        Raises:
            NotFinite: a vector is NaN or infinite; names the documents.
        """
        block.check_finite([self.ids[place] for place in places.tolist()])
        self.vectors[places] = block.vectors.astype(np.float16)
        self.tokens[places] = block.tokens
        self.lost[places] = block.lost
        self.done[places] = True

    def write(self, folder: Path, name: str, described: dict[str, Any]) -> None:
        """Write the three files, the sidecar last."""
        import pyarrow as pa

        (folder / f"{name}.json").unlink(missing_ok=True)
        with (folder / f"{name}.npy").open("wb") as handle:
            np.save(handle, self.vectors, allow_pickle=False)
            _settle(handle)
        buffers = [None, pa.py_buffer(self.digests.tobytes())]
        digests = pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), len(self.ids), buffers)
        columns = {"id": pa.array(self.ids, type=pa.string()), "text": digests}
        table = pa.table({**columns, "tokens": pa.array(self.tokens), "lost": pa.array(self.lost)})
        with (folder / f"{name}.arrow").open("wb") as handle:
            with pa.ipc.new_file(handle, table.schema) as writer:
                writer.write_table(table)
            _settle(handle)
        counted = {"truncated": int((self.lost > 0).sum()), "tokens": int(self.tokens.sum()), "lost": int(self.lost.sum())}
        sha256 = {suffix: sha256_file(folder / f"{name}.{suffix}") for suffix in ("npy", "arrow")}
        write_atomic(folder / f"{name}.json", json.dumps({**described, **counted, "sha256": sha256}, sort_keys=True))


def finished_shard(folder: Path, name: str, expected: dict[str, Any]) -> bool:
    """Whether the shard is complete, undamaged and the one expected."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return False
    sidecar = json.loads(file.read_text(encoding="utf-8"))
    if any(sidecar.get(key) != value for key, value in expected.items()):
        return False
    parts = {suffix: folder / f"{name}.{suffix}" for suffix in ("npy", "arrow")}
    return all(part.is_file() and sha256_file(part) == sidecar["sha256"][suffix] for suffix, part in parts.items())


def drop_shards_from(folder: Path, count: int) -> None:
    """Remove shards numbered `count` and above: an interrupted attempt may have had smaller ones."""
    for file in folder.glob("shard-*"):
        if int(file.name.removeprefix("shard-").partition(".")[0]) >= count:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Embeddings:
    """Vectors of N documents on disk: unit norm, finite, ids unique."""

    path: Path
    sidecars: Sequence[dict[str, Any]]

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.sidecars[0]["dim"])

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.total("rows")

    @property
    def fingerprint(self) -> str:
        """Digest of the model artifact that made the vectors."""
        return str(self.sidecars[0]["fingerprint"])

    @property
    def ids(self) -> list[str]:
        """Document ids in row order."""
        return [identifier for ids, _ in self.shards() for identifier in ids]

    def total(self, name: str) -> int:
        """Sum of one number over the shards: rows, truncated, tokens or lost."""
        return sum(int(sidecar[name]) for sidecar in self.sidecars)

    def shards(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, memory-mapped float16 [n D]) one shard after another."""
        for number in range(len(self.sidecars)):
            yield self.table(number).column("id").to_pylist(), self.block(number)

    def table(self, number: int) -> pa.Table:
        """Ids, digests of the texts, tokens and how many of them were lost, of one shard."""
        import pyarrow as pa

        with pa.memory_map(str(self.path / f"{shard_name(number)}.arrow")) as source:
            return pa.ipc.open_file(source).read_all()

    def block(self, number: int) -> np.ndarray:
        """The vectors of one shard, memory-mapped float16 [n D]."""
        return np.load(self.path / f"{shard_name(number)}.npy", mmap_mode="r", allow_pickle=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.count, self.dim

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Float16[n D]: the vectors at Int64[n] or of a range, read from where they lie; nothing stays in memory."""
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        starts = np.cumsum([0, *(int(sidecar["rows"]) for sidecar in self.sidecars)])
        of = np.searchsorted(starts, rows, side="right") - 1
        found = np.empty((len(rows), self.dim), dtype=np.float16)
        for number in np.unique(of).tolist():
            here = np.flatnonzero(of == number)
            found[here] = VectorReader(self.path / f"{shard_name(number)}.npy")[rows[here] - starts[number]]
        return found

    def queries(self) -> np.ndarray | None:
        """Float32[Q D] of some of the data set's queries, by the same model; None where it had none."""
        file = self.path / QUERIES_FILE
        return np.load(file, allow_pickle=False).astype(np.float32) if file.is_file() else None

    def vectors(self) -> np.ndarray:
        """All vectors as float32 [N D], in memory."""
        return np.concatenate([np.asarray(block, dtype=np.float32) for _, block in self.shards()])


def sidecars(path: Path) -> dict[int, dict[str, Any]]:
    """The sidecars in a folder by the number of their shard."""
    files = sorted(path.glob("shard-*.json"))
    return {int(file.stem.removeprefix("shard-")): json.loads(file.read_text(encoding="utf-8")) for file in files}


def open_embeddings(path: Path) -> Embeddings:
    """Open an embeddings artifact, or a folder that `ullme encode` filled.

    Raises:
        ArtifactError: a shard is missing, or was made by another model (or from another input) than the first.
    """
    folder = Path(path)
    found = sidecars(folder)
    if not found:
        raise ArtifactError(f"{folder}: expected shard-*.json files, found none; encode the corpus again")
    first = found[min(found)]
    for number, sidecar in found.items():
        for key, words in COMMON.items():
            if sidecar.get(key) != first.get(key):
                raise ArtifactError(
                    f"{folder}: shard {number} was made by another model or from another input than shard {min(found)} (its "
                    f"{words} differs); encode the corpus again"
                )
    count = max(first.get("shards", 0), max(found) + 1)
    missing = [number for number in range(count) if number not in found]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ArtifactError(
            f"{folder}: {len(missing)} of {count} shards missing (number {shown}); encode the corpus again, what is there is kept "
            "(with `ullme encode`, run every --shard)"
        )
    for number in range(count):
        for suffix in ("npy", "arrow"):
            if not (folder / f"{shard_name(number)}.{suffix}").is_file():
                raise ArtifactError(f"{folder}: {shard_name(number)}.{suffix} is missing; encode the corpus again")
    return Embeddings(folder, [found[number] for number in range(count)])


def _settle(handle: IO[bytes]) -> None:
    """On the disk before the sidecar says that it is there."""
    handle.flush()
    os.fsync(handle.fileno())
