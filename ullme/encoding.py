"""The encode stage: a corpus as fp16 vectors in shards (see `ullme.shards`), resumable shard by shard.

A shard whose sidecar matches is not encoded again; vectors of another model are never mixed in. Nor is a text encoded again
whose vector by the same model lies in an earlier embeddings artifact of the store: a corpus of which 1% changed costs 1%.
The corpus is read as a stream: what is in memory is a few shards and windows, however long it is. Some queries of the data set,
none of them a test query, are encoded beside it: what people ask is unlike what lies there, and an index is measured by it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.components import Section
from ullme.data import Dataset, Document, Query
from ullme.errors import ArtifactError, ConfigError, DataError
from ullme.prompts import Role
from ullme.records import hash_share
from ullme.shards import DIGEST_BYTES, QUERIES_FILE, ROW_BYTES, Embeddings, Shard, finished_shard, open_embeddings, shard_name
from ullme.text_file import TextFile

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = [
    "ENCODE",
    "Embeddings",
    "EncodeConfig",
    "EncodeJob",
    "EncodeRuntime",
    "Encoded",
    "encode",
    "encode_part",
    "encode_shards",
    "open_embeddings",
]

logger = logging.getLogger(__name__)

EXAM_QUERIES = 400
"""Queries that an index is examined with at most."""
EARLIER_ARTIFACTS = 3
"""How many earlier artifacts of the same model are looked through for texts that were encoded before, the newest first."""


class EncodeRuntime(Section):
    """Speed and memory; none of it changes the vectors beyond rounding."""

    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens per forward pass, padding included; halved where memory does not suffice."""
    window: int = Field(default=16_384, ge=1)
    """Texts that are sorted by length together; equal ones among them are encoded once."""
    shard_rows: int = Field(default=50_000, ge=1)
    """Documents per shard: what a crash costs at most."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """How many share the work, each with a model of its own; auto: one per GPU, or one."""
    compile: bool = False
    """Compile the model's layers first (torch.compile): some 15 seconds, then a little faster."""


class EncodeConfig(Section):
    """How the corpus is encoded. The model decides prompt, length and pooling; they travel with it."""

    runtime: EncodeRuntime = EncodeRuntime()


