"""Damage and full disks: one clear line each, nothing is lost, and the next run ends as if nothing had been."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.config import validate
from flows.pipeline import Pipeline
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
ULLME = [str(Path(sys.executable).parent / "ullme"), "run"]
FILES = {
    "data": "documents.arrow",
    "backbone": "model.safetensors",
    "mine": "negatives.parquet",
    "train": "adapter/adapter_model.safetensors",
    "encode tuned": "shard-00000.npy",
    "index": "index.faiss",
    "evaluate tuned": "per_query.parquet",
}
"""Step -> one file of its artifact."""


def flip(file: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path) -> None:
    """Lose the second half."""
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module")
def finished(plain_config: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    """Every artifact of a run, made by the real stages in this process. Damage is mended by the test that does it."""
    pipeline = of_run(plain_config, tmp_path_factory.mktemp("faults"))
    for name in pipeline.steps:
        pipeline.made[name] = produced(pipeline, name)
    return dict(pipeline.made)


def of_run(plain: Mapping[str, Any], store: Path) -> Pipeline:
    """The pipeline as a new process sees it."""
    return Pipeline(validate({**plain, "store": str(store), "encoding": {"runtime": {"shard_rows": 25}}}).resolved())


def again(plain: Mapping[str, Any], finished: Mapping[str, ArtifactRef], name: str) -> Pipeline:
    """The same run in a new process, at the point where `name` is to be made."""
    pipeline = of_run(plain, finished["data"].path.parents[1])
    pipeline.made |= {source: finished[source] for source in pipeline.steps[name].inputs.values()}
    return pipeline


def produced(pipeline: Pipeline, name: str) -> ArtifactRef:
    step = pipeline.steps[name]
    refs = {given: pipeline.made[source] for given, source in step.inputs.items()}
    return pipeline.store.produce(STAGES[step.stage].stage, step.section, refs, seed=step.seed)


def mended(plain: Mapping[str, Any], finished: Mapping[str, ArtifactRef], name: str, caplog: pytest.LogCaptureFixture) -> str:
    """What the plan says about a damaged artifact, after making sure that it is made again, the same, and the old one kept."""
    ref = finished[name]
    before = {path.name for path in ref.path.parent.glob("*.damaged-*")}
    pipeline = again(plain, finished, name)
    planned = pipeline.planned(name)
    assert planned.ref is None
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ullme.artifacts"):
        found = produced(pipeline, name)
    assert found.digest == ref.digest
    Store(pipeline.store.root).open(found)
    (kept,) = {path.name for path in ref.path.parent.glob("*.damaged-*")} - before
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ullme.artifacts"]
    assert line.endswith(f"doing that now, the old files are kept as {kept}")
    assert "\n" not in str(planned) + line
    return str(planned)


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_set_aside_and_made_again_the_same(
    name: str,
    damage: Callable[[Path], None],
    plain_config: Mapping[str, Any],
    finished: Mapping[str, ArtifactRef],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(finished[name].path / FILES[name])
    line = mended(plain_config, finished, name, caplog)
    assert line.startswith(f"run (the artifact is damaged: {finished[name]}: file {FILES[name]} is damaged (size or sha256 differs")


@pytest.mark.parametrize("suffix", ["npy", "arrow", "json"])
def test_a_missing_part_of_a_shard_is_named(
    suffix: str, plain_config: Mapping[str, Any], finished: Mapping[str, ArtifactRef], caplog: pytest.LogCaptureFixture
) -> None:
    (finished["encode tuned"].path / f"shard-00001.{suffix}").unlink()
    assert f"file shard-00001.{suffix} is missing" in mended(plain_config, finished, "encode tuned", caplog)


def foreign(finished: Mapping[str, ArtifactRef], target: Path, shard: str = "shard-00000", *, name: str = "") -> None:
    """Put a whole shard of the untrained model among those of the trained one, sidecar included."""
    for suffix in ("npy", "arrow", "json"):
        shutil.copy(finished["encode base"].path / f"{shard}.{suffix}", target / f"{name or shard}.{suffix}")


@pytest.mark.parametrize(
    ("name", "words"),
    [("shard-00000", r"file shard-00000\.\w+ is damaged"), ("shard-00009", r"unexpected file shard-00009\.\w+")],
)
def test_a_shard_of_another_model_in_a_finished_artifact_is_found(
    name: str,
    words: str,
    plain_config: Mapping[str, Any],
    finished: Mapping[str, ArtifactRef],
    caplog: pytest.LogCaptureFixture,
) -> None:
    foreign(finished, finished["encode tuned"].path, name=name)
    assert re.search(words, mended(plain_config, finished, "encode tuned", caplog))


def nothing(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    """As a crash right after the last shard leaves it."""


def other_model(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    foreign(finished, folder)


def other_vectors(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    shutil.copy(finished["encode base"].path / "shard-00000.npy", folder / "shard-00000.npy")


def half_a_file(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    cut(folder / "shard-00001.npy")


def no_ids(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    (folder / "shard-00000.arrow").unlink()


def one_too_many(folder: Path, finished: Mapping[str, ArtifactRef]) -> None:
    foreign(finished, folder, name="shard-00009")


@pytest.mark.parametrize("fault", [nothing, other_model, other_vectors, half_a_file, no_ids, one_too_many])
def test_what_an_interrupted_encoding_left_is_used_only_where_it_is_right(
    fault: Callable[[Path, Mapping[str, ArtifactRef]], None],
    plain_config: Mapping[str, Any],
    finished: Mapping[str, ArtifactRef],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The work folder of an encoding that was interrupted before its commit, and then damaged."""
    ref, pipeline = finished["encode tuned"], again(plain_config, finished, "encode tuned")
    work = pipeline.store.root / "work" / f"embeddings-{ref.path.name}" / "artifact"
    shutil.rmtree(work.parent, ignore_errors=True)
    shutil.move(ref.path, tmp_path / "finished")
    shutil.copytree(tmp_path / "finished", work)
    (work / "manifest.json").unlink()
    fault(work, finished)
    with caplog.at_level(logging.INFO, logger="ullme.encoding"):
        found = produced(pipeline, "encode tuned")
    assert found.digest == ref.digest
    reused = sum("is there already" in record.getMessage() for record in caplog.records)
    shards = len(list(ref.path.glob("shard-*.json")))
    assert shards > 1
    assert reused == (shards if fault in (nothing, one_too_many) else shards - 1)


