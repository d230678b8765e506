# ruff: noqa: E501 - messages are compared whole
"""Damage and full disks: one clear line each, nothing is lost, and the next run ends as if nothing had been."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.config import validate
from flows.pipeline import Pipeline
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store
from ullme.disk import Disk
from ullme.errors import LimitExceeded

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
ULLME = [str(Path(sys.executable).parent / "ullme"), "run"]
FILES = {
    "data": "documents.parquet",
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


# A disk that is full


def test_a_disk_reserves_a_hundredth_and_at_most_a_gigabyte(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert Disk(tmp_path / "not" / "there").reserve_bytes == min(10**9, total // 100)
    assert Disk(tmp_path, 5).reserve_bytes == 5


def test_what_an_interrupted_attempt_wrote_is_part_of_what_is_needed(tmp_path: Path) -> None:
    disk = Disk(tmp_path, reserve=0)
    needed = disk.free_bytes + 10**8
    with pytest.raises(LimitExceeded, match=r"train writes up to \d+\S* [GM]B, but .* has .* free"):
        disk.require("train", needed, tmp_path / "work")
    (tmp_path / "work" / "scratch").mkdir(parents=True)
    with (tmp_path / "work" / "scratch" / "state").open("wb") as handle:
        handle.truncate(2 * 10**8)  # takes no room, but has that size
    disk.require("train", needed, tmp_path / "work")


FULL = """
import os, shutil, subprocess, sys
from pathlib import Path

