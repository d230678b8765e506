"""A small real corpus and the artifacts that the real stages make of it: what the tests of flows stand on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.retriever import Release
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.components import Section

FUNCTIONS = '''
def {name}(values):
    """Return the {what} of all values in the list."""
    total = {number}
    for value in values:
        total += value * {number}
    return total
'''
WORDS = ("sum", "mean", "median", "product", "maximum", "minimum", "variance", "length", "square", "root", "count", "range")


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny modules with documented functions."""
    root = tmp_path_factory.mktemp("code")
    for module in range(12):
        text = "\n".join(
            FUNCTIONS.format(name=f"{word}_{module}", what=f"{word} number {module}", number=module * 100 + place)
            for place, word in enumerate(WORDS)
        )
        (root / f"module{module}.py").write_text(text)
    return root


@pytest.fixture(scope="session")
def plain_config(code: Path) -> dict[str, Any]:
    """The plain form of a run that takes seconds."""
    return {
        "data": {"source": {"kind": "pydocs", "roots": [str(code)], "test_share": 0.4, "dev_share": 0.1}, "max_documents": 60},
        "backbone": {"model": "tiny:llama", "dtype": "float32", "max_tokens": 48},
        "training": {"phases": [{"objective": {"kind": "contrastive"}, "steps": 2, "batch_size": 4}], "adapter": {"rank": 2}},
        "index": {"kind": "flat"},
    }


def produce(store: Store, stage: str, section: Any, **refs: ArtifactRef) -> ArtifactRef:
    """Run one stage in this process."""
    work = STAGES[stage]
    return store.produce(work.stage, section if isinstance(section, Section) else work.section(section), refs, seed=0)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, plain_config: Mapping[str, Any]) -> dict[str, ArtifactRef]:
    """data, model, other (a different model), embeddings, index, other_index."""
    store = Store(tmp_path_factory.mktemp("artifacts"))
    data = produce(store, "data", plain_config["data"])
    model = produce(store, "backbone", plain_config["backbone"])
    other = produce(store, "backbone", {**plain_config["backbone"], "pooling": "last"})
    made = {"data": data, "model": model, "other": other}
    for name, ref in (("", model), ("other_", other)):
        embeddings = produce(store, "encode", {}, data=data, model=ref)
        made |= {f"{name}embeddings": embeddings, f"{name}index": produce(store, "index", {"kind": "flat"}, embeddings=embeddings)}
    return made


@pytest.fixture
def release(artifacts: Mapping[str, ArtifactRef]) -> Release:
    """The model, its index and its data."""
    return Release(model=artifacts["model"], index=artifacts["index"], data=artifacts["data"])


class Nothing(Section):
    """An empty section."""

    label: str = ""


def report(store: Store, label: str, scores: Sequence[float], *, corpus: str = "same") -> ArtifactRef:
    """A report artifact with these per-query scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(section: Nothing, inputs: Inputs, draft: Draft) -> None:
        mean = float(np.mean(scores))
        content = {
            "scores": {"retrieval": {"ndcg_at_10": mean}},
            "intervals": {"retrieval": {"ndcg_at_10": [mean - 0.05, mean + 0.05]}},
            "index_scores": None,
            "index_intervals": None,
            "queries": {"retrieval": len(scores)},
            "documents": {"retrieval": 100},
            "controls": {},
            "digests": {"retrieval": {"corpus": corpus, "queries": "same"}},
        }
        (draft.path / "report.json").write_text(json.dumps(content))
        rows = [
            {"task": "retrieval", "query_id": f"q{number}", "metric": "ndcg_at_10", "exact": float(score), "index": None}
            for number, score in enumerate(scores)
        ]
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "per_query.parquet")

    return store.produce(Stage("report", "report", 1, write), Nothing(label=label), {}, seed=0)
