# ruff: noqa: E501 - messages are compared whole
"""What stages write is foretold and refused with the numbers where it does not fit; a disk that fills all the same costs one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from steps import made_by, pipeline_of

from flows.config import load
from flows.limits import estimate
from flows.pipeline import Pipeline
from ullme.disk import Disk, as_size
from ullme.errors import LimitExceeded, StageFailed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMOKE = str(CONFIGS / "smoke.yaml")
ULLME = str(Path(sys.executable).parent / "ullme")


# Foretold


def test_what_a_stage_will_write_is_weighed_before_it_starts(plain_config: Mapping[str, Any], tmp_path: Path) -> None:
    """The reserve is larger than any disk."""
    pipeline = pipeline_of(plain_config, tmp_path)
    with pytest.raises(StageFailed) as caught:
        made_by(pipeline, "backbone", disk_reserve_gb=10**6)
    assert not (tmp_path / "work").exists()
    error = caught.value
    assert (error.cause, error.exit_code) == ("LimitExceeded", 1)
    said = (
        r"stage backbone failed: backbone writes up to 382 kB, but /\S+ has [\d.,]+ GB free, of which 1,000,000 GB stay in reserve "
    )
    assert re.match(said + r"\(limits\.disk_reserve_gb\); make room \(`ullme gc` says what can go\) or move the store", str(error))
    assert "\n" not in str(error)


def tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:
                continue  # gone meanwhile
    return total


class Peak:
    """The most that lay in a folder while the block ran."""

    def __init__(self, folder: Path) -> None:
        self.bytes, self._folder, self._over = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, tree_bytes(self._folder))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


EVERY_WEIGHT = [
    "training.adapter=null",
    "training.phases.0.objective.preference_weight=0",
    "training.runtime.checkpoint_every=1",
    "backbone.dtype=float32",
    "index={kind: ivf, codes: fp32}",
    "mining.miner.num_negatives=10",
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "until"), [([], "promote"), (EVERY_WEIGHT, "index")], ids=["smoke", "every weight"])
def test_the_estimate_is_no_less_than_what_is_written_and_no_more_than_two_and_a_half_times(
    changes: list[str], until: str, tmp_path: Path
) -> None:
    pipeline = Pipeline(load(CONFIGS / "smoke.yaml", [f"store={tmp_path}", *changes]).resolved(), until=until)
    wrong = []
    for name in pipeline.steps:
        foretold = estimate(pipeline, [pipeline.planned(name)])[name]
        with Peak(tmp_path / "work") as peak:
            ref = made_by(pipeline, name)
        written = max(peak.bytes, tree_bytes(ref.path))
        if foretold is None or not written <= foretold <= 2.5 * written:
            wrong.append(f"{name}: {foretold} foretold, {written} written")
    assert wrong == []


def test_an_estimate_is_none_where_nobody_can_tell_and_left_out_where_nothing_runs(
    plain_config: Mapping[str, Any], tmp_path: Path
) -> None:
    pipeline = pipeline_of(plain_config, tmp_path)
    before = estimate(pipeline, pipeline.plan())
    assert before["backbone"] is not None
    assert before["train"] is before["index"] is None
    made_by(pipeline, "data", "backbone")
    after = estimate(pipeline, pipeline.plan())
    assert not {"data", "backbone"} & after.keys()
    assert after["mine"] is not None
    assert after["train"] is None  # of the negatives
    (pipeline.made["backbone"].path / "manifest.json").unlink()
    pipeline.made["mine"] = pipeline.made["data"]
    assert estimate(pipeline, [replace(planned, ref=None) for planned in pipeline.plan() if planned.step.name == "train"]) == {
        "train": None
    }


def test_the_space_of_a_model_is_read_from_headers(tmp_path: Path) -> None:
    """A quantised file, a folder, a hub model that was fetched before, and one that was not."""
    from ullme.backbone import BackboneConfig, backbone_space

    def space(model: str, dtype: str = "float32", revision: str | None = None) -> int | None:
        config = BackboneConfig.model_validate({"model": model, "dtype": dtype, "revision": revision})
        return backbone_space(config, None)  # type: ignore[arg-type] - it has no inputs

    from ullme.tiny import tiny_causal_lm

    model, tokenizer = tiny_causal_lm("llama")
    folder = tmp_path / "hub" / "models--garden--rose" / "snapshots" / "abc"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    full, half = space(str(folder)), space(str(folder), "bfloat16")
    assert full is not None
    assert half is not None
    assert 4 * weights < full < 4 * weights + 40_000
    assert full - half == 2 * weights
    assert space("tiny:llama") == pytest.approx(full, rel=0.1)
    assert space("tiny:no_such_family") is None
    script = textwrap.dedent(
        """
        import sys
        from ullme.backbone import BackboneConfig, backbone_space
        for model in ("garden/rose", "garden/tulip"):
            print(backbone_space(BackboneConfig(model=model, revision="abc", dtype="float32"), None))
        """
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(full), "None"]


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
        taken_away = kind in ("safetensors", "parquet")  # by the library itself; the folder has to do
        file = "" if taken_away else r"( \(written last: artifact|/artifact)/large\.npy\)?"
        expected = rf"{kind} DISK/{kind}/work/words-\w+{file}: (No|Not enough free) space.*; make room .* run again"
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
    made, refused, completed = runs_of(full(body, tmp_path, ULLME, SMOKE))
    assert (made[0], refused[0], completed[0]) == (0, 1, 0), (made, refused, completed)
    assert re.match(
        r"stage backbone failed: backbone writes up to (201|382) kB, but .*/disk/store has 2\d\d kB free, of which 126 kB stay in reserve "
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
    stopped, completed, digest, undisturbed, expected = runs_of(full(body, tmp_path, ULLME, SMOKE))
    assert (stopped[0], completed[0], undisturbed[0]) == (1, 0, 0), (stopped, completed, undisturbed)
    assert re.match(
        r"stage train failed: .*/work/model-\w+.*(state\.safetensors\.partial|metrics\.jsonl)\)?: No space left on device; make room .* run again",
        stopped[1][-1],
    )
    assert not any("Traceback" in line for line in stopped[1])
    assert any(re.search(r"train: resuming training after step \d+ of 40", line) for line in completed[1])
    assert not any("resuming" in line for line in undisturbed[1])
    assert digest[1] == expected[1]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0.0 kB"), (900, "0.9 kB"), (1_240, "1.2 kB"), (99_600, "100 kB"), (2_345_678, "2.3 MB"), (270e6, "270 MB"), (3.24e9, "3.2 GB"), (1e15, "1,000,000 GB")],
)  # fmt: skip
def test_sizes_are_for_people(count: float, words: str) -> None:
    assert as_size(count) == words
