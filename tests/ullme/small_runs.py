"""A small data set with known answers, and the artifacts made of it by the real stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import PREPARE, DataConfig
from ullme.encoding import ENCODE, EncodeConfig

DOCUMENTS = {
    "parse": "parse a date from an ISO string",
    "parse-copy": "Parse a date, from an ISO string!",
    "format": "format a date as an ISO string",
    "json": "parse a json document into objects",
    "sum": "sum all numbers of a list",
    "mean": "mean of all numbers of a list",
    "open": "open a file and read its lines",
    "close": "close a file after reading",
    "sort": "sort a list of numbers in place",
    "held": "parse a secret string from a file",
    "free": "read a date from a file, line by line",
}
QUERIES = {
    "q1": "parse an ISO date string",
    "q2": "sum the numbers in a list",
    "q3": "open and read a file",
    "d1": "close a file",
    "t1": "parse a secret string",
    "t2": "sort numbers",
}
QRELS = {
    "train": {"q1": {"parse": 2, "format": 1}, "q2": {"sum": 1}, "q3": {"open": 1}},
    "dev": {"d1": {"close": 1}},
    "test": {"t1": {"held": 2, "json": 1}, "t2": {"sort": 1}},
}


def write_beir(
    folder: Path,
    *,
    documents: Mapping[str, str] = DOCUMENTS,
    queries: Mapping[str, str] = QUERIES,
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]] = QRELS,
) -> Path:
    """A folder in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, judged in qrels.items():
        rows = [f"{query}\t{doc}\t{grade}" for query, grades in judged.items() for doc, grade in grades.items()]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n", encoding="utf-8")
    return folder


def beir_data(store: Store, folder: Path) -> ArtifactRef:
    """The data artifact of a BEIR folder."""
    return data(store, {"kind": "beir", "path": str(folder)})


def data(store: Store, source: Mapping[str, Any]) -> ArtifactRef:
    """The data artifact of a source."""
    return store.produce(PREPARE, DataConfig.model_validate({"source": source}).resolved(), {}, seed=0)


def tiny_model(store: Store, *, seed: int = 0, pooling: str = "mean") -> ArtifactRef:
    """A random two-layer model."""
    config = BackboneConfig.model_validate({"model": "tiny:llama", "dtype": "float32", "max_tokens": 64, "pooling": pooling})
    return store.produce(BACKBONE, config.resolved(), {}, seed=seed)


def encoded(store: Store, data_ref: ArtifactRef, model: ArtifactRef) -> ArtifactRef:
    """The embeddings artifact of a corpus."""
    return store.produce(ENCODE, EncodeConfig(), {"data": data_ref, "model": model}, seed=0)
