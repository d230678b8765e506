# ruff: noqa: E501 - messages are compared whole
"""Limits on real child processes: what is too large, too slow or was killed is ended, tried again or refused, in one line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from steps import made_by, pipeline_of

from flows import child
from flows.child import run_stages
from flows.config import validate
from flows.limits import LimitsConfig
from flows.pipeline import Pipeline
from flows.stage import STAGES, StageRequest
from ullme.artifacts import ArtifactRef, Store
from ullme.errors import ConfigError, StageFailed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FIXTURES = Path(__file__).parent / "fixtures"


class Run:
    """One stage that gets into trouble, run by `run_stages`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.store = Store(folder / "store")

    def request(self, trouble: str, times: int = 1) -> StageRequest:
        source = {"kind": "troubles.trouble", "folder": str(self.folder), "trouble": trouble, "times": times}
        work = STAGES["data"]
        section = work.section({"source": source, "source_digest": "always the same"})
        plain = section.model_dump(mode="json", serialize_as_any=True)
        key = self.store.key(work.stage, section, {}, seed=0)
        return StageRequest(label="data", stage="data", section=plain, refs={}, seed=0, key=key)

    def __call__(self, trouble: str, times: int = 1, **limits: Any) -> ArtifactRef:
        request = self.request(trouble, times)
        made = run_stages(self.store.root, [request], self.lines.append, limits=LimitsConfig.model_validate(limits))
        self.store.open(made[0][0], "data")
        return made[0][0]

    def fails(self, trouble: str, times: int = 9, **limits: Any) -> StageFailed:
        with pytest.raises(StageFailed) as caught:
            self(trouble, times, **limits)
        assert self.left() == []
        return caught.value

    def attempts(self) -> list[int]:
        """The budgets of the attempts so far."""
        return [int(line) for line in (self.folder / "attempts").read_text().split()]

    def retries(self) -> list[str]:
        """What was said about trying again, without the time."""
        return [line[9:] for line in self.lines if "once more" in line or "starting it again" in line]

    def left(self) -> list[str]:
        """Processes of the stage that are still there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if process.environ().get("TROUBLE_OF_TEST") == str(self.folder) and process.pid != os.getpid():
                    found.append(" ".join(process.cmdline()))
        return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.syspath_prepend(FIXTURES)
    monkeypatch.setenv("PYTHONPATH", str(FIXTURES))
    monkeypatch.setenv("TROUBLE_OF_TEST", str(tmp_path))
    return Run(tmp_path)


# Memory


@pytest.mark.parametrize("trouble", ["memory", "in a grandchild"])
def test_over_the_ceiling_of_memory_it_is_ended_and_run_with_half_the_budget(run: Run, trouble: str) -> None:
    run(trouble, 2 if trouble == "memory" else 1, memory_gb=0.55)
    assert run.attempts() == [600, 300]
    (line,) = run.retries()
    assert line.startswith("data: warning: its processes hold ")
    assert line.endswith(
        "of memory, 550 MB are allowed (limits.memory_gb); once more with half the budget (batch_tokens 600 -> 300)"
    )
    assert run.left() == []


def test_memory_that_half_the_budget_does_not_save_is_one_line_with_the_numbers(run: Run) -> None:
    error = run.fails("memory for long", memory_gb={"data": 0.3, "train": 50})
    assert run.attempts() == [600, 300]
    assert error.cause == "LimitExceeded"
    assert error.exit_code == 1
    assert str(error).startswith("stage data failed: its processes hold ")
    assert "300 MB are allowed (limits.memory_gb); lower its *_tokens under `runtime`, or raise limits.memory_gb" in str(error)
    assert "\n" not in str(error)


def test_mapped_files_are_not_memory(run: Run) -> None:
    run("mapped", memory_gb=0.4)
    assert run.attempts() == [600]


@pytest.mark.parametrize(("trouble", "said"), [("numpy", "Unable to allocate"), ("torch", "can't allocate memory")])
def test_out_of_memory_is_tried_once_with_half_the_budget(run: Run, trouble: str, said: str) -> None:
    run(trouble)
    assert run.attempts() == [600, 300]
    assert run.retries()[0].startswith("data: warning: out of memory (")
    assert said in run.retries()[0]


def test_out_of_memory_twice_is_the_end(run: Run) -> None:
    error = run.fails("numpy", retries=5)
    assert run.attempts() == [600, 300]
    assert error.cause == "OutOfMemory"
    assert "out of memory (Unable to allocate" in str(error)
    assert "\n" not in str(error)


def test_a_kill_by_the_kernel_for_want_of_memory_halves_the_budget(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel cannot be asked to do so to a test; its counter is the seam."""
    counter = run.folder / "counter"
    counter.write_text("low 0\noom_kill 7\n")
    monkeypatch.setattr(child, "_counters", lambda: [counter])
    run("by the kernel")
    assert run.attempts() == [600, 300]
    assert "out of memory (the kernel ended it); once more with half the budget" in run.retries()[0]


