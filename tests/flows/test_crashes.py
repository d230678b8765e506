"""The crash matrix: kill -9 of the stage, the flow, the worker and of everything, at seeded moments of every stage.

Whatever is killed, the next start ends with the same artifacts, byte for byte, the same scores and the same released
version as a run that nobody disturbed; no slot stays taken and no lock held.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect_stack import ROOT, PrefectStack, until

from flows.registry import Registry
from flows.tracking import TrackingConfig
from ullme.artifacts import MANIFEST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SEED = 20261121
PHASES = {"mine": "negatives", "train": "model", "encode": "embeddings", "build": "index", "evaluate": "report", "promote": ""}
"""Stage -> kind of what it makes. Their order is that of the run; while a stage works, `work/<kind>-<key>` is there."""
TARGETS = ("stage", "flow", "worker", "everything")
NAME = "train-and-index/weekly-train-and-index"
TRACKING = TrackingConfig(model_name="ullme-smoke", experiment="smoke")


class Scene:
    """A running stack, an undisturbed run to compare with, and how long each of its stages took."""

    def __init__(self, stack: PrefectStack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
        self.config["training"]["runtime"] = {"checkpoint_every": 2}
        self.config["encoding"] = {"runtime": {"shard_rows": 100}}
        stack.deploy(self.config)
        self.empty = folder / "empty"
        Registry.at(TRACKING, self.empty)  # an MLflow database with its tables made: that takes seconds
        self.golden = folder / "golden"
        shutil.copytree(self.empty, self.golden)
        run = self.start(self.golden)
        self.seconds = self._watched(run)
        assert stack.wait(run)["state"]["type"] == "COMPLETED", stack.log("worker")[-3000:]

    def start(self, store: Path) -> str:
        return self.stack.trigger(NAME, config={**self.config, "store": str(store)})

    def at_work(self, store: Path, phase: str) -> bool:
        """Whether a stage is working now."""
        if phase != "promote":
            return any((store / "work").glob(f"{PHASES[phase]}-*"))
        with contextlib.suppress(sqlite3.Error), sqlite3.connect(f"file:{store}/mlflow.db?mode=ro", uri=True) as database:
            return bool(database.execute("select 1 from runs where name = 'promote' and status = 'RUNNING'").fetchone())
        return False

    def _watched(self, run: str) -> dict[str, float]:
        """Seconds that each stage works, from the first artifact of it to the last."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        deadline = time.monotonic() + 300
        while self.stack.run(run)["state"]["type"] not in ("COMPLETED", "FAILED", "CRASHED"):
            assert time.monotonic() < deadline, self.stack.log("worker")[-3000:]
            for _ in range(40):
                for phase in PHASES:
                    if self.at_work(self.golden, phase):
                        first.setdefault(phase, time.monotonic())
                        last[phase] = time.monotonic()
                time.sleep(0.01)
        assert first.keys() == PHASES.keys(), first
        return {phase: last[phase] - first[phase] for phase in PHASES}

    def store_before(self, phase: str, name: str) -> Path:
        """A copy of the undisturbed store as it was before a stage."""
        store = self.folder / name
        shutil.copytree(self.empty, store)
        later = list(PHASES)[list(PHASES).index(phase) :]
        for path, manifest in manifests(self.golden).items():
            stage = {"index": "build"}.get(manifest["provenance"]["stage"], manifest["provenance"]["stage"])
            if stage not in later:
                shutil.copytree(self.golden / path, store / path)
        return store


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("crashes")
    stack = PrefectStack(folder / "stack")
    try:
        stack.start_server().start_worker()
        yield Scene(stack, folder)
    finally:
        stack.close()


def manifests(store: Path) -> dict[str, dict[str, Any]]:
    """`kind/key` -> manifest of every finished artifact."""
    return {
        str(file.parent.relative_to(store)): json.loads(file.read_text())
        for file in sorted(store.glob(f"*/*/{MANIFEST}"))
        if file.parent.parent.name not in ("work", "mlartifacts")
    }


def state(store: Path) -> dict[str, Any]:
    """What a run leaves: artifacts with their digests (of all bytes but logs), and what is released."""
    registry = Registry.at(TRACKING, store)
    releases = {alias: version.release.digests for alias in ("champion", "challenger") if (version := registry.holder(alias))}
    return {"digests": {name: manifest["digest"] for name, manifest in manifests(store).items()}, "releases": releases}


def scores(store: Path) -> dict[str, Any]:
    """Every number of every report."""
    return {name: manifest["meta"] for name, manifest in manifests(store).items() if manifest["kind"] == "report"}


def cases() -> list[tuple[str, str, float]]:
    """(stage, what is killed, moment as a share of the stage's time). A release runs in the flow: it has no stage process."""
    draw = random.Random(SEED)
    found = []
    for phase in PHASES:
        for target in TARGETS:
            moment = round(draw.random(), 2)
            found.append((phase, "flow" if (phase, target) == ("promote", "stage") else target, moment))
    return found


def kill(stack: PrefectStack, target: str, engine: psutil.Process) -> None:
    """kill -9. engine: the process of the flow run."""
    if target == "worker":
        stack.kill_worker()
        return
    victims: list[Callable[[], None]] = [engine.kill]
    stages = [child for child in engine.children(recursive=True) if "flows.stage" in child.cmdline()]
    if target == "stage":
        victims = [child.kill for child in stages]
    elif target == "everything":
        victims = [stack.kill_worker, engine.kill, *(child.kill for child in stages), stack.kill_server]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim()


@pytest.mark.parametrize(("phase", "target", "moment"), cases())
def test_after_a_kill_the_next_start_ends_as_if_nothing_had_happened(phase: str, target: str, moment: float, scene: Scene) -> None:
    stack = scene.stack
    store = scene.store_before(phase, f"{phase}-{target}-{moment}")
    first = scene.start(store)
    engine = stack.engine(first)
    deadline = time.monotonic() + 120
    while not scene.at_work(store, phase):
        assert time.monotonic() < deadline, stack.log("worker")[-3000:]
        time.sleep(0.005)
    time.sleep(moment * scene.seconds[phase])
    kill(stack, target, engine)

    if target == "everything":
        stack.start_server()
    if target in ("worker", "everything"):
        stack.start_worker()
    ended = stack.wait(first, timeout=240)["state"]["type"]
    assert ended == ("COMPLETED" if target in ("stage", "worker") else "CRASHED"), stack.log("worker")[-3000:]
    again = scene.start(store)
    assert stack.wait(again, timeout=300)["state"]["type"] == "COMPLETED", stack.log("worker")[-3000:]

    assert state(store) == state(scene.golden)
    assert scores(store) == scores(scene.golden)
    assert len(Registry.at(TRACKING, store).versions()) == 1
    assert not any((store / "work").glob("*-*")), "a half-written folder is left"
    assert not any((store / "work" / "runs").glob("*")), "the record of a run is left"
    until(lambda: not stack.slots(), timeout=10, message=lambda: f"taken slots: {stack.slots()}")
    shutil.rmtree(store)


def test_there_are_enough_cases_and_every_stage_and_victim_is_among_them() -> None:
    assert len(cases()) >= 24
    assert {phase for phase, _, _ in cases()} == set(PHASES)
    assert {target for _, target, _ in cases()} == set(TARGETS)
    assert signal.SIGKILL == 9
