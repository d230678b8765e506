"""The plan of a run: what is reused, what is run and why, and how a champion takes part."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import produce

from flows.child import run_stages
from flows.config import RunConfig, validate
from flows.pipeline import Pipeline
from flows.retriever import Release
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store
from ullme.components import resolve
from ullme.errors import ArtifactError, StageFailed


@pytest.fixture
def config(plain_config: Mapping[str, Any], tmp_path: Path) -> RunConfig:
    return validate({**plain_config, "store": str(tmp_path)}).resolved()


def whys(pipeline: Pipeline) -> dict[str, str]:
    return {planned.step.name: planned.why for planned in pipeline.plan()}


def test_nothing_is_there_at_first(config: RunConfig) -> None:
    plan = whys(Pipeline(config))
    assert plan["data"] == plan["backbone"] == "no artifact yet"
    assert plan["mine"] == "data will be new"
    assert plan["train"] == "data, backbone, mine will be new"
    assert plan["evaluate bm25"] == "data will be new"
    assert not any("champion" in name for name in plan)


def test_what_is_there_is_reused_and_what_is_damaged_is_not(config: RunConfig) -> None:
    data = produce(Store(config.store), "data", config.data)
    plan = Pipeline(config).plan()
    assert plan[0].ref == data
    assert str(plan[0]) == f"reuse {data}"
    (data.path / "queries.parquet").write_bytes(b"")
    assert whys(Pipeline(config))["data"].startswith("the artifact is damaged: data/")


def test_a_miner_that_needs_a_model_waits_for_it(config: RunConfig, plain_config: Mapping[str, Any]) -> None:
    other = validate({**plain_config, "store": str(config.store), "mining": {"miner": {"kind": "topk"}}}).resolved()
    assert Pipeline(config).steps["mine"].inputs == {"data": "data"}
    assert Pipeline(other).steps["mine"].inputs == {"data": "data", "model": "backbone"}


def test_a_second_round_mines_with_what_the_first_has_trained(config: RunConfig, plain_config: Mapping[str, Any]) -> None:
    mining = {"rounds": 2, "first": {"kind": "bm25", "num_negatives": 2}, "miner": {"kind": "topk", "num_negatives": 2}}
    pipeline = Pipeline(validate({**plain_config, "store": str(config.store), "mining": mining}).resolved(), until="train")
    assert list(pipeline.steps) == ["data", "backbone", "mine 1", "train 1", "mine", "train"]
    assert pipeline.steps["mine"].inputs == {"data": "data", "model": "train 1"}
    for name, step in pipeline.steps.items():
        refs = {source: pipeline.made[made] for source, made in step.inputs.items()}
        pipeline.made[name] = pipeline.store.produce(STAGES[step.stage].stage, step.section, refs, seed=step.seed)
    first, second = (pipeline.made[name] for name in ("mine 1", "mine"))
    assert pipeline.store.manifest(second)["provenance"]["inputs"]["model"]["digest"] == pipeline.made["train 1"].digest
    assert (first.path / "negatives.parquet").read_bytes() != (second.path / "negatives.parquet").read_bytes()
    assert pipeline.made["train"].digest != pipeline.made["train 1"].digest


def test_a_champion_is_encoded_indexed_and_measured_unless_it_is_the_tuned_model(
    config: RunConfig, release: Release, artifacts: Mapping[str, ArtifactRef]
) -> None:
    pipeline = Pipeline(config, release)
    assert pipeline.named("evaluate") == ["evaluate bm25", "evaluate base", "evaluate tuned", "evaluate champion"]
    assert pipeline.named("index") == ["index", "index champion"]
    assert pipeline.steps["index champion"].section == pipeline.steps["index"].section
    pipeline.made["train"] = artifacts["model"]
    assert pipeline.named("encode", "evaluate") == [
        "evaluate bm25",
        "encode base",
        "encode tuned",
        "evaluate base",
        "evaluate tuned",
    ]


def test_comparing_through_the_index_indexes_the_base_model_too(config: RunConfig, plain_config: Mapping[str, Any]) -> None:
    assert "index base" not in Pipeline(config).steps
    through = validate({**plain_config, "promotion": {"through": "index"}, "store": str(config.store)}).resolved()
    assert Pipeline(through).steps["evaluate base"].inputs["index"] == "index base"


# A refresh: the released model, the documents as they are now


def test_a_refresh_trains_nothing_and_measures_only_what_it_releases(config: RunConfig, release: Release) -> None:
    pipeline = Pipeline(config, release, model="champion")
    assert list(pipeline.steps) == ["data", "encode tuned", "index", "evaluate tuned"]
    assert pipeline.steps["encode tuned"].inputs == {"data": "data", "model": "champion"}
    assert pipeline.made["champion"] == release.model


def test_a_refresh_without_a_released_model_says_what_to_do(config: RunConfig) -> None:
    with pytest.raises(ArtifactError, match="nothing to refresh; run train-and-index first"):
        Pipeline(config, None, model="champion")


def test_nothing_is_new_until_a_document_changes(config: RunConfig, code: Path, tmp_path: Path) -> None:
    store = Store(config.store)
    model = produce(store, "backbone", config.backbone)
    made = released(config, model)
    assert Pipeline(config, made, model="champion").nothing_new()
    folder = tmp_path / "code"
    shutil.copytree(code, folder)
    source = config.data.source.model_copy(update={"roots": (folder,)})
    same = config.model_copy(update={"data": config.data.model_copy(update={"source": source, "source_digest": ""})})
    assert not Pipeline(same.resolved(), made, model="champion").nothing_new()  # another place: the paths are in the section
    made = released(same.resolved(), model)
    assert Pipeline(same.resolved(), made, model="champion").nothing_new()
    (folder / "module0.py").write_text((folder / "module0.py").read_text().replace("total = 3", "total = 4"))
    changed = Pipeline(same.resolved(), made, model="champion")
    assert not changed.nothing_new()
    assert changed.planned("data").why == "no artifact yet"
    another_index = same.model_copy(update={"index": validate_index("hnsw")}).resolved()
    assert not Pipeline(another_index, made, model="champion").nothing_new()


def released(config: RunConfig, model: ArtifactRef) -> Release:
    """Make everything of a refresh in this process."""
    pipeline = Pipeline(config, Release(model=model, index=model, data=model), model="champion")
    for name, step in pipeline.steps.items():
        refs = {source: pipeline.made[made] for source, made in step.inputs.items()}
        pipeline.made[name] = pipeline.store.produce(STAGES[step.stage].stage, step.section, refs, seed=step.seed)
    return pipeline.release()


def validate_index(kind: str) -> Any:
    return resolve("indexes", kind)


@pytest.mark.parametrize(
    ("until", "last"),
    [("mine", ["mine"]), ("train", ["train"]), ("encode", ["encode tuned"]), ("index", ["index"])],
)
def test_one_stage_takes_only_what_it_needs(until: str, last: list[str], config: RunConfig, release: Release) -> None:
    steps = list(Pipeline(config, release, until=until).steps)
    order = ["data", "backbone", "mine", "train", "encode tuned", "index"]
    assert steps == [name for name in order[: order.index(last[0]) + 1] if not (until == "mine" and name == "backbone")]


def test_evaluating_alone_takes_every_report_and_of_the_champion_only_its_own(config: RunConfig, release: Release) -> None:
    assert list(Pipeline(config, release, until="evaluate").steps) == list(Pipeline(config, release).steps)
    assert list(Pipeline(config, release, model="champion", until="encode").steps) == ["data", "encode tuned"]


# Where training starts


def test_training_starts_from_the_champion_where_that_is_asked_for_and_there_is_one(
    plain_config: Mapping[str, Any], config: RunConfig, release: Release
) -> None:
    training = {**plain_config["training"], "start_from": "champion"}
    onward = validate({**plain_config, "training": training, "store": str(config.store)}).resolved()
    assert Pipeline(config, release).steps["train"].inputs["model"] == "backbone"
    assert Pipeline(onward, release).steps["train"].inputs["model"] == "champion"
    assert Pipeline(onward).steps["train"].inputs["model"] == "backbone"


def test_a_champion_that_this_training_made_is_not_trained_once_more(
    plain_config: Mapping[str, Any], config: RunConfig, artifacts: Mapping[str, ArtifactRef]
) -> None:
    training = {**plain_config["training"], "start_from": "champion"}
    onward = validate({**plain_config, "training": training, "store": str(config.store)}).resolved()
    first = Pipeline(
        onward, Release(model=artifacts["other"], index=artifacts["other_index"], data=artifacts["data"]), until="train"
    )
    for name in ("data", "mine", "train"):
        (first.made[name], _), *_ = run_stages(onward.store, [first.request(name)], lambda line: None)
    crowned = Release(model=first.made["train"], index=artifacts["index"], data=artifacts["data"])
    again = Pipeline(onward, crowned, until="train")
    assert [str(planned.ref) for planned in again.plan()] == [str(first.made[name]) for name in again.steps]
    assert again.request("train").refs["model"].digest == artifacts["other"].digest


def test_a_child_process_makes_several_stages_and_forwards_their_lines(config: RunConfig) -> None:
    pipeline, lines = Pipeline(config), []
    made = run_stages(config.store, [pipeline.request("data"), pipeline.request("backbone")], lines.append)
    assert [ref for ref, _ in made] == [pipeline.planned("data").ref, pipeline.planned("backbone").ref]
    assert any(line[9:].startswith("data: made data/") for line in lines)


def test_bad_data_is_the_users_mistake_in_one_line(tmp_path: Path, plain_config: Mapping[str, Any]) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"query": "a", "pos": ["b"]}\nnot json\n')
    source = {"source": {"kind": "jsonl", "path": str(folder)}}
    pipeline = Pipeline(validate({**plain_config, "data": source, "store": str(tmp_path)}).resolved())
    with pytest.raises(StageFailed) as caught:
        run_stages(tmp_path, [pipeline.request("data")], lambda line: None)
    assert (caught.value.stage, caught.value.cause, caught.value.exit_code) == ("data", "DataError", 2)
    assert "train.jsonl:2" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_crash_names_the_stage_and_keeps_its_last_lines(config: RunConfig) -> None:
    request = Pipeline(config).request("data")
    with pytest.raises(StageFailed) as caught:
        run_stages(config.store, [request.model_copy(update={"key": "x"})], lambda line: None)
    assert "expected the artifact key x" in str(caught.value)
    with pytest.raises(StageFailed) as caught:
        run_stages(config.store, [request.model_copy(update={"stage": "nothing"})], lambda line: None)
    assert "stage data ended with exit code 1" in str(caught.value)
    assert any("KeyError" in line for line in caught.value.log_tail)
    assert caught.value.exit_code == 1
