"""Encoding shared by real processes: the same bytes as in one, one error when one fails, and nobody left behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import ToyData, toy_data

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.encoding import ENCODE, EncodeConfig, EncodeJob, open_embeddings
from ullme.errors import LimitExceeded, NotFinite, StageFailed
from ullme.workers import encode_in_workers

WORDS = ["rain", "snow", "wind", "fog", "sun"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def refs(store: Store) -> dict[str, ArtifactRef]:
    base = BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=24)
    texts = tuple(f"document {number} about {WORDS[number % 5]}" for number in range(50))
    return {"data": toy_data(store, ToyData(texts=texts)), "model": store.produce(BACKBONE, base, {}, seed=0)}


def job(refs: dict[str, ArtifactRef], out: Path, *, shard_rows: int = 6) -> EncodeJob:
    out.mkdir()
    return EncodeJob.model_validate(
        {
            "model": refs["model"].path,
            "fingerprint": refs["model"].digest,
            "corpus": refs["data"].path,
            "count": 50,
            "out": out,
            "runtime": {"shard_rows": shard_rows, "processes": 2},
        }
    )


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ullme.workers" in child.cmdline():
                found.append(child)
    return found


def test_two_processes_write_the_bytes_of_one(store: Store, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    def produced(name: str, processes: int) -> ArtifactRef:
        section = EncodeConfig.model_validate({"runtime": {"shard_rows": 6, "processes": processes}})
        return Store(tmp_path / name).produce(ENCODE, section, refs, seed=0)

    one, two = produced("one", 1), produced("two", 2)
    assert two.digest == one.digest
    assert two.meta == one.meta
    assert two.meta["texts_encoded"] == 50
    assert children() == []


def test_a_worker_that_reports_an_error_ends_the_others_and_raises_it(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(refs["model"].path), str(broken)], check=True)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFinite, match="embedding is not finite") as caught:
        encode_in_workers(job(refs, tmp_path / "out").model_copy(update={"model": broken}))
    assert set(caught.value.ids) <= {f"d{number}" for number in range(50)}
    assert children() == []


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (signal.SIGKILL, LimitExceeded, r"process [12] of 2 was killed by signal 9.*what is finished is kept"),
        (signal.SIGSEGV, StageFailed, "stage encode was killed by signal 11"),
    ],
)
def test_a_worker_that_is_killed_ends_the_others(
    number: int, error: type[Exception], words: str, refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    def kill() -> None:
        while not (found := children()):
            time.sleep(0.01)
        found[-1].send_signal(number)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(error, match=words):
        encode_in_workers(job(refs, tmp_path / "out"))
    killer.join()
    assert children() == []


def test_workers_end_with_a_parent_that_is_killed(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    request = tmp_path / "job.json"
    request.write_text(job(refs, tmp_path / "out", shard_rows=1).model_dump_json())
    script = (
        "import sys; from ullme.encoding import EncodeJob; from ullme.workers import encode_in_workers;"
        "encode_in_workers(EncodeJob.model_validate_json(open(sys.argv[1]).read()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(request)])
    started: list[psutil.Process] = []
    while len(started) < 2:
        assert parent.poll() is None
        time.sleep(0.01)
        started = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(started, timeout=60)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert len(gone) == 2
    assert alive == []


def test_more_processes_than_shards_are_not_started(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    small = job(refs, tmp_path / "out", shard_rows=50)
    most: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most.append(len(children()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert encode_in_workers(small).texts == 50
    over.set()
    watcher.join()
    assert max(most) == 1
    assert open_embeddings(small.out).count == 50
