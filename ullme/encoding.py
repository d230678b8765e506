"""The encode stage: a corpus as fp16 vectors in shards, resumable shard by shard, and the memory-mapped way back.

    shard-00000.npy     float16 [n D], unit norm
    shard-00000.arrow   the n document ids; digest of each text; whether it was cut at max_tokens
    shard-00000.json    sidecar, written last: rows, sha256 of both files, dim, dtype, model fingerprint, role, max_tokens

A shard whose sidecar matches is not encoded again; vectors of another model are never mixed in. Nor is a text encoded again
whose vector by the same model lies in an earlier embeddings artifact of the store: a corpus of which 1% changed costs 1%.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store, sha256_file, write_atomic
from ullme.components import Section
from ullme.data import Dataset, Document
from ullme.errors import ArtifactError, DataError, NotFinite
from ullme.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from ullme.encoder import Encoder

__all__ = ["ENCODE", "Embeddings", "EncodeConfig", "encode", "open_embeddings"]

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
EARLIER_ARTIFACTS = 3
"""How many earlier artifacts of the same model are looked through for texts that were encoded before, the newest first."""
ROW_BYTES = 256
"""Of an id, its digest and what Arrow adds, generously."""


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
    rows = section.runtime.shard_rows
    starts = range(0, len(corpus), rows)
    _drop_shards_from(draft.path, len(starts))
    earlier = _Earlier(inputs.store, fingerprint)
    truncated = encoded = 0
    for number, start in enumerate(starts):
        documents = corpus[start : start + rows]
        name = f"shard-{number:05d}"
        expected = {
            "rows": len(documents),
            "first": documents[0].id,
            "last": documents[-1].id,
            "dim": encoder.dim,
            "dtype": "float16",
            "fingerprint": fingerprint,
            "role": "document",
            "max_tokens": encoder.max_tokens,
        }
        done = _finished(draft.path, name, expected)
        if done is not None:
            logger.info("encode: %s is there already (%d documents)", name, len(documents))
            truncated += done["truncated"]
            continue
        shard = _Shard.of(documents, encoder.dim)
        earlier.fill(shard)
        missing = np.flatnonzero(~shard.done)
        encoded += _encode_rows(encoder, documents, shard, missing, name, section.runtime.batch_tokens)
        cut = int(shard.cut.sum())
        _write_shard(draft.path, name, [document.id for document in documents], shard, {**expected, "truncated": cut})
        truncated += cut
    share = truncated / len(corpus)
    logger.info(
        "encode: %d documents, %d texts encoded%s, %.1f%% reach max_tokens=%d and may be cut",
        len(corpus),
        encoded,
        f", {earlier.found} taken from {earlier.name}" if earlier.found else "",
        100 * share,
        encoder.max_tokens,
    )
    draft.meta |= {
        "count": len(corpus),
        "dim": encoder.dim,
        "share_truncated": round(share, 4),
        "fingerprint": fingerprint,
        "texts_encoded": encoded,
    }


def space(section: EncodeConfig, inputs: Inputs) -> int:  # noqa: ARG001 - the same signature for every stage
    """Bytes that the stage writes at most: a vector, an id and a digest per document."""
    data, model = inputs.ref("data").meta, inputs.ref("model").meta
    return int(data.get("searchable", 0)) * (2 * int(model.get("dim", 0)) + ROW_BYTES)


ENCODE = Stage("encode", "embeddings", 2, encode, space)


@dataclass
class _Shard:
    """Vectors being gathered. digests: Bytes16[n] of the texts; done: Bool[n], whose vector is there; cut: Bool[n]."""

    digests: np.ndarray
    vectors: np.ndarray
    done: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document], dim: int) -> _Shard:
        digests = [hashlib.sha256(document.content.encode()).digest()[:DIGEST_BYTES] for document in documents]
        return cls(
            np.frombuffer(b"".join(digests), dtype=f"S{DIGEST_BYTES}"),
            np.zeros((len(documents), dim), dtype=np.float16),
            np.zeros(len(documents), dtype=bool),
            np.zeros(len(documents), dtype=bool),
        )


class _Earlier:
    """Vectors that the same model made before: the newest embeddings artifacts of the store, opened when first asked."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._store, self._fingerprint = store, fingerprint
        self.found, self.name = 0, ""

    @cached_property
    def _artifacts(self) -> list[tuple[ArtifactRef, Embeddings]]:
        opened: list[tuple[ArtifactRef, Embeddings]] = []
        for ref in self._store.finished("embeddings"):
            if len(opened) == EARLIER_ARTIFACTS:
                break
            if ref.meta.get("fingerprint") != self._fingerprint:
                continue
            try:
                opened.append((ref, open_embeddings(self._store.open(ref, "embeddings"))))
            except ArtifactError as error:
                logger.warning("encode: nothing is taken over from a damaged artifact: %s", error)
        return opened

    def fill(self, shard: _Shard) -> None:
        """Copy the vectors of the texts that were encoded before."""
        for ref, embeddings in self._artifacts:
            for number in range(len(embeddings.sidecars)):
                if shard.done.all():
                    return
                table = embeddings.table(number)
                if "text" not in table.column_names:
                    continue
                there = np.frombuffer(b"".join(table.column("text").to_pylist()), dtype=f"S{DIGEST_BYTES}")
                order = np.argsort(there, kind="stable")
                wanted = np.flatnonzero(~shard.done)
                places = np.minimum(np.searchsorted(there, shard.digests[wanted], sorter=order), len(there) - 1)
                rows = order[places]
                same = there[rows] == shard.digests[wanted]
                vectors = embeddings.block(number)
                shard.vectors[wanted[same]] = vectors[rows[same]]
                shard.cut[wanted[same]] = np.asarray(table.column("cut"))[rows[same]]
                shard.done[wanted[same]] = True
                if same.any():
                    self.found, self.name = self.found + int(same.sum()), str(ref)