class EncodeJob(BaseModel):
    """What one process encodes: the shards of `corpus` whose number leaves the remainder `part` when divided by `parts`.

    corpus: a data artifact's folder, or a file that `TextFile.open` has checked. count: documents in it. input: digest of the
    file. dataset: whose prompt templates are taken. out: folder of the shards. fingerprint: digest of the model. store: where
    earlier vectors may lie. queries: texts and instructions of some queries, which the first part encodes.
    """

    model_config = ConfigDict(frozen=True)

    model: Path
    fingerprint: str
    corpus: Path
    count: int
    out: Path
    runtime: EncodeRuntime = EncodeRuntime()
    role: Role = "document"
    dataset: str = ""
    input: str = ""
    store: Path | None = None
    queries: tuple[tuple[str, str], ...] = ()
    part: int = 0
    parts: int = 1

    @property
    def shards(self) -> int:
        """Number of shards of the whole corpus."""
        return -(-self.count // self.runtime.shard_rows)

    @property
    def numbers(self) -> range:
        """The shards of this part."""
        return range(self.part, self.shards, self.parts)

    def documents(self) -> Iterator[Document]:
        """The whole corpus, as a stream."""
        if self.corpus.is_dir():
            return iter(Dataset.open(self.corpus).corpus())
        return TextFile(self.corpus, self.count, self.input).documents()


class Encoded(BaseModel):
    """What a part cost. texts: that went through the model; taken: vectors that were there, and where (an artifact)."""

    texts: int = 0
    taken: int = 0
    taken_from: str = ""

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(
            texts=self.texts + other.texts, taken=self.taken + other.taken, taken_from=self.taken_from or other.taken_from
        )


def encode(section: EncodeConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: the searchable documents of `data` through `model` -> embeddings.

    Raises:
        DataError: nothing to encode. NotFinite: a vector is NaN or infinite; names the documents.
    """
    from ullme.workers import encode_job

    data = Dataset.open(inputs["data"])
    count = len(data.corpus())
    if not count:
        raise DataError("encode: the data set has no searchable document; look at the data stage's counts")
    job = EncodeJob(
        model=inputs["model"],
        fingerprint=inputs.ref("model").digest,
        corpus=data.path,
        count=count,
        out=draft.path,
        runtime=section.runtime,
        dataset=data.name,
        store=inputs.store.root,
        queries=tuple((query.text, query.instruction) for query in exam_queries(data)),
    )
    encoded = encode_job(job)
    made = open_embeddings(draft.path)
    documents, text = made.total("truncated") / count, made.total("lost") / max(1, made.total("tokens"))
    logger.info(
        "encode: %d documents, %d texts encoded%s, %.1f%% of the documents are cut at max_tokens=%d, %.1f%% of the text is lost",
        count,
        encoded.texts,
        f", {encoded.taken} taken from {encoded.taken_from}" if encoded.taken else "",
        100 * documents,
        made.sidecars[0]["max_tokens"],
        100 * text,
    )
    draft.meta |= {
        "count": made.count,
        "dim": made.dim,
        "share_truncated": round(documents, 4),
        "share_text_lost": round(text, 4),
        "fingerprint": made.fingerprint,
        "texts_encoded": encoded.texts,
    }


def exam_queries(data: Dataset) -> list[Query]:
    """Queries of the run's own data that were set aside, then those that were trained on; which, follows from their ids."""
    own = [query for split in ("dev", "train") for query in data.queries(split) if not query.dataset]
    return sorted(own, key=lambda query: (query.split != "dev", hash_share(query.id, "exam"), query.id))[:EXAM_QUERIES]


def space(section: EncodeConfig, inputs: Inputs) -> int:  # noqa: ARG001 - the same signature for every stage
    """Bytes that the stage writes at most: a vector, an id and a digest per document; vectors of some queries."""
    data, vector = inputs.ref("data").meta, 2 * int(inputs.ref("model").meta.get("dim", 0))
    queries = min(EXAM_QUERIES, sum(int(data.get(f"queries_{split}", 0)) for split in ("dev", "train")))
    return int(data.get("searchable", 0)) * (vector + ROW_BYTES) + queries * vector + ROW_BYTES


ENCODE = Stage("encode", "embeddings", 5, encode, space)


# One process


@dataclass(frozen=True)
class _Portion:
    """One window of a shard. places: Int64[n], rows of the window's texts. shard: None = it is there already.

    rest: documents of the shard that no window has.
    """

    name: str
    expected: dict[str, Any]
    rest: int
    places: np.ndarray
    shard: Shard | None = None


def encode_part(job: EncodeJob, advance: Callable[[int], None], *, device: str = "auto") -> Encoded:
    """Encode the shards of one part in this process; `advance` hears of documents that are done.

    Raises:
        NotFinite: a vector is NaN or infinite; names the documents. ConfigError: the model cannot be compiled here.
    """
    from ullme.encoder import Encoder

    encoder = Encoder.load(job.model, device=device)
    if not job.runtime.compile:
        return encode_shards(encoder, job, advance)
    from torch._dynamo.exc import TorchDynamoException

    encoder.compile()
    try:
        return encode_shards(encoder, job, advance)
    except TorchDynamoException as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"encoding.runtime.compile: expected a model that torch compiles here, got: {said}; set false") from error


def encode_shards(encoder: Encoder, job: EncodeJob, advance: Callable[[int], None]) -> Encoded:
    """`encode_part` with the model in memory already."""
    from ullme.engine import stream_windows

    earlier = _Earlier(job)
    portions: deque[_Portion] = deque()
    texts = _windows(job, encoder, earlier, portions)
    tokenise = partial(encoder.tokenise, role=job.role, dataset=job.dataset)
    encoded, window = 0, 0
    for block in stream_windows(encoder, texts, tokenise, batch_tokens=job.runtime.batch_tokens):
        for _ in range(block.window - window):
            portions.popleft()
        window, portion = block.window, portions[0]
        if portion.shard is None:
            logger.info("encode: %s is there already (%d documents)", portion.name, portion.rest)
            advance(portion.rest)
            continue
        if len(block.positions):
            portion.shard.take(portion.places[block.positions], block)
        encoded += block.encoded
        advance(len(block.positions))
        if portion.shard.done.all():
            portion.shard.write(job.out, portion.name, portion.expected)
            advance(portion.rest)
    if job.queries and not job.part:
        _write_queries(encoder, job)
    return Encoded(texts=encoded, taken=earlier.found, taken_from=earlier.name)


def _write_queries(encoder: Encoder, job: EncodeJob) -> None:
    texts, instructions = zip(*job.queries, strict=True)
    vectors = encoder.encode(
        texts, prompt="query", dataset=job.dataset, instructions=instructions, batch_tokens=job.runtime.batch_tokens
    )
    partial_file = job.out / f"{QUERIES_FILE}.partial"
    with partial_file.open("wb") as out:
        np.save(out, vectors.astype(np.float16), allow_pickle=False)
    partial_file.replace(job.out / QUERIES_FILE)


def _windows(job: EncodeJob, encoder: Encoder, earlier: _Earlier, portions: deque[_Portion]) -> Iterator[list[str]]:
    """The texts of every window, and beside it (in `portions`) what they are. Runs ahead of the model, in its own thread.

    A shard of which nothing is to be encoded gives an empty window: so it waits its turn, and does not stay in memory.
    """
    from ullme.engine import windows

    prompt = encoder.prompts.string("{text}", job.role, dataset=job.dataset)
    for number, documents in enumerate(_chunks(job.documents(), job.runtime.shard_rows)):
        if number not in job.numbers:
            continue
        name = shard_name(number)
        expected = {
            "rows": len(documents),
            "first": documents[0].id,
            "last": documents[-1].id,
            "dim": encoder.dim,
            "dtype": "float16",
            "fingerprint": job.fingerprint,
            "role": job.role,
            "prompt": prompt,
            "max_tokens": encoder.max_tokens,
            "input": job.input,
            "shards": job.shards,
        }
        if finished_shard(job.out, name, expected):
            portions.append(_Portion(name, expected, len(documents), np.zeros(0, dtype=np.int64)))
            yield []
            continue
        shard = Shard.of(documents, encoder.dim)
        earlier.fill(shard, prompt)
        missing = np.flatnonzero(~shard.done)
        rest, start = len(documents) - len(missing), 0
        for texts in windows((documents[place].content for place in missing), job.runtime.window) if len(missing) else [[]]:
            portions.append(_Portion(name, expected, rest, missing[start : start + len(texts)], shard))
            start += len(texts)
            yield texts


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, size)):
        yield chunk