root = Path(sys.argv[1])
disk = root / "disk"
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)
"""
"""Begins in a namespace of its own, where it may mount what nobody else sees."""


def full(body: str, folder: Path, *arguments: str) -> list[str]:
    """The lines that a script prints whose `disk` is a small tmpfs."""
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        pytest.skip("needs `unshare -rm`, to mount a small tmpfs")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL + textwrap.dedent(body), str(folder), *arguments],
        env={**plain, "PREFECT_HOME": str(folder / "prefect")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_library_that_names_no_file_is_answered_with_the_file(tmp_path: Path) -> None:
    """What each of them raises on a full disk: Python, numpy, safetensors, Arrow, parquet and faiss."""
    body = """
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch, faiss
    from safetensors.torch import save_file
    from ullme.artifacts import Stage, Store
    from ullme.components import Section
    from ullme.errors import LimitExceeded

    class Nothing(Section):
        kind: str

    block = np.random.default_rng(0).integers(0, 255, 20 * 2**20).astype(np.uint8)
    index = faiss.IndexFlatIP(16)
    index.add(block.view(np.float32)[: 16 * 300_000].reshape(-1, 16))

    def arrow(file):
        table = pa.table({"x": block})
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    writers = {
        "python": lambda file: Path(file).write_bytes(block.tobytes()),
        "numpy": lambda file: np.save(file, block),
        "safetensors": lambda file: save_file({"x": torch.from_numpy(block)}, file),
        "arrow": arrow,
        "parquet": lambda file: pq.write_table(pa.table({"x": block}), file),
        "faiss": lambda file: faiss.write_index(index, file),
    }

    def write(section, inputs, draft):
        draft.restart()
        writers[section.kind](str(draft.path / "large.npy"))

    for kind in writers:
        store = Store(disk / kind)
        try:
            store.produce(Stage("write", "words", 1, write), Nothing(kind=kind), {}, seed=0)
        except LimitExceeded as error:
            print(kind, str(error).replace(str(disk), "DISK"))
        shutil.rmtree(disk / kind)
    """
    found = {line.split()[0]: line for line in full(body, tmp_path)}
    for kind in ("python", "numpy", "safetensors", "arrow", "parquet", "faiss"):
        expected = rf"{kind} DISK/{kind}/work/words-\w+/artifact/large\.npy: (No|Not enough free) space.*; make room .* run again"
        assert re.match(expected, found.get(kind, "")), f"{kind}: {found.get(kind)}"


SMALL_DISK = """
    import time
    ullme, config = sys.argv[2], sys.argv[3]
    store = disk / "store"

    def call(*changes, verb="train", until=None):
        command = [ullme, "run", verb, "--config", config, "--set", f"store={store}"]
        command += [word for change in changes for word in ("--set", change)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print("|", line.rstrip())
            if until and until in line:
                until = None
                fill(0)
        print("code", process.wait())

    def fill(leave):
        "Somebody else's file."
        with (disk / "other").open("wb") as handle:
            try:
                while shutil.disk_usage(disk).free > leave:
                    os.write(handle.fileno(), b"x" * 4096)
            except OSError:
                pass
"""


def runs_of(lines: list[str]) -> list[tuple[int, list[str]]]:
    """(exit code, lines) of each command."""
    runs, current = [], []
    for line in lines:
        if line.startswith("code "):
            runs.append((int(line.split()[1]), current))
            current = []
        else:
            current.append(line[2:])
    return runs


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_the_stage_with_the_numbers(tmp_path: Path) -> None:
    body = (
        SMALL_DISK
        + """
    call(verb="mine")
    fill(300_000)
    call()
    (disk / "other").unlink()
    call()
    """
    )
    made, refused, completed = runs_of(full(body, tmp_path, ULLME[0], SMOKE))
    assert (made[0], refused[0], completed[0]) == (0, 1, 0), (made, refused, completed)
    assert re.match(
        r"stage backbone failed: backbone writes up to 201 kB, but .*/disk/store has 2\d\d kB free, of which 126 kB stay in reserve "
        r"\(limits\.disk_reserve_gb\); make room \(`ullme gc` says what can go\) or move the store to a larger disk, then run again",
        refused[1][-1],
    )
    assert not any("Traceback" in line for line in refused[1])
    assert any(line.split()[:2] == ["data", "reused"] for line in completed[1])


@pytest.mark.slow
def test_a_disk_that_somebody_fills_costs_one_line_and_no_step_before_the_checkpoint(
    tmp_path: Path, plain_config: Mapping[str, Any]
) -> None:
    body = (
        SMALL_DISK
        + """
    settings = ["training.phases.0.steps=40", "training.runtime.checkpoint_every=2"]
    call(*settings, until="train: step 5/")
    (disk / "other").unlink()
    call(*settings)
    manifest = next(path for path in store.glob("model/*/manifest.json") if "train_seconds" in path.read_text())
    print("| digest", __import__("json").loads(manifest.read_text())["digest"])
    print("code 0")
    shutil.rmtree(store / "model")
    shutil.rmtree(store / "negatives")
    call(*settings)
    manifest = next(path for path in store.glob("model/*/manifest.json") if "train_seconds" in path.read_text())
    print("| digest", __import__("json").loads(manifest.read_text())["digest"])
    print("code 0")
    """
    )
    stopped, completed, digest, undisturbed, expected = runs_of(full(body, tmp_path, ULLME[0], SMOKE))
    assert (stopped[0], completed[0], undisturbed[0]) == (1, 0, 0), (stopped, completed, undisturbed)
    assert re.match(r"stage train failed: .*/work/model-\w+/\S+: No space left on device; make room .* run again", stopped[1][-1])
    assert not any("Traceback" in line for line in stopped[1])
    assert any(re.search(r"train: resuming training after step \d+ of 40", line) for line in completed[1])
    assert not any("resuming" in line for line in undisturbed[1])
    assert digest[1] == expected[1]


# The whole flow


def run_smoke(store: Path, *changes: str) -> tuple[dict[str, Any], str]:
    """`ullme run train-and-index`: its summary and what it printed."""
    summary = store.parent / "summary.json"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [*ULLME, "train-and-index", "--config", SMOKE, "--summary", str(summary), "--set", f"store={store}"]
    command += [word for change in changes for word in ("--set", change)]
    done = subprocess.run(
        command,
        env={**plain, "PREFECT_HOME": str(store.parent / "prefect"), "COLUMNS": "200"},
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
