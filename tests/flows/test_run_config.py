# ruff: noqa: E501 - messages are compared whole
"""Configuration: every mistake at once, each in one clear line; what is read is what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from flows.config import RunConfig, load, to_yaml, validate
from flows.pipeline import Pipeline
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store
from ullme.components import component_class, kinds
from ullme.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GOOD = """
data: {source: {kind: pydocs}}
backbone: {model: "tiny:llama"}
training:
  phases:
    - objective: {kind: grl, beta: 0.1}
      steps: 6
index: {kind: hnsw, m: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return [line.replace(str(file), "F") for line in caught.value.problems]


def test_three_mistakes_are_three_lines(file: Path) -> None:
    file.write_text(GOOD.replace("pydocs", "pydcs").replace("0.1", "q").replace("steps: 6", "stepps: 6\n      steps: 6"))
    lines = problems(file)
    assert lines == [
        "F: data.source: unknown kind 'pydcs'; allowed: beir, hub, jsonl, parquet, pydocs, text; did you mean 'pydocs'?",
        "F: training.phases.0.objective.beta: expected a number, got 'q'",
        lines[2],
    ]
    assert lines[2].startswith("F: training.phases.0.stepps: unknown key 'stepps'; allowed: objective, steps,")
    assert lines[2].endswith("did you mean 'steps'?")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=-1", "--set seed: expected a number >= 0, got -1"),
        ("seed=x", "--set seed: expected a whole number, got 'x'"),
        ("backbone.pooling=men", "--set backbone.pooling: expected one of mean, weighted_mean, last, first, max, latent_attention, special, got 'men'; did you mean 'mean'?"),
        ("training.phases=[]", "--set training.phases: expected at least 1 entries, got 0"),
        ("training.phases=3", "--set training.phases: expected a list, got 3"),
        ("training.adapter.targets=3", "--set training.adapter.targets: expected text or a list, got 3"),
        ("training.phases.0.mixture={datasets: {pydoc: {}}}", "F: training.phases.0.mixture.datasets: 'pydoc' is no data set of this run; allowed: pydocs; did you mean 'pydocs'?"),
        ("training.adapter=null", "F: training: phases.0: objective 'grl' compares with the model as it was when the phase began, and every weight is trained; set phases.0.generation.reference: stored, or adapter"),
        ("index.efsearch=3", "--set index.efsearch: unknown key 'efsearch'; allowed: kind, refine, k_factor, min_recall, max_memory_gb, max_stale, m, ef_construction, ef_search, codes; did you mean 'ef_search'?"),
        ("mining.miner={kind: mixed, miners: [{kind: bm25, depht: 3}]}", "--set mining.miner.miners.0.depht: unknown key 'depht'; allowed: kind, num_negatives, depth, skip_top, sampling, lexical; did you mean 'depth'?"),
        ("data.source.truncate=1", "--set data.source.truncate: unknown key 'truncate'"),
        ("trainig.x=1", "--set trainig: unknown key 'trainig'"),
        ("training.phases.1.steps=3", "--set training.phases.1.steps: training.phases is a list, expected the position of an entry, got '1'; allowed: 0"),
        ("training.phases.x.steps=3", "--set training.phases.x.steps: training.phases is a list, expected the position of an entry, got 'x'; allowed: 0"),
        ("backbone.model.name=3", "--set backbone.model.name: backbone.model is the value 'tiny:llama' and has no 'name' below it"),
        ("backbone.model", "--set backbone.model: expected a.b.c=value, as in --set training.phases.0.steps=20"),
        ("seed=[", "--set seed: '[' is not valid YAML; quote it"),
        ("promotion.metric=ndcg_at_5", "F: promotion.metric: 'ndcg_at_5' is not in evaluation.metrics"),
        ("promotion.task=retrival", "F: promotion.task: 'retrival' is not in evaluation.tasks; allowed: retrieval; did you mean 'retrieval'?"),
        ("evaluation.metrics=[ndgc_at_10]", "--set evaluation.metrics: unknown metric 'ndgc_at_10'"),
    ],
)  # fmt: skip
def test_each_mistake_in_words(file: Path, change: str, line: str) -> None:
    found = problems(file, change)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_what_is_missing_is_named(file: Path) -> None:
    file.write_text("data: {source: {kind: beir}}\nbackbone: {}\n")
    assert problems(file) == [
        "F: data.source.path: required, but not there",
        "F: backbone.model: required, but not there",
        "F: training: required, but not there",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "F:1:6: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\nseed: 2\n", "F:2:1: not valid YAML: key 'seed' stands twice"),
        ("- 1\n", "F: expected a mapping of sections (seed, store, data, "),
        ("", "F: expected a mapping of sections"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    assert problems(file)[0].startswith(line)


def test_a_file_that_is_not_there_names_the_nearest(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"runn.yaml: no such file; did you mean 'run.yaml'\?"):
        load(file.with_name("runn.yaml"))


def test_overrides_are_read_as_yaml_and_reach_lists_and_components(file: Path) -> None:
    changes = ["training.phases.0.objective.beta=0.2", "training.generation_adapter=null", "encoding.runtime.batch_tokens=100"]
    config = load(file, changes)
    objective: Any = config.training.phases[0].objective
    assert (objective.kind, objective.beta, config.training.generation_adapter) == ("grl", 0.2, None)
    assert config.encoding.runtime.batch_tokens == 100


def test_setting_another_kind_drops_the_fields_of_the_former(file: Path) -> None:
    found = load(file, ["index.kind=flat"]).index.model_dump()
    assert (found["kind"], found["codes"]) == ("flat", "fp32")
    assert not {"m", "ef_search"} & found.keys()
    same: Any = load(file, ["index.kind=hnsw"]).index
    assert same.m == 8


def test_a_component_given_by_name_can_be_refined(file: Path) -> None:
    file.write_text(GOOD.replace("{kind: hnsw, m: 8}", "hnsw"))
    found: Any = load(file, ["index.m=4"]).index
    assert found.m == 4


def test_the_store_is_made_absolute_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load(file).store == file.parent / ".store"


def test_yaml_of_a_configuration_reads_back_to_the_same(file: Path) -> None:
    config = load(file, ["training.phases.0.learning_rate=1.0e-5"])
    file.write_text(to_yaml(config))
    assert load(file) == config
    assert validate(config.as_json()) == config


def test_resolved_twice_is_resolved(plain_config: dict[str, Any]) -> None:
    once = validate(plain_config).resolved()
    assert once.resolved() == once
    assert once.data.source_digest
    assert once.backbone.source_digest
    assert validate(once.as_json()).resolved() == once


def test_a_guide_is_named_by_its_contents_and_one_that_is_missing_is_one_line(file: Path) -> None:
    (found,) = problems(file, "training.phases.0.objective={kind: distill}")
    assert found == "F: training.phases.0: guide: objective 'distill' compares with one; set guide: {model: FOLDER}"
    folder = file.parent / "guide"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = load(file, ["training.phases.0.objective={kind: distill}", f"training.phases.0.guide={{model: {folder}}}"])
    once = config.resolved()
    guide = once.training.phases[0].guide
    assert guide is not None
    assert guide.source_digest
    assert once.resolved() == once
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="expected a folder of an embedding model"):
        config.resolved()


