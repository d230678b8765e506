"""What mining negatives from a large pool costs in memory: bytes per further document.

    python benchmarks/mine_memory.py --json mine_memory.json     10,000, 100,000 and 300,000 documents
    python benchmarks/mine_memory.py --quick                     60,000 and 160,000, under 5 minutes

The whole mine stage, nearest vectors with BM25 measured beside it, 500 queries; once with the vectors of an encode stage
(`cached`), once encoding the pool itself (`scratch`). Documents are short texts, no two alike, with a word in each that no other
has; the model is a stub that looks its vectors, 576 numbers in float16, up in a small table. Noted is the most memory that the
process had resident while the stage ran; `bytes_per_document` is the slope of the straight line through it, `share_of_vectors`
that over the 1152 bytes of a vector. It must not exceed a tenth. Huge pages are off: the system forms them when it has time to, and
they round memory up by more than what is measured here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

COUNTS, QUICK_COUNTS = (10_000, 100_000, 300_000), (60_000, 160_000)
QUERIES = 500
MOST_SHARE = 0.1
NO_HUGE_PAGES = 41  # PR_SET_THP_DISABLE of Linux


def write_artifacts(folder: Path, count: int) -> int:
    """A data set, a model that is no more than a name, and the vectors of the one by the other; the bytes of a vector."""
    from encode_memory import stub, texts_of

    from ullme.artifacts import Draft, Inputs, Stage, Store
    from ullme.components import Section
    from ullme.data import counted, write_tables
    from ullme.records import Document, Query
    from ullme.shards import Shard, shard_name

    encoder, store = stub(), Store(folder / "store")
    documents = [Document(f"d{number}", text) for number, text in enumerate(texts_of(count))]
    every = max(1, count // QUERIES)
    queries = [Query(f"q{number}", documents[number].text, "train", {f"d{number}": 1}) for number in range(0, count, every)]

    def data(_section: Section, _inputs: Inputs, draft: Draft) -> None:
        write_tables(draft.path, documents, queries, "memory")
        draft.meta |= counted(documents, queries)

    def model(_section: Section, _inputs: Inputs, draft: Draft) -> None:
        (draft.path / "stub.txt").write_text("stub")

    refs = {"data": store.produce(Stage("memory", "data", 1, data), Section(), {}, seed=0)}
    refs["model"] = store.produce(Stage("stub", "model", 1, model), Section(), {}, seed=0)

    def embeddings(_section: Section, _inputs: Inputs, draft: Draft) -> None:
        shards = range(0, count, 10_000)
        common = {"fingerprint": refs["model"].digest, "dim": encoder.dim, "prompt": "", "input": "", "shards": len(shards)}
        for number, start in enumerate(shards):
            some = documents[start : start + 10_000]
            shard = Shard.of(some, encoder.dim)
            shard.vectors[:] = encoder.encode([document.text for document in some])
            shard.write(draft.path, shard_name(number), {**common, "rows": len(some)})

    refs["embeddings"] = store.produce(Stage("vectors", "embeddings", 1, embeddings), Section(), refs, seed=0)
    (folder / "refs.json").write_text(json.dumps({name: ref.model_dump(mode="json") for name, ref in refs.items()}))
    return np.dtype(np.float16).itemsize * encoder.dim


def run(folder: Path, way: str) -> dict[str, Any]:
    """Mine in this process, whose memory holds nothing else."""
    from encode_memory import stub

    from ullme.artifacts import ArtifactRef, Store
    from ullme.encoder import Encoder
    from ullme.mining import MINE, MiningConfig

    refs = {name: ArtifactRef.model_validate(ref) for name, ref in json.loads((folder / "refs.json").read_text()).items()}
    if way == "scratch":
        refs.pop("embeddings")
    ctypes.CDLL(None).prctl(NO_HUGE_PAGES, 1, 0, 0, 0)
    encoder, status = stub(), Path("/proc/self/status")
    encoder.encode(["warm"] * 64)
    section = MiningConfig.model_validate({"miner": {"kind": "topk"}, "teacher_queries": QUERIES})
    Path("/proc/self/clear_refs").write_text("5")  # what was most so far is forgotten
    started = time.perf_counter()
    with mock.patch.object(Encoder, "load", return_value=encoder):
        made = Store(folder / "store").produce(MINE, section, refs, seed=0)
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return {
        "most_resident_mb": round(int(found[1]) * 1024 / 1e6, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "mined": made.meta["mined"],
    }


def measure(counts: Sequence[int]) -> dict[str, Any]:
    """Each number of documents in each way, in a fresh process."""
    from flows.child import ENVIRONMENT

    def child(*given: str) -> Any:
        command = [sys.executable, __file__, *given]
        done = subprocess.run(command, env={**ENVIRONMENT, **os.environ}, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    rows: dict[str, list[dict[str, Any]]] = {"cached": [], "scratch": []}
    result: dict[str, Any] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="ullme-memory-") as folder:
            result["vector_bytes"] = child("--write", folder, str(count))
            for way, found in rows.items():
                found.append({"documents": count, **child("--run", folder, way)})
    for way, found in rows.items():
        slope = float(np.polyfit([row["documents"] for row in found], [1e6 * row["most_resident_mb"] for row in found], 1)[0])
        share = round(slope / result["vector_bytes"], 4)
        result[way] = {"bytes_per_document": round(slope, 1), "share_of_vectors": share, "runs": found}
    return result


def main(given: Sequence[str]) -> None:
    """Measure, print, and write JSON."""
    if given[:1] == ["--write"]:
        print(write_artifacts(Path(given[1]), int(given[2])))
        return
    if given[:1] == ["--run"]:
        print(json.dumps(run(Path(given[1]), given[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="fewer documents")
    arguments = parser.parse_args(given)
    from encode import machine

    result = {**measure(QUICK_COUNTS if arguments.quick else COUNTS), "machine": machine()}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    for way in ("cached", "scratch"):
        if result[way]["share_of_vectors"] > MOST_SHARE:
            raise SystemExit(
                f"{way}: expected at most {MOST_SHARE:.0%} of a vector a document, got {result[way]['share_of_vectors']:.1%}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
