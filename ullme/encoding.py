"""The encode stage: a corpus as fp16 vectors in shards, resumable shard by shard, and the memory-mapped way back.

    shard-00000.npy     float16 [n D], unit norm
    shard-00000.arrow   the n document ids
    shard-00000.json    sidecar, written last: rows, sha256 of both files, dim, dtype, model fingerprint, role, max_tokens

A shard whose sidecar matches is not encoded again; vectors of another model are never mixed in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ullme.artifacts import Draft, Inputs, Stage, sha256_file, write_atomic
from ullme.components import Section
from ullme.data import Dataset
from ullme.errors import ArtifactError, DataError, NotFinite
from ullme.progress import Progress

__all__ = ["ENCODE", "Embeddings", "EncodeConfig", "encode", "open_embeddings"]

logger = logging.getLogger(__name__)


class EncodeRuntime(Section):
    """Speed and memory; none of it changes the vectors beyond rounding."""

    batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens per forward pass."""
    shard_rows: int = Field(default=50_000, ge=1)
    """Documents per shard: what a crash costs at most."""


class EncodeConfig(Section):
    """How the corpus is encoded. The model decides prompt, length and pooling; they travel with it."""

    runtime: EncodeRuntime = EncodeRuntime()


def encode(section: EncodeConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: the searchable documents of `data` through `model` -> embeddings.

    Raises:
        DataError: nothing to encode. NotFinite: a vector is NaN or infinite; names the documents.
    """
    from ullme.encoder import Encoder

    corpus = Dataset.open(inputs["data"]).corpus()
    if not corpus:
        raise DataError("encode: the data set has no searchable document; look at the data stage's counts")
    fingerprint = inputs.ref("model").digest
    encoder = Encoder.load(inputs["model"])
    runtime = section.runtime
    starts = range(0, len(corpus), runtime.shard_rows)
    _drop_shards_from(draft.path, len(starts))
    truncated = 0
    for number, start in enumerate(starts):
        documents = corpus[start : start + runtime.shard_rows]
        ids = [document.id for document in documents]
        name = f"shard-{number:05d}"
        expected = {
            "rows": len(ids),
            "first": ids[0],
            "last": ids[-1],
            "dim": encoder.dim,
            "dtype": "float16",
            "fingerprint": fingerprint,
            "role": "document",
            "max_tokens": encoder.max_tokens,
        }
        done = _finished(draft.path, name, expected)
        if done is not None:
            logger.info("encode: %s is there already (%d documents)", name, len(ids))
            truncated += done["truncated"]
            continue
        rows = encoder.tokenise([document.content for document in documents], "document")
        cut = sum(len(row) >= encoder.max_tokens for row in rows)
        vectors = np.zeros((len(rows), encoder.dim), dtype=np.float16)
        same: dict[tuple[int, ...], int] = {}
        first = [same.setdefault(tuple(row.ids), position) for position, row in enumerate(rows)]
        unique = sorted(same.values())
        with Progress(len(unique), f"encode {name}", unit="document") as progress:
            for positions, block in encoder.encode_rows([rows[p] for p in unique], batch_tokens=runtime.batch_tokens):
                where = [unique[p] for p in positions]
                if not np.isfinite(block).all():
                    bad = [ids[where[row]] for row in np.flatnonzero(~np.isfinite(block).all(1))]
                    raise NotFinite(None, "an embedding", bad)
                vectors[where] = block.astype(np.float16)
                progress.advance(len(positions))
        _write_shard(draft.path, name, ids, vectors[first], {**expected, "truncated": cut})
        truncated += cut
    share = truncated / len(corpus)
    logger.info("encode: %d documents, %.1f%% reach max_tokens=%d and may be cut", len(corpus), 100 * share, encoder.max_tokens)
    draft.meta |= {"count": len(corpus), "dim": encoder.dim, "share_truncated": round(share, 4), "fingerprint": fingerprint}


ENCODE = Stage("encode", "embeddings", 1, encode)


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
        return sum(int(sidecar["rows"]) for sidecar in self.sidecars)

    @property
    def fingerprint(self) -> str:
        """Digest of the model artifact that made the vectors."""
        return str(self.sidecars[0]["fingerprint"])

    @property
    def ids(self) -> list[str]:
        """Document ids in row order."""
        return [identifier for ids, _ in self.shards() for identifier in ids]

    def shards(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, memory-mapped float16 [n D]) one shard after another."""
        import pyarrow as pa

        for number in range(len(self.sidecars)):
            name = f"shard-{number:05d}"
            with pa.memory_map(str(self.path / f"{name}.arrow")) as source:
                ids = pa.ipc.open_file(source).read_all().column("id").to_pylist()
            yield ids, np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def vectors(self) -> np.ndarray:
        """All vectors as float32 [N D], in memory."""
        return np.concatenate([np.asarray(block, dtype=np.float32) for _, block in self.shards()])


def open_embeddings(path: Path) -> Embeddings:
    """Open an embeddings artifact.

    Raises:
        ArtifactError: a shard is missing, or was made by another model than the first.
    """
    sidecars = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(path).glob("shard-*.json"))]
    if not sidecars:
        raise ArtifactError(f"{path}: expected shard-*.json files, found none; encode the corpus again")
    for number, sidecar in enumerate(sidecars):
        for suffix in ("npy", "arrow"):
            if not (Path(path) / f"shard-{number:05d}.{suffix}").is_file():
                raise ArtifactError(f"{path}: shard-{number:05d}.{suffix} is missing; encode the corpus again")
        if sidecar["fingerprint"] != sidecars[0]["fingerprint"] or sidecar["dim"] != sidecars[0]["dim"]:
            raise ArtifactError(f"{path}: shard {number} was made by another model than shard 0; encode the corpus again")
    return Embeddings(Path(path), sidecars)


def _finished(folder: Path, name: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The sidecar of a shard that is complete and is the one expected, else None."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    sidecar = json.loads(file.read_text(encoding="utf-8"))
    if any(sidecar.get(key) != value for key, value in expected.items()):
        return None
    for suffix in ("npy", "arrow"):
        part = folder / f"{name}.{suffix}"
        if not part.is_file() or sha256_file(part) != sidecar["sha256"][suffix]:
            return None
    return sidecar


def _drop_shards_from(folder: Path, count: int) -> None:
    """Remove shards numbered `count` and above: an interrupted attempt may have had smaller ones."""
    for file in folder.glob("shard-*"):
        if int(file.name.removeprefix("shard-").partition(".")[0]) >= count:
            file.unlink()


def _write_shard(folder: Path, name: str, ids: Sequence[str], vectors: np.ndarray, sidecar: dict[str, Any]) -> None:
    import pyarrow as pa

    (folder / f"{name}.json").unlink(missing_ok=True)
    np.save(folder / f"{name}.npy", vectors, allow_pickle=False)
    table = pa.table({"id": pa.array(ids, type=pa.string())})
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    digests = {suffix: sha256_file(folder / f"{name}.{suffix}") for suffix in ("npy", "arrow")}
    write_atomic(folder / f"{name}.json", json.dumps({**sidecar, "sha256": digests}, sort_keys=True))
