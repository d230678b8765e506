"""`ullme doctor`: each thing that can be wrong is a line that says what to do, and --fix does it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BASE, GOOD, Nothing, Scene, report
from prefect_stack import BIN, PrefectStack, until

from flows.cli import _ullme_app, dispatch
from flows.config import load
from flows.doctor import Check, Doctor
from flows.machine import package_problems
from flows.tracking import HOST, Tracker, TrackingConfig, connect
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others left behind on this machine is not these tests' business, and not theirs to clear."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("psutil.process_iter", lambda: iter(()))


def doctor(scene: Scene) -> Doctor:
    return Doctor(scene.store.root, scene.tracking)


def lines(checks: Iterator[Check]) -> list[tuple[str, str]]:
    """State and text of each."""
    return [(check.state, check.said) for check in checks]


def problems(checks: Iterator[Check]) -> list[Check]:
    return [check for check in checks if check.state == "problem"]


def fixed(checks: Iterator[Check]) -> list[str]:
    """What mending every problem says."""
    return [check.mend() for check in problems(checks) if check.mend]


# The command


def test_a_sound_store_is_well_and_a_flipped_byte_is_found_and_set_aside(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "--config", str(scene.config)]
    ref = report(scene.store, "some", GOOD)
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    started = time.monotonic()
    assert dispatch(_ullme_app(), command) == 0
    seconds = time.monotonic() - started
    out = capsys.readouterr().out
    assert "problem" not in out
    for name in ("python", "packages", "mlflow", "disk", "store", "runs", "release", "prefect", "imports", "gpu"):
        assert f"\nok       {name}" in "\n" + out or f"\nwarning  {name}" in "\n" + out
    assert seconds < 60  # 7 s on an idle machine

    file = ref.path / "per_query.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert dispatch(_ullme_app(), [*command, "--json"]) == 1
    row = next(row for row in json.loads(capsys.readouterr().out) if row["state"] == "problem")
    assert (row["check"], row["fixed"]) == ("store", "")
    assert f"{ref}: file per_query.parquet is damaged" in row["said"]
    assert file.is_file()
    assert dispatch(_ullme_app(), command) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("1 problem")
    assert last.endswith("; --fix mends 1")

    assert dispatch(_ullme_app(), [*command, "--fix"]) == 0
    out = capsys.readouterr().out
    assert f"{ref} is set aside as {ref.path.name}.damaged-0" in " ".join(out.split())
    assert out.splitlines()[-1].endswith(", 1 fixed")
    assert "`ullme gc --delete` removes them" in out  # what is set aside takes space
    assert not ref.path.exists()
    assert dispatch(_ullme_app(), command) == 0
    assert "problem" not in capsys.readouterr().out
    assert report(Store(scene.store.root), "some", GOOD).digest == ref.digest


def test_a_champion_that_cannot_be_opened_remains_a_problem_after_fix(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    index = scene.artifacts["index"]
    copy = scene.store.root / "index" / index.path.name
    shutil.copytree(index.path, copy)
    release = scene.release().model_copy(update={"index": index.model_copy(update={"uri": str(copy)})})
    scene.promote(release, tuned=GOOD, base=BASE)
    (copy / "ids.arrow").unlink()
    assert dispatch(_ullme_app(), ["doctor", "--fix", "--json", "--config", str(scene.config)]) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out) if row["state"] == "problem"}
    assert "is set aside" in rows["store"]["fixed"]
    assert "the champion cannot be opened" in rows["release"]["said"]
    assert "`ullme rollback`" in rows["release"]["said"]


def test_without_a_store_there_is_nothing_to_complain_of_and_nothing_is_made(tmp_path: Path) -> None:
    found = Doctor(tmp_path / "store", TrackingConfig())
    assert {
        state
        for part in (found.mlflow, found.disk, found.artifacts, found.work, found.runs, found.released)
        for state, _ in lines(part())
    } == {"ok"}
    assert list(tmp_path.iterdir()) == []


# The store


def cut(ref: ArtifactRef) -> None:
    file = ref.path / "report.json"
    file.write_bytes(file.read_bytes()[:-1])


def lose(ref: ArtifactRef) -> None:
    (ref.path / "report.json").unlink()


def add(ref: ArtifactRef) -> None:
    (ref.path / "foreign").write_text("x")


def edit(ref: ArtifactRef) -> None:
    file = ref.path / "manifest.json"
    file.write_text(file.read_text().replace('"size": ', '"size": 1'))


def scramble(ref: ArtifactRef) -> None:
    (ref.path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "said"),
    [(cut, "is damaged"), (lose, "is missing"), (add, "unexpected file"), (edit, "is damaged"), (scramble, "cannot be read")],
)
def test_every_kind_of_damage_is_found_and_set_aside(scene: Scene, harm: Callable[[ArtifactRef], None], said: str) -> None:
    harmed, whole = report(scene.store, "harmed", GOOD), report(scene.store, "whole", BASE)
    harm(harmed)
    found = problems(doctor(scene).artifacts())
    assert len(found) == 1
    assert said in found[0].said
    assert fixed(doctor(scene).artifacts()) == [
        f"{harmed} is set aside as {harmed.path.name}.damaged-0; the next run makes it anew"
    ]
    assert not harmed.path.exists()
    assert whole.path.exists()
    assert problems(doctor(scene).artifacts()) == []


def test_what_another_process_makes_anew_is_not_set_aside(scene: Scene) -> None:
    ref = report(scene.store, "harmed", GOOD)
    cut(ref)
    with (scene.store.root / "locks" / f"report-{ref.path.name}").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert fixed(doctor(scene).artifacts()) == [""]
    assert ref.path.exists()


def test_what_does_not_belong_into_the_store_is_named(scene: Scene) -> None:
    ref = report(scene.store, "deleted", GOOD)
    (ref.path / "manifest.json").unlink()
    (scene.store.root / "report" / "notes.txt").write_text("x")
    found = lines(doctor(scene).artifacts())
    warned = sorted(said for state, said in found if state == "warning")
    assert warned == sorted(
        [
            f"{ref} is not finished: its deletion was interrupted, `ullme gc --delete` ends it",
            "report/notes.txt does not belong there; move it away",
        ]
    )


def interrupted(store: Store, stage: Stage, section: Nothing) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.produce(stage, section, {}, seed=0)


def test_half_written_folders_say_who_goes_on_with_them(scene: Scene) -> None:
    settings = load(scene.config).resolved()
    from flows.pipeline import Pipeline

    step = Pipeline(settings).request("data")
    (scene.store.root / "work" / f"data-{step.key}" / "artifact").mkdir(parents=True)
    (scene.store.root / "work" / f"data-{step.key}" / "artifact" / "part").write_bytes(b"x" * 5000)

    def killed(section: Nothing, inputs: Inputs, draft: Draft) -> None:
        raise KeyboardInterrupt

    interrupted(scene.store, Stage("model", "model", 1, killed), Nothing(label="other"))
    found = Doctor(scene.store.root, scene.tracking, settings)
    list(found.disk())
    told = lines(found.work())
    assert [state for state, _ in told] == ["warning", "warning"]
    assert f"data-{step.key}, 5.0 kB, was interrupted at" in told[0][1]
    assert "the next run of this configuration goes on with it (data)" in told[0][1]
    assert "the same command goes on with it" in told[1][1]
    with (scene.store.root / "locks" / f"data-{step.key}").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert lines(found.work())[0] == ("ok", f"data-{step.key} is being written, 5.0 kB so far")


def test_temporary_files_of_killed_processes_are_removed(scene: Scene) -> None:
    root = scene.store.root
    ref = report(scene.store, "some", GOOD)
    records = root / "work" / "runs"
    records.mkdir(parents=True)
    files = [root / "a.json.partial", ref.path / "b.partial", records / "c.4711"]
    for file in (*files, records / "d.json"):
        file.write_text("x")
        os.utime(file, (time.time() - 3600,) * 2)
    fresh = root / "e.partial"
    fresh.write_text("x")
    assert sorted(fixed(doctor(scene).work())) == sorted(f"removed {file}" for file in files)
    assert not any(file.exists() for file in files)
    assert fresh.exists()
    assert (records / "d.json").exists()
    assert scene.store.open(ref) == ref.path


# Disk and machine


def test_the_disk_is_held_against_what_the_plan_writes(scene: Scene) -> None:
    sound = list(Doctor(scene.store.root, scene.tracking, load(scene.config)).disk())
    assert [check.state for check in sound] == ["ok"]
    assert "train-and-index writes up to" in sound[0].said
    assert "later steps" in sound[0].said
    full = load(scene.config, ["limits.disk_reserve_gb=1000000"])
    short = list(Doctor(scene.store.root, scene.tracking, full).disk())
    assert [check.state for check in short] == ["problem"]
    assert "`ullme gc`" in short[0].said


def test_data_that_is_not_there_is_a_problem_of_the_plan(scene: Scene) -> None:
    config = load(scene.config, ["data.source={kind: beir, path: /nowhere}"])
    found = list(Doctor(scene.store.root, scene.tracking, config).disk())
    assert [(check.name, check.state) for check in found] == [("plan", "problem")]
    assert "/nowhere" in found[0].said


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_packages_that_clash_or_are_of_a_wrong_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert package_problems() == []
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "faiss-gpu", "1.15.1")
    assert package_problems() == [
        "faiss-cpu and faiss-gpu overwrite each other; uninstall both, then install ullme[cpu] or ullme[gpu]"
    ]
    shutil.rmtree(tmp_path / "faiss_gpu-1.15.1.dist-info")
    distribution(tmp_path, "fastapi", "0.160.0")
    distribution(tmp_path, "torch", "2.1.0+cu121")
    found = package_problems()
    assert len(found) == 2
    assert found[0].startswith("torch 2.1.0+cu121 is installed, expected >=2.11; pip install -c constraints.txt")
    assert found[1].startswith(
        "fastapi 0.160.0 is installed, expected <0.151,>=0.139; with a newer one Prefect's server does not start"
    )


# Runs

KILLED = """
import os, signal, sys
from pathlib import Path
from flows.tracking import Tracker, TrackingConfig
tracker = Tracker.start(TrackingConfig(), Path(sys.argv[1]), sys.argv[2])
stage = tracker.stage("train", {})
stage.__enter__()
if sys.argv[2] == "ended":
    tracker.__exit__(None, None, None)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(scene: Scene, name: str) -> None:
    """A process that records a pipeline's run with a stage, and is killed in it; one called `ended` has ended the former."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(scene.store.root), name], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def statuses(scene: Scene) -> dict[str, str]:
    client = connect(scene.tracking.address(scene.store.root))
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return {f"{run.info.run_name} {run.info.run_id}": run.info.status for run in client.search_runs(ids)}


def test_mlflow_runs_of_dead_processes_are_marked_as_killed(scene: Scene) -> None:
    killed(scene, "killed")
    with Tracker.start(scene.tracking, scene.store.root, "well"):
        pass
    killed(scene, "elsewhere")
    elsewhere = next(name.split()[1] for name in statuses(scene) if name.startswith("elsewhere"))
    connect(scene.tracking.address(scene.store.root)).set_tag(elsewhere, HOST, "another machine")
    found = problems(doctor(scene).runs())
    assert len(found) == 1
    assert "MLflow still says RUNNING of 'killed'" in found[0].said
    assert fixed(doctor(scene).runs()) == ["MLflow: 'killed' is marked as KILLED"]
    assert sorted((name.split()[0], status) for name, status in statuses(scene).items()) == [
        ("elsewhere", "RUNNING"),
        ("killed", "KILLED"),
        ("train", "KILLED"),
        ("train", "RUNNING"),
        ("well", "FINISHED"),
    ]
    assert lines(doctor(scene).runs()) == [("ok", "none is running, and no killed one left anything behind")]


def test_the_run_that_is_running_now_is_left_alone(scene: Scene) -> None:
    from flows.liveness import alone

    killed(scene, "killed")
    with alone(scene.store.root):
        killed(scene, "running")  # as it looks while it runs
        found = lines(doctor(scene).runs())
        assert found[0] == ("ok", f"process {os.getpid()} on {os.uname().nodename} is running on this store")
        assert len(found) == 2
        assert "'killed'" in found[1][1]


def test_a_stage_that_outlived_its_pipeline_in_mlflow_is_marked_as_killed(scene: Scene) -> None:
    killed(scene, "ended")
    assert fixed(doctor(scene).runs()) == ["MLflow: 'train' is marked as KILLED"]
    assert sorted(statuses(scene).values()) == ["FINISHED", "KILLED"]


def test_mlflow_that_cannot_be_reached_is_a_problem_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = Doctor(tmp_path, TrackingConfig(uri="ftp://nowhere"))
    assert [check.state for check in found.mlflow()] == ["problem"]
    assert [check.state for check in found.artifacts()] == ["ok"]
    assert list(found.released()) == []


# Prefect


def test_a_prefect_server_that_does_not_answer_is_a_problem(scene: Scene) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        found = [check for check in doctor(scene).prefect() if check.state == "problem"]
        assert len(found) == 1
        assert "http://127.0.0.1:9/api does not answer" in found[0].said
        runs = problems(doctor(scene).runs())
        assert len(runs) == 1
        assert "does not answer" in runs[0].said


@pytest.mark.slow
def test_what_the_deployments_need_of_a_server_is_looked_for(tmp_path: Path) -> None:
    stack = PrefectStack(tmp_path)
    try:
        stack.start_server()
        told = prefect_lines(stack.command("ullme", "doctor", "--json"))
        assert [state for state, _ in told] == ["ok", "warning", "warning"]
        assert "has no work pool ullme; `ullme setup` makes it" in told[1][1]
        assert "has no concurrency limit ullme-training; `ullme setup` makes it" in told[2][1]
        assert stack.command("ullme", "setup").returncode == 0
        told = prefect_lines(stack.command("ullme", "doctor", "--json"))
        assert [state for state, _ in told] == ["ok", "ok"]
        assert "answers and has work pool ullme and concurrency limit ullme-training" in told[1][1]
    finally:
        stack.close()


def prefect_lines(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    assert done.stdout.startswith("["), done.stderr
    return [(row["state"], row["said"]) for row in json.loads(done.stdout) if row["check"] == "prefect"]


@pytest.mark.slow
def test_everything_that_a_killed_run_left_behind_is_found_and_cleared(tmp_path: Path, plain_config: Mapping[str, Any]) -> None:
    stack = PrefectStack(tmp_path)
    config, store, server = tmp_path / "tiny.yaml", tmp_path / "store", {"PREFECT_API_URL": ""}
    phases = [{**plain_config["training"]["phases"][0], "steps": 300}]
    config.write_text(
        yaml.safe_dump({**plain_config, "store": str(store), "training": {**plain_config["training"], "phases": phases}})
    )
    command = ["ullme", "run", "train", "--config", str(config)]
    try:
        log = tmp_path / "run.log"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], cwd=stack.project, env={**stack.env, **server}, stdout=output, stderr=output
            ) as run,
        ):
            until(lambda: "train: step 30/" in log.read_text(), timeout=180, message=log.read_text)  # a checkpoint is there
            run.kill()
        until(lambda: not any("flows.stage" in " ".join(process.cmdline()) for process in stack.processes()), timeout=20)

        found = stack.command("ullme", "doctor", "--config", str(config), "--json", env=server)
        rows = [row for row in json.loads(found.stdout) if row["state"] != "ok"]
        said = "\n".join(row["said"] for row in rows)
        assert found.returncode == 1
        assert "is dead, and Prefect still says Running" in said
        assert "a temporary Prefect server" in said
        assert "MLflow still says RUNNING of 'llama pydocs" in said
        assert "the next run of this configuration goes on with it (train)" in said

        mended = stack.command("ullme", "doctor", "--config", str(config), "--fix", env=server)
        assert mended.returncode == 0, mended.stdout + mended.stderr
        assert mended.stdout.count("\nfixed    runs") >= 3
        assert stack.processes() == []
        again = stack.command("ullme", "doctor", "--config", str(config), "--json", env=server)
        assert {row["check"] for row in json.loads(again.stdout) if row["state"] != "ok"} <= {"work", "prefect"}
        done = stack.command(*command, env=server)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resum" in done.stdout
    finally:
        stack.close()