# The files that are shipped


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_right(path: Path) -> None:
    load(path)


def fields(model: type[BaseModel], raw: Any, place: str = "") -> list[str]:
    """Fields that a mapping lacks, at every depth."""
    missing = []
    for name, field in model.model_fields.items():
        here = f"{place}.{name}" if place else name
        if not isinstance(raw, dict) or name not in raw:
            missing.append(here)
            continue
        if get_origin(field.annotation) is dict:
            continue  # names of the user's own
        found = [
            arg for arg in (field.annotation, *get_args(field.annotation)) if isinstance(arg, type) and issubclass(arg, BaseModel)
        ]
        if found and isinstance(raw[name], dict) and "kind" not in raw[name]:
            missing += fields(found[0], raw[name], here)
        elif found and isinstance(raw[name], list) and "kind" not in raw[name][0]:
            missing += fields(found[0], raw[name][0], here)
    return missing


def test_the_reference_has_every_field_of_every_section() -> None:
    assert fields(RunConfig, yaml.safe_load((CONFIGS / "reference.yaml").read_text())) == []


@pytest.mark.parametrize("package", ["ullme.sources", "ullme.miners", "ullme.objectives", "ullme.tasks", "indexes"])
def test_the_reference_names_every_field_of_every_kind(package: str) -> None:
    text = (CONFIGS / "reference.yaml").read_text()
    missing = [
        f"{kind}.{name}"
        for kind in kinds(package)
        for name in component_class(package, kind).model_fields
        if not re.search(rf"\b{name}\b" if name != "kind" else rf"kind: {kind}\b", text)
    ]
    assert missing == []


def test_the_reference_shows_the_defaults(tmp_path: Path) -> None:
    config = load(CONFIGS / "reference.yaml")
    least = {"data": {"source": {"kind": "pydocs"}}, "backbone": {"model": "tiny:llama"}}
    training = {"phases": [{"objective": {"kind": "grl"}, "steps": 200}]}
    assert config == validate({**least, "training": training, "store": str(config.store)})


# Keys


def key(config: RunConfig, name: str) -> str:
    pipeline = Pipeline(config)
    step = pipeline.steps[name]
    refs = {name: ArtifactRef(kind="x", uri="/x", digest=source) for name, source in step.inputs.items()}
    return Store("/x").key(STAGES[step.stage].stage, step.section, refs, seed=step.seed)


STEPS = ("data", "backbone", "mine", "train", "encode tuned", "index", "evaluate tuned")


@pytest.mark.parametrize(
    "change", ["training.runtime.chunk_tokens=99", "training.runtime.checkpoint_every=3", "encoding.runtime.shard_rows=7", "tracking.experiment=x", "promotion.alpha=0.01"]
)  # fmt: skip
def test_what_does_not_change_a_result_changes_no_key(file: Path, change: str) -> None:
    assert [key(load(file, [change]), name) for name in STEPS] == [key(load(file), name) for name in STEPS]


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ("data.max_documents=10", {"data"}),
        ("data.source.min_words=4", {"data"}),
        ("backbone.pooling=last", {"backbone"}),
        ("backbone.prompts.query='Q: '", {"backbone"}),
        ("mining.miner.depth=50", {"mine"}),
        ("training.phases.0.objective.beta=0.2", {"train"}),
        ("training.adapter.rank=2", {"train"}),
        ("index.kind=flat", {"index"}),
        ("index.ef_search=9", {"index"}),
        ("evaluation.top_k=200", {"evaluate tuned"}),
        ("seed=1", {"mine", "train", "index", "evaluate tuned"}),
    ],
)
def test_what_changes_a_result_changes_the_key_of_its_stage(file: Path, change: str, steps: set[str]) -> None:
    before, after = load(file), load(file, [change])
    assert {name for name in STEPS if key(before, name) != key(after, name)} == steps
