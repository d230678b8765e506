"""The plan of a run: what is reused, what is run and why, and how a champion takes part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import produce

from flows.child import run_stages
from flows.config import RunConfig, validate
from flows.pipeline import Pipeline
from flows.retriever import Release
from ullme.artifacts import ArtifactRef, Store
from ullme.errors import StageFailed


@pytest.fixture
def config(plain_config: Mapping[str, Any], tmp_path: Path) -> RunConfig:
    return validate({**plain_config, "store": str(tmp_path)}).resolved()


def whys(pipeline: Pipeline) -> dict[str, str]:
    return {planned.step.name: planned.why for planned in pipeline.plan()}


def test_nothing_is_there_at_first(config: RunConfig) -> None:
    plan = whys(Pipeline(config))
    assert plan["data"] == plan["backbone"] == "no artifact yet"
    assert plan["mine"] == "data will be new"
    assert plan["train"] == "data, mine, backbone will be new"
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


def test_a_champion_is_encoded_indexed_and_measured_unless_it_is_the_tuned_model(
    config: RunConfig, release: Release, artifacts: Mapping[str, ArtifactRef]
) -> None:
    pipeline = Pipeline(config, release)
    assert pipeline.named("evaluate") == ["evaluate bm25", "evaluate base", "evaluate tuned", "evaluate champion"]
    assert pipeline.named("index") == ["index", "index champion"]
    assert pipeline.steps["index champion"].section == pipeline.steps["index"].section
    pipeline.made["train"] = artifacts["model"]
    assert pipeline.named("encode", "evaluate") == [
        "encode base",
        "encode tuned",
        "evaluate bm25",
        "evaluate base",
        "evaluate tuned",
    ]


def test_comparing_through_the_index_indexes_the_base_model_too(config: RunConfig, plain_config: Mapping[str, Any]) -> None:
    assert "index base" not in Pipeline(config).steps
    through = validate({**plain_config, "promotion": {"through": "index"}, "store": str(config.store)}).resolved()
    assert Pipeline(through).steps["evaluate base"].inputs["index"] == "index base"


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