def _encode_rows(
    encoder: Encoder, documents: Sequence[Document], shard: _Shard, missing: np.ndarray, name: str, batch_tokens: int
) -> int:
    """Encode the documents at `missing`, equal texts once; returns how many texts that were.

    Raises:
        NotFinite: a vector is NaN or infinite; names the documents.
    """
    if not len(missing):
        return 0
    _, first, inverse = np.unique(shard.digests[missing], return_index=True, return_inverse=True)
    order = np.sort(first)  # in the order of the corpus, so that the same documents make the same batches
    unique = missing[order]
    rows = encoder.tokenise([documents[place].content for place in unique], "document")
    vectors = np.zeros((len(unique), encoder.dim), dtype=np.float16)
    with Progress(len(unique), f"encode {name}", unit="document") as progress:
        for positions, block in encoder.encode_rows(rows, batch_tokens=batch_tokens):
            if not np.isfinite(block).all():
                bad = np.flatnonzero(~np.isfinite(block).all(1))
                raise NotFinite(None, "an embedding", [documents[unique[positions[row]]].id for row in bad])
            vectors[positions] = block.astype(np.float16)
            progress.advance(len(positions))
    where = np.searchsorted(order, first)[inverse]
    shard.vectors[missing] = vectors[where]
    shard.cut[missing] = np.array([len(row) >= encoder.max_tokens for row in rows], dtype=bool)[where]
    return len(unique)


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
        for number in range(len(self.sidecars)):
            yield self.table(number).column("id").to_pylist(), self.block(number)

    def table(self, number: int) -> pa.Table:
        """Ids, digests of the texts and whether each was cut, of one shard."""
        import pyarrow as pa

        with pa.memory_map(str(self.path / f"shard-{number:05d}.arrow")) as source:
            return pa.ipc.open_file(source).read_all()

    def block(self, number: int) -> np.ndarray:
        """The vectors of one shard, memory-mapped float16 [n D]."""
        return np.load(self.path / f"shard-{number:05d}.npy", mmap_mode="r", allow_pickle=False)

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


def _write_shard(folder: Path, name: str, ids: Sequence[str], shard: _Shard, sidecar: dict[str, Any]) -> None:
    import pyarrow as pa

    (folder / f"{name}.json").unlink(missing_ok=True)
    with (folder / f"{name}.npy").open("wb") as handle:
        np.save(handle, shard.vectors, allow_pickle=False)
        _settle(handle)
    digests = pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), len(ids), [None, pa.py_buffer(shard.digests.tobytes())])
    table = pa.table({"id": pa.array(ids, type=pa.string()), "text": digests, "cut": pa.array(shard.cut)})
    with (folder / f"{name}.arrow").open("wb") as handle:
        with pa.ipc.new_file(handle, table.schema) as writer:
            writer.write_table(table)
        _settle(handle)
    sha256 = {suffix: sha256_file(folder / f"{name}.{suffix}") for suffix in ("npy", "arrow")}
    write_atomic(folder / f"{name}.json", json.dumps({**sidecar, "sha256": sha256}, sort_keys=True))


def _settle(handle: IO[bytes]) -> None:
    """On the disk before the sidecar says that it is there."""
    handle.flush()
    os.fsync(handle.fileno())