class _Earlier:
    """Vectors that the same model made before: the newest embeddings artifacts of the store, opened when first asked."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self.found, self.name = 0, ""

    @cached_property
    def _artifacts(self) -> list[tuple[ArtifactRef, Embeddings]]:
        opened: list[tuple[ArtifactRef, Embeddings]] = []
        if self._job.store is None:
            return opened
        store = Store(self._job.store)
        for ref in store.finished("embeddings"):
            if len(opened) == EARLIER_ARTIFACTS:
                break
            if ref.meta.get("fingerprint") != self._job.fingerprint:
                continue
            try:
                opened.append((ref, open_embeddings(store.open(ref, "embeddings"))))
            except ArtifactError as error:
                logger.warning("encode: nothing is taken over from a damaged artifact: %s", error)
        return opened

    def fill(self, shard: Shard, prompt: str) -> None:
        """Copy the vectors of the texts that were encoded before with the same prompt."""
        for ref, embeddings in self._artifacts:
            for number in range(len(embeddings.sidecars)):
                if shard.done.all():
                    return
                if embeddings.sidecars[number].get("prompt") != prompt:
                    continue
                table = embeddings.table(number)
                there = np.frombuffer(b"".join(table.column("text").to_pylist()), dtype=f"S{DIGEST_BYTES}")
                order = np.argsort(there, kind="stable")
                wanted = np.flatnonzero(~shard.done)
                places = np.minimum(np.searchsorted(there, shard.digests[wanted], sorter=order), len(there) - 1)
                rows = order[places]
                same = there[rows] == shard.digests[wanted]
                vectors = embeddings.block(number)
                shard.vectors[wanted[same]] = vectors[rows[same]]
                for name, values in (("tokens", shard.tokens), ("lost", shard.lost)):
                    values[wanted[same]] = np.asarray(table.column(name))[rows[same]]
                shard.done[wanted[same]] = True
                if same.any():
                    self.found, self.name = self.found + int(same.sum()), str(ref)