def test_this_machine_counts_kills_for_memory() -> None:
    counts = [child._count(file) for file in child._counters() if file.exists()]
    assert any(count is not None for count in counts)
    assert child._kills_for_memory() >= 0


def test_a_stage_without_a_budget_is_not_run_again(run: Run) -> None:
    request = run.request("numpy", 9)
    plain = {**request.section, "source": {**request.section["source"]}}
    del plain["source"]["runtime"]
    with pytest.raises(StageFailed, match="out of memory"):
        run_stages(run.store.root, [request.model_copy(update={"section": plain})], run.lines.append)
    assert run.attempts() == [600]


def test_half_a_budget_is_the_same_artifact_key(plain_config: Mapping[str, Any]) -> None:
    pipeline = Pipeline(validate(plain_config).resolved())
    for step in pipeline.steps.values():
        work = STAGES[step.stage]
        section = step.section.model_dump(mode="json", serialize_as_any=True)
        assert work.section(child._halved(section)).identity() == step.section.identity()
    budgets = {
        step.stage: child._budgets(step.section.model_dump(mode="json", serialize_as_any=True)) for step in pipeline.steps.values()
    }
    assert budgets["train"] == ["chunk_tokens 4096 -> 2048"]
    assert budgets["encode"] == budgets["mine"] == budgets["evaluate"] == ["batch_tokens 16384 -> 8192"]
    assert budgets["data"] == budgets["backbone"] == budgets["index"] == []


# Time


def test_a_stage_that_takes_too_long_is_ended_and_not_run_again(run: Run) -> None:
    started = time.monotonic()
    error = run.fails("slow", timeout_s={"data": 2, "train": 900})
    assert time.monotonic() - started < 20
    assert run.attempts() == [600]
    assert error.cause == "LimitExceeded"
    assert str(error).startswith("stage data failed: it takes longer than 2 s (")
    assert "\n" not in str(error)
    assert run.retries() == []
    run("slow", 1)
    assert run.attempts() == [600, 600]


def test_the_clock_of_a_stage_begins_with_the_stage(run: Run, plain_config: Mapping[str, Any]) -> None:
    """Two stages in one process: the first may take its time, imports included."""
    backbone = Pipeline(validate(plain_config).resolved())
    request = StageRequest.model_validate({**backbone.request("backbone").model_dump(), "label": "first"})
    limits = LimitsConfig.model_validate({"timeout_s": {"data": 2}})
    with pytest.raises(StageFailed) as caught:
        run_stages(run.store.root, [request, run.request("slow", 9)], run.lines.append, limits=limits)
    assert caught.value.stage == "data"
    assert any("first: made model/" in line for line in run.lines)
    seconds = float(str(caught.value).partition("(")[2].partition(" s by now")[0])
    assert seconds <= 4


# Crashes


@pytest.mark.parametrize(("trouble", "name"), [("killed", "9 (Killed)"), ("crashed", "11 (Segmentation fault)")])
def test_a_process_that_was_killed_is_started_again_with_the_same_budget(run: Run, trouble: str, name: str) -> None:
    run(trouble)
    assert run.attempts() == [600, 600]
    expected = f"data: warning: its process was killed by signal {name}; starting it again from where it was (1 of 1)"
    assert run.retries() == [expected]


def test_a_kill_after_the_last_stage_was_told_of_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    work = "import os, sys; from flows.stage import main; main(sys.argv[1:]); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(child, "_launch", lambda file: subprocess.Popen([sys.executable, "-c", work, file], stdout=-1, text=True))
    run("none", 0)
    assert run.retries() == []


@pytest.mark.parametrize("retries", [0, 2])
def test_it_is_started_again_as_often_as_configured(run: Run, retries: int) -> None:
    error = run.fails("killed", retries=retries)
    assert run.attempts() == [600] * (1 + retries)
    assert str(error).startswith("stage data was killed by signal 9")


@pytest.mark.parametrize("trouble", ["plain", "data", "config", "not finite", "disk", "stopped"])
def test_a_mistake_is_never_tried_again(run: Run, trouble: str) -> None:
    error = run.fails(trouble, retries=3)
    assert run.attempts() == [600]
    assert error.exit_code == (2 if trouble in ("data", "config") else 1)
    assert run.retries() == []


