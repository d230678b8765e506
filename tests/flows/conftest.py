"""A small real corpus and the artifacts that the real stages make of it: what the tests of flows stand on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flows.promotion import Promotion, PromotionConfig, promote
from flows.registry import Registry
from flows.retriever import Release
from flows.stage import STAGES
from flows.tracking import TrackingConfig
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store, digest_of
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
    """data, model, other (a different model), embeddings, index, graph (another index of them), other_index."""
    store = Store(tmp_path_factory.mktemp("artifacts"))
    data = produce(store, "data", plain_config["data"])
    model = produce(store, "backbone", plain_config["backbone"])
    other = produce(store, "backbone", {**plain_config["backbone"], "pooling": "last"})
    made = {"data": data, "model": model, "other": other}
    for name, ref in (("", model), ("other_", other)):
        embeddings = produce(store, "encode", {}, data=data, model=ref)
        made |= {f"{name}embeddings": embeddings, f"{name}index": produce(store, "index", {"kind": "flat"}, embeddings=embeddings)}
    return {**made, "graph": produce(store, "index", {"kind": "hnsw"}, embeddings=made["embeddings"])}


@pytest.fixture
def release(artifacts: Mapping[str, ArtifactRef]) -> Release:
    """The model, its index and its data."""
    return Release(model=artifacts["model"], index=artifacts["index"], data=artifacts["data"])


class Nothing(Section):
    """An empty section."""

    label: str = ""


def report(
    store: Store,
    label: str,
    scores: Sequence[float],
    *,
    corpus: str = "same",
    recall: Sequence[float] | None = None,
    judged: Sequence[str] | None = None,
) -> ArtifactRef:
    """A report artifact with these per-query scores of ndcg_at_10, through the index as in exact search.

    recall: scores of recall_at_10, where there are any. judged: digest of each query's judgements, by default the same.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metrics = {"ndcg_at_10": scores, **({"recall_at_10": recall} if recall is not None else {})}
    judgements = judged or ["same"] * len(scores)

    def write(section: Nothing, inputs: Inputs, draft: Draft) -> None:
        means = {metric: float(np.mean(values)) for metric, values in metrics.items()}
        intervals = {metric: [mean - 0.05, mean + 0.05] for metric, mean in means.items()}
        content = {
            "scores": {"retrieval": means},
            "intervals": {"retrieval": intervals},
            "index_scores": {"retrieval": means},
            "index_intervals": {"retrieval": intervals},
            "queries": {"retrieval": len(scores)},
            "documents": {"retrieval": 100},
            "controls": {},
            "digests": {"retrieval": {"corpus": corpus, "queries": "same"}},
        }
        (draft.path / "report.json").write_text(json.dumps(content))
        rows = [
            {"task": "retrieval", "query_id": f"q{number}", "metric": metric, "judged": judged, "exact": score, "index": score}
            for metric, values in metrics.items()
            for number, (score, judged) in enumerate(zip(map(float, values), judgements, strict=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "per_query.parquet")

    content = digest_of([[[float(value) for value in values] for values in metrics.values()], corpus, list(judgements)])
    return store.produce(Stage("report", "report", 1, write), Nothing(label=f"{label} {content}"), {}, seed=0)


RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0.0, 0.3, 60)
GOOD = BASE + RANDOM.uniform(0.1, 0.5, 60)
BETTER = np.minimum(GOOD + RANDOM.uniform(0.0, 0.2, 60), 1.0)
RULE = PromotionConfig()


class Scene:
    """A store with a registry of its own, to release into. config: a YAML file that names both."""

    def __init__(self, folder: Path, artifacts: Mapping[str, ArtifactRef], plain: Mapping[str, Any]) -> None:
        self.store, self.artifacts = Store(folder), artifacts
        self.tracking = TrackingConfig(model_name="test")
        self.registry = Registry.at(self.tracking, folder)
        self.config = folder.with_suffix(".yaml")
        self.config.write_text(yaml.safe_dump({**plain, "store": str(folder), "tracking": {"model_name": "test"}}))

    def release(self, model: str = "model", index: str = "index") -> Release:
        return Release(model=self.artifacts[model], index=self.artifacts[index], data=self.artifacts["data"])

    def promote(self, release: Release, *, rule: PromotionConfig = RULE, pinned: bool = True, **scores: Any) -> Promotion:
        """Promote with reports of these scores of ndcg_at_10; of a mapping, with these arguments of `report`."""
        given = {name: values if isinstance(values, Mapping) else {"scores": values} for name, values in scores.items()}
        reports = {name: report(self.store, name, **values) for name, values in given.items()}
        release = release.model_copy(update={"reports": {name: ref for name, ref in reports.items() if name != "champion"}})
        return promote(self.registry, release, {name: ref.path for name, ref in reports.items()}, rule=rule, pinned=pinned)

    def refresh(self, tuned: Any, *, rule: PromotionConfig = RULE, before: Any = GOOD) -> Promotion:
        """A champion measured as `before`, then the same model with another index measured as `tuned`."""
        assert self.promote(self.release(), tuned=before, base=BASE).promoted
        return self.promote(self.release(index="graph"), rule=rule, tuned=tuned)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables made, once for all tests: that takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    Registry.at(TrackingConfig(), folder)
    return folder / "mlflow.db"


@pytest.fixture
def scene(
    tmp_path: Path,
    artifacts: Mapping[str, ArtifactRef],
    plain_config: Mapping[str, Any],
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(tmp_path)
    return Scene(store, artifacts, plain_config)
