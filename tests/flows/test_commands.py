# ruff: noqa: E501
"""The commands in processes of their own: exit codes, help, speed, and nothing left behind by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DOORS = {
    "prefect run": [str(BIN / "prefect"), "run"],
    "ullme run": [str(BIN / "ullme"), "run"],
    "python -m flows": [sys.executable, "-m", "flows"],
}
SMOKE = str(ROOT / "configs" / "smoke.yaml")
THREE_MISTAKES = """
data: {source: {kind: pydcs}}
backbone: {model: "tiny:llama", poolng: mean}
training:
  phases:
    - objective: {kind: grl, beta: q}
      steps: 6
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a Prefect of its own."""
    folder = tmp_path_factory.mktemp("prefect")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "COV_"))}
    return {**mine, "PREFECT_HOME": str(folder), "COLUMNS": "120", "NO_COLOR": "1"}


def call(
    command: Sequence[str], env: dict[str, str], *, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("door", DOORS)
def test_three_mistakes_print_three_lines_and_exit_2_before_anything_starts(
    door: str, home: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(THREE_MISTAKES)
    started = time.monotonic()
    done = call([*DOORS[door], "train-and-index", "--config", str(file)], home)
    seconds = time.monotonic() - started
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert [line.split(": ")[1] for line in lines] == ["data.source", "backbone.poolng", "training.phases.0.objective.beta"]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert seconds < 6  # 1.5 s and less on an idle machine


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "arguments", [["train-and-index"], ["train-and-index", "--confg", SMOKE], ["train-and-indx"], ["train-and-index", "--config", SMOKE, "--summary"]]
)  # fmt: skip
def test_a_mistake_in_the_command_exits_2(door: str, arguments: Sequence[str], home: dict[str, str]) -> None:
    done = call([*DOORS[door], *arguments], home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("door", DOORS)
def test_help_teaches(door: str, home: dict[str, str]) -> None:
    done = call([*DOORS[door], "train-and-index", "--help"], home)
    assert done.returncode == 0
    for word in ("--config", "--set", "--dry-run", "--summary", "Examples:", "training.phases.0.steps=20"):
        assert word in done.stdout


def test_prefect_lists_the_command_and_loads_nothing_of_ours_for_it(home: dict[str, str]) -> None:
    done = call([str(BIN / "prefect"), "--help"], home)
    assert done.returncode == 0
    assert "Run a pipeline of ullme" in done.stdout
    assert done.stderr == ""
    script = (
        "import sys, prefect; print([name for name in sys.modules if name in ('flows.cli', 'flows.config', 'torch', 'mlflow')])"
    )
    assert call([sys.executable, "-c", script], home).stdout.strip() == "[]"


def test_outside_the_repository_prefect_is_left_as_it_is_until_setup(home: dict[str, str], tmp_path: Path) -> None:
    done = call([str(BIN / "prefect"), "run", "--help"], home, cwd=tmp_path)
    assert done.returncode != 0
    assert call([str(BIN / "prefect"), "config", "set", "PREFECT_PLUGINS_ENABLED=true"], home, cwd=tmp_path).returncode == 0
    done = call([str(BIN / "prefect"), "run", "train-and-index", "--help"], home, cwd=tmp_path)
    assert done.returncode == 0
    assert "--dry-run" in done.stdout


def test_register_is_idempotent_and_never_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import flows.plugin as p; from prefect.cli._app import _app; p.register(); p.register();"
        "print('run' in _app);"
        "other = type(_app)(name='prefect'); other.command(lambda: 7, name='run');"
        "import prefect.cli._app as module; module._app = other; p.register();"
        "print(other(['run'], result_action='return_value'));"
        "module._app = None; p.register(); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split("\n")[:3] == ["True", "7", "still here"], done.stderr


def test_a_dry_run_prints_the_resolved_configuration_and_the_plan(home: dict[str, str], tmp_path: Path) -> None:
    done = call([*DOORS["ullme run"], "train-and-index", "--config", SMOKE, "--set", f"store={tmp_path}", "--dry-run"], home)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["store"] == str(tmp_path)
    assert config["data"]["source_digest"]
    assert config["backbone"]["dtype"] in ("float32", "bfloat16")
    rows = dict(line[2:].split("  ", 1) for line in done.stdout.splitlines() if line.startswith("# ") and "  " in line[2:])
    assert rows["data"].strip() == "run (no artifact yet)"
    assert rows["index"].strip() == "run (encode tuned will be new)"
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_exits_2_with_one_line(home: dict[str, str], tmp_path: Path) -> None:
    where = "data.source={kind: beir, path: /nowhere}"
    done = call([*DOORS["ullme run"], "train-and-index", "--config", SMOKE, "--set", where, "--dry-run"], home)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_search_before_anything_was_released_says_what_to_do(home: dict[str, str], tmp_path: Path) -> None:
    done = call([str(BIN / "ullme"), "search", "a question"], home, cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing was released" in done.stderr
    assert "Traceback" not in done.stderr


# The real thing


def smoke(home: dict[str, str], store: Path, *changes: str) -> dict[str, Any]:
    """Run the smoke configuration through the real `prefect run`; its summary."""
    summary = store.parent / "summary.json"
    command = [*DOORS["prefect run"], "train-and-index", "--config", SMOKE, "--summary", str(summary), "--set", f"store={store}"]
    for change in changes:
        command += ["--set", change]
    done = call(command, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "ullme search" in done.stdout
    found = json.loads(summary.read_text())
    found["output"] = done.stdout
    return found


def ran(summary: dict[str, Any]) -> set[str]:
    return {name for name, stage in summary["stages"].items() if stage["status"] == "ran"}


@pytest.mark.slow
def test_the_pipeline_runs_and_makes_anew_only_what_changed(home: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    everything = smoke(home, store)
    steps = {"data", "backbone", "mine", "train", "encode base", "encode tuned", "index"}
    steps |= {"evaluate bm25", "evaluate base", "evaluate tuned", "promote"}
    assert ran(everything) == steps
    assert set(everything["scores"]) == {"base", "tuned", "bm25"}
    assert everything["queries"] == {"retrieval": 40}
    assert everything["released"]["version"] == 1
    assert everything["scores"]["bm25"]["retrieval"]["ndcg_at_10"] > everything["scores"]["base"]["retrieval"]["ndcg_at_10"]

    again = smoke(home, store)
    assert ran(again) == set()
    assert again["released"]["version"] == 1
    assert again["seconds"] < 60
    assert again["scores"] == everything["scores"]
    assert "made " not in again["output"]

    assert ran(smoke(home, store, "index.kind=flat")) == {"index", "evaluate tuned", "promote"}
    changed = smoke(home, store, "training.phases.0.objective.kl_weight=0.3")
    assert ran(changed) == {"train", "encode tuned", "index", "evaluate tuned", "promote"}

    search = [str(BIN / "ullme"), "search", "parse an ISO 8601 date", "--config", SMOKE, "--set", f"store={store}", "--json"]
    done = call([*search, "--alias", "champion" if changed["released"]["champion"] else "challenger", "-k", "3"], home)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert all(hit["id"] and hit["excerpt"] for hit in hits)

    damaged = next((store / "negatives").glob("*/negatives.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    mended = smoke(home, store)
    assert ran(mended) == {"mine"}
    assert "the artifact is damaged" in mended["output"]

    tracked(store)


def tracked(store: Path) -> None:
    """What MLflow holds of the runs: read in a process of its own."""
    script = (
        "import sys, mlflow; c = mlflow.MlflowClient(tracking_uri=sys.argv[1]); e = c.get_experiment_by_name('smoke');"
        "runs = c.search_runs([e.experiment_id], order_by=['attributes.start_time'], max_results=500);"
        "top = [r for r in runs if 'mlflow.parentRunId' not in r.data.tags]; first = top[0];"
        "kids = [r for r in runs if r.data.tags.get('mlflow.parentRunId') == first.info.run_id];"
        "train = next(r for r in kids if r.info.run_name == 'train');"
        "print(len(top), len(kids), first.info.status);"
        "print(sorted(f.path for f in c.list_artifacts(first.info.run_id)));"
        "print(len(c.get_metric_history(train.info.run_id, 'loss/contrastive')), first.inputs.dataset_inputs[0].dataset.name.split('/')[0]);"
        "print(first.data.params['training.phases.0.objective.kind'], 'tuned/retrieval/ndcg_at_10' in first.data.metrics)"
    )
    done = call([sys.executable, "-c", script, f"sqlite:///{store}/mlflow.db"], dict(os.environ))
    assert done.stdout.splitlines() == [
        "5 11 FINISHED",
        "['config.yaml', 'loss.png', 'scores.png', 'scores_before_after.png']",
        "6 data",
        "grl True",
    ], done.stderr


def left_behind(marker: str) -> dict[int, str]:
    """Command lines, by process, of the processes whose environment holds `marker`."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_run_and_everything_it_started(
    number: signal.Signals, code: int, home: dict[str, str], tmp_path: Path
) -> None:
    env = {**home, "MARKER_OF_TEST": str(tmp_path)}
    command = [*DOORS["ullme run"], "train-and-index", "--config", SMOKE, "--set", f"store={tmp_path}/store"]
    command += ["--set", "training.phases.0.steps=5000"]
    with subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell makes its children ignore it
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "train: step 2/" in line:
                break
        process.send_signal(number)
        rest = process.stdout.read() if number != signal.SIGKILL else ""
        assert process.wait(60) == code, "".join(lines) + rest
    assert "Traceback" not in rest
    deadline = time.monotonic() + 20
    while any("flows.stage" in line for line in left_behind(str(tmp_path)).values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = left_behind(str(tmp_path))
    if number == signal.SIGKILL:  # nobody was left to end Prefect's own server; the stage must end by itself all the same
        for process_id in [process_id for process_id, line in left.items() if "uvicorn" in line]:
            os.kill(process_id, signal.SIGTERM)
            del left[process_id]
    assert left == {}