def test_what_a_killed_process_leaves_behind_does_not_hold_us_up(run: Run) -> None:
    started = time.monotonic()
    error = run.fails("orphan", retries=0)
    assert time.monotonic() - started < 20
    assert str(error).startswith("stage data was killed by signal 9")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_our_own_end_is_not_a_crash(run: Run, stop: type[BaseException]) -> None:
    def say(line: str) -> None:
        raise stop

    with pytest.raises(stop):
        run_stages(run.store.root, [run.request("")], say)
    assert run.left() == []


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_to_the_same_bytes(plain_config: Mapping[str, Any], tmp_path: Path) -> None:
    training = {
        "phases": [{"objective": {"kind": "grl"}, "steps": 8, "batch_size": 4}],
        "runtime": {"checkpoint_every": 2, "chunk_tokens": 256},
    }
    before = ("data", "backbone", "mine", "train")
    expected = made_by(pipeline_of(plain_config, tmp_path / "one", **training), *before)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if sum("step 5/8" in line for line in lines) == 1 and "step 5/8" in line:
            (stage,) = [one for one in psutil.Process().children() if "flows.stage" in one.cmdline()]
            stage.kill()

    found = made_by(pipeline_of(plain_config, tmp_path / "two", **training), *before, say=say)
    assert found.digest == expected.digest
    assert any("starting it again from where it was" in line for line in lines)
    assert any("resuming training after step 4 of 8" in line for line in lines)


# The configuration


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"timeout_s": {"trian": 3}}, "config: limits.timeout_s: unknown stage 'trian'; allowed: data, backbone, mine, synthesise, train, encode, index, evaluate; did you mean 'train'?"),
        ({"memory_gb": {"train": 0}}, "config: limits.memory_gb: expected a number > 0 for train, got 0"),
        ({"memory_gb": {"train": "much"}}, "config: limits.memory_gb: expected a number > 0 for train, got 'much'"),
        ({"retries": -1}, "config: limits.retries: expected a number >= 0, got -1"),
    ],
)  # fmt: skip
def test_a_limit_that_is_none_is_answered_in_words(plain_config: Mapping[str, Any], limits: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**plain_config, "limits": limits})
    assert caught.value.problems == (line,)


def test_a_limit_is_for_every_stage_or_by_name() -> None:
    all_, one = LimitsConfig(timeout_s=60, memory_gb=1.5), LimitsConfig(timeout_s={"train": 60}, memory_gb={"train": 1.5})
    assert (all_.seconds("mine"), one.seconds("mine"), one.seconds("train")) == (60, None, 60)
    assert (all_.memory_bytes("mine"), one.memory_bytes("mine"), one.memory_bytes("train")) == (1_500_000_000, None, 1_500_000_000)
    assert (LimitsConfig().reserve_bytes, LimitsConfig(disk_reserve_gb=0).reserve_bytes) == (None, 0)


def test_limits_change_no_key(plain_config: Mapping[str, Any], tmp_path: Path) -> None:
    limits = {"timeout_s": 60, "memory_gb": 20, "disk_reserve_gb": 0, "retries": 5}
    plain = {**plain_config, "store": str(tmp_path)}
    one, other = (Pipeline(validate({**plain, **more}).resolved()) for more in ({}, {"limits": limits}))
    assert one.request("data").key == other.request("data").key
    assert one.request("backbone") == other.request("backbone")


# What the budgets of the stages that encode are


@pytest.mark.parametrize(("stage", "field"), [("mine", "batch_tokens"), ("evaluate", "batch_tokens"), ("train", "chunk_tokens")])
def test_texts_are_encoded_within_the_budget_of_the_stage(
    stage: str, field: str, artifacts: Mapping[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ullme.encoder import Encoder

    found: list[int] = []
    plain = Encoder.embed

    def embed(self: Encoder, batch: Any) -> Any:
        if len(batch.input_ids) > 1:
            found.append(batch.input_ids.numel())
        return plain(self, batch)

    packed = Encoder.embed_rows

    def embed_rows(self: Encoder, rows: Any, **settings: Any) -> Any:
        if settings.get("packed") and len(rows) > 1:
            found.append(sum(map(len, rows)))
        return packed(self, rows, **settings)

    monkeypatch.setattr(Encoder, "embed", embed)
    monkeypatch.setattr(Encoder, "embed_rows", embed_rows)
    refs = {"data": artifacts["data"], "model": artifacts["model"]}
    phase = {"objective": {"kind": "contrastive"}, "steps": 1, "batch_size": 4, "num_negatives": 0}
    sections: dict[str, dict[str, Any]] = {
        "mine": {"miner": "topk"},
        "evaluate": {"bootstrap_samples": 100},
        "train": {"phases": [phase], "adapter": {"rank": 2}},
    }
    if stage == "evaluate":
        refs["embeddings"] = artifacts["embeddings"]
    most = []
    for budget in (2_000, 200):
        found.clear()
        section = STAGES[stage].section({**sections[stage], "runtime": {field: budget}})
        Store(tmp_path / str(budget)).produce(STAGES[stage].stage, section, refs, seed=0)
        most.append(max(found))
    assert 200 < most[0] <= 2_000
    assert most[1] <= 200