# The whole flow


def own_world(folder: Path) -> dict[str, str]:
    """The environment, without what Prefect and MLflow find in it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {**plain, "PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "200"}


def run_smoke(store: Path, *changes: str) -> tuple[dict[str, Any], str]:
    """`ullme run train-and-index`: its summary and what it printed."""
    summary = store.parent / "summary.json"
    command = [*ULLME, "train-and-index", "--config", SMOKE, "--summary", str(summary), "--set", f"store={store}"]
    command += [word for change in changes for word in ("--set", change)]
    done = subprocess.run(
        command,
        env=own_world(store.parent),
        cwd=store.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads(summary.read_text()), done.stdout


@pytest.mark.slow
def test_a_run_over_damaged_artifacts_of_every_kind_completes_with_the_same_digests(tmp_path: Path) -> None:
    store = tmp_path / "store"
    before, _ = run_smoke(store)
    folders = {name: store / stage["artifact"] for name, stage in before["stages"].items() if name != "promote"}
    digests = {name: json.loads((folder / "manifest.json").read_text())["digest"] for name, folder in folders.items()}
    for name, file in FILES.items():
        (cut if name in ("train", "index") else flip)(folders[name] / file)
    for suffix in ("npy", "arrow", "json"):
        shutil.copy(folders["encode tuned"] / f"shard-00000.{suffix}", folders["encode base"] / f"shard-00000.{suffix}")
    (folders["evaluate bm25"] / "manifest.json").write_text("{")
    np.save(folders["evaluate base"] / "foreign.npy", np.zeros(3))

    after, output = run_smoke(store)
    for name, folder in folders.items():
        assert json.loads((folder / "manifest.json").read_text())["digest"] == digests[name], name
        lines = [line for line in output.splitlines() if f"{folder.name}.damaged-0" in line]
        assert len(lines) == 1, (name, lines)
        assert folder.with_name(f"{folder.name}.damaged-0").is_dir()
    assert after["scores"] == before["scores"]
    assert after["released"]["version"] == before["released"]["version"]
    again_, _ = run_smoke(store)
    assert all(stage["status"] == "reused" for stage in again_["stages"].values())


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    folder, store = tmp_path / "documents", tmp_path / "store"
    folder.mkdir()
    (folder / "one.txt").write_text("A single sentence about lanterns and their keepers.", encoding="utf-8")
    change = f"data={{source: {{kind: text, path: {folder}}}}}"
    command = [*ULLME, "train-and-index", "--config", SMOKE, "--set", f"store={store}", "--set", change]
    done = subprocess.run(command, env=own_world(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no query of this split has an answer among" in done.stdout + done.stderr
    assert not list(store.glob("model/*/manifest.json"))
