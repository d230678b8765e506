"""The deployments of prefect.yaml on a real Prefect server with a real worker: schedules, queues, triggers, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_stack import ROOT, PrefectStack, until

NIGHTLY, WEEKLY, EVALUATE = "refresh/nightly-refresh", "train-and-index/weekly-train-and-index", "evaluate/evaluate"


def test_the_shipped_plan_names_no_folder_queues_and_says_in_which_time_zone() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    plan = yaml.safe_load(text)
    assert str(ROOT) not in text
    assert [deployment["name"] for deployment in plan["deployments"]] == ["nightly-refresh", "weekly-train-and-index", "evaluate"]
    for deployment in plan["deployments"]:
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert deployment["work_pool"] == {"name": "ullme"}
        assert all(schedule["timezone"] for schedule in deployment["schedules"])
        assert (ROOT / deployment["parameters"]["config"]).is_file()


@pytest.fixture(scope="module")
def config(plain_config: Mapping[str, Any]) -> dict[str, Any]:
    return {**plain_config, "store": ".store", "promotion": {"alpha": 0.99}}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, config: Mapping[str, Any]) -> Iterator[PrefectStack]:
    """Everything deployed, every schedule due each minute, a model released, and a worker."""
    stack = PrefectStack(tmp_path_factory.mktemp("deployments"))
    try:
        stack.start_server()
        stack.deploy(config, cron="* * * * *")
        done = stack.command("ullme", "run", "train-and-index", "--config", "configs/tiny.yaml")
        assert "new champion" in done.stdout, done.stdout + done.stderr
        yield stack.start_worker()
    finally:
        stack.close()


@pytest.mark.slow
def test_a_deployment_runs_where_it_was_deployed_from_by_the_name_of_its_module(stack: PrefectStack) -> None:
    for name, entrypoint in (
        (NIGHTLY, "flows.refresh.refresh"),
        (WEEKLY, "flows.train_and_index.train_and_index"),
        (EVALUATE, "flows.stages.evaluate"),
    ):
        deployment = stack.deployment(name)
        assert deployment["entrypoint"] == entrypoint
        assert deployment["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": str(stack.project)}}]
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (5, "field 'config'. Failure reason: 5 is not valid"),
        (
            {"training": {"phases": [{"objective": {"kind": "contrastive"}, "steps": "many"}]}},
            "phases[0].steps'. Failure reason: 'many'",
        ),
        ({"index": {"kind": "flatt"}}, "field 'config.index'. Failure reason: {'kind': 'flatt'}"),
        ({"colour": 1}, "'colour' was unexpected"),
    ],
    ids=["no configuration", "words for a number", "unknown kind", "unknown key"],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_before_anything_is_queued(
    change: Any, said: str, stack: PrefectStack, config: Mapping[str, Any]
) -> None:
    wrong = {**config, **change} if isinstance(change, dict) else change
    deployment = stack.deployment(EVALUATE)["id"]
    before = len(stack.runs(EVALUATE))
    answer = stack.ask("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"config": wrong}})
    assert answer.status_code == 409
    assert said in answer.json()["detail"]
    assert len(stack.runs(EVALUATE)) == before


@pytest.mark.slow
def test_a_parameter_that_does_not_exist_is_refused_by_the_command(stack: PrefectStack) -> None:
    done = stack.command("prefect", "deployment", "run", EVALUATE, "--param", "confg=configs/tiny.yaml")
    assert done.returncode == 1
    assert "confg" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_second_of_two_runs_waits_for_its_slot_and_runs_after_the_first(stack: PrefectStack) -> None:
    first, second = stack.trigger(EVALUATE), stack.trigger(EVALUATE)
    earlier, later = sorted((stack.wait(first), stack.wait(second)), key=lambda run: run["start_time"])
    assert [earlier["state"]["name"], later["state"]["name"]] == ["Completed", "Completed"]
    assert earlier["end_time"] <= later["start_time"]
    assert "AwaitingConcurrencySlot" in stack.states(later["id"])
    assert earlier["parameters"] == {"config": "configs/tiny.yaml", "model": "champion"}


@pytest.mark.slow
def test_an_event_starts_the_refresh_and_nothing_new_says_so_within_seconds(stack: PrefectStack) -> None:
    done = stack.command("prefect", "event", "emit", "ullme.documents.changed", "--resource-id", "ullme")
    assert done.returncode == 0, done.stdout + done.stderr

    def by_event() -> list[dict[str, Any]]:
        return [run for run in stack.runs(NIGHTLY) if (run["created_by"] or {}).get("type") == "AUTOMATION"]

    run = stack.wait(until(by_event, timeout=60)[0]["id"])
    line = "nothing new: ullme version 1 (champion) holds these documents already, nothing was run"
    assert run["state"]["name"] == "Completed"
    assert run["state"]["message"] == line
    until(lambda: line in stack.lines(run["id"]), timeout=20)  # Prefect sends them in batches
    assert seconds(run["start_time"], run["end_time"]) < 30  # 6 on an idle machine


@pytest.mark.slow
@pytest.mark.parametrize("name", [NIGHTLY, WEEKLY])
def test_the_schedule_starts_runs_by_itself_twice_in_a_row_and_never_two_at_a_time(name: str, stack: PrefectStack) -> None:
    def by_schedule() -> list[dict[str, Any]]:
        return [run for run in stack.runs(name) if run["auto_scheduled"] and run["end_time"]]

    until(lambda: len(by_schedule()) >= 2, timeout=150, message=lambda: stack.log("worker")[-3000:])
    first, second = by_schedule()[:2]
    assert [first["state"]["name"], second["state"]["name"]] == ["Completed", "Completed"]
    assert first["parameters"] == second["parameters"] == {"config": "configs/tiny.yaml"}
    assert first["end_time"] <= second["start_time"]
    assert seconds(first["expected_start_time"], second["expected_start_time"]) >= 60


@pytest.mark.slow
def test_two_flows_never_work_on_one_store_at_a_time_and_the_second_finds_done_what_both_need(
    stack: PrefectStack, config: Mapping[str, Any]
) -> None:
    for name in (NIGHTLY, WEEKLY):
        deployment = stack.deployment(name)
        for schedule in deployment["schedules"]:
            stack.call("PATCH", f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": False})
    until(lambda: not [run for name in (NIGHTLY, WEEKLY) for run in stack.runs(name) if not run["end_time"]], timeout=60)
    extra = Path(config["data"]["source"]["roots"][0]) / "extra.py"
    extra.write_text('def extra(values):\n    """Return the geometric mean of a sequence."""\n    return len(values)\n')
    try:
        ids = [stack.trigger(NIGHTLY), stack.trigger(EVALUATE)]
        runs = [stack.wait(run_id) for run_id in ids]
    finally:
        extra.unlink()
    assert [run["state"]["name"] for run in runs] == ["Completed", "Completed"]
    first, second = sorted(works(stack, run_id) for run_id in ids)
    assert first[1] <= second[0]
    lines = [line for run_id in ids for line in stack.lines(run_id)]
    assert len([line for line in lines if "encode tuned: made" in line]) == 1
    assert any(line.startswith("waiting for ") for line in lines)


def works(stack: PrefectStack, run_id: str) -> tuple[str, str]:
    """From when until when a run worked on the store, by its own lines."""
    chosen = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    entries = stack.call("POST", "/logs/filter", chosen)
    times = [entry["timestamp"] for entry in entries if re.match(r"\d\d:\d\d:\d\d ", entry["message"])]
    return times[0], times[-1]


def seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
