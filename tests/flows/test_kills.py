"""Mining and building an index, killed at ten seeded moments of their work: the next start ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import produce

from flows.stage import STAGES, Outcome, Request, StageRequest
from ullme.artifacts import MANIFEST, ArtifactRef, Store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
SEED = 20261122
CASES = [
    (stage, round(random.Random(f"{SEED} {stage} {number}").random(), 2)) for stage in ("mine", "index") for number in range(5)
]
"""(stage, moment as a share of the time that it works)."""
SECTIONS: dict[str, Any] = {
    "data": {"source": {"kind": "pydocs"}, "max_train_queries": 300, "max_dev_queries": 40, "max_test_queries": 40,
             "max_documents": 1_500},
    "backbone": {"model": "tiny:llama", "max_tokens": 96, "dtype": "float32"},
    "mine": {"miner": {"kind": "fused", "num_negatives": 2}, "teacher_queries": 100,
             "judge": {"reranker": {"kind": "generation", "passage_tokens": 32}}},
    "encode": {},
    "index": {"kind": "rabitq", "min_recall": 0.9},
}  # fmt: skip
INPUTS = {
    "data": (),
    "backbone": (),
    "mine": ("data", "model"),
    "encode": ("data", "model"),
    "index": ("embeddings",),
}
KIND_OF = {"mine": "negatives", "index": "index"}


class Scene:
    """A store with everything that both stages start from, and what they make of it undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, folder / "before"
        store = Store(self.before)
        made: dict[str, ArtifactRef] = {}
        for name in ("data", "backbone", "encode"):
            section: Any = STAGES[name].section(SECTIONS[name])
            section = section.resolved() if name != "encode" else section
            ref = produce(store, name, section, **{what: made[what] for what in INPUTS[name]})
            made[ref.kind] = ref
        self.refs = made
        self.golden: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        for stage, kind in KIND_OF.items():
            child = self.start(stage, f"golden-{stage}")
            self.until_at_work(child, stage, f"golden-{stage}")
            began = time.monotonic()
            assert child.wait(300) == 0
            self.seconds[stage] = time.monotonic() - began
            self.golden[kind] = self.digest(stage, f"golden-{stage}")

    def start(self, stage: str, name: str) -> subprocess.Popen[bytes]:
        """The stage in a process of its own, on a copy of the store called `name`, or on that one again."""
        store = self.folder / name
        if not store.is_dir():
            shutil.copytree(self.before, store)
        refs = {
            what: ref.model_copy(update={"uri": str(store / ref.path.relative_to(self.before))}) for what, ref in self.refs.items()
        }
        asked = StageRequest(
            label=stage, stage=stage, section=SECTIONS[stage], refs={what: refs[what] for what in INPUTS[stage]}, seed=0
        )
        file = self.folder / f"{name}.json"
        request = Request(store=store, stages=(asked,), result=self.folder / f"{name}.result.json", parent=os.getpid())
        file.write_text(request.model_dump_json())
        return subprocess.Popen([sys.executable, "-m", "flows.stage", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL)

    def until_at_work(self, child: subprocess.Popen[bytes], stage: str, name: str) -> None:
        """Wait for its folder."""
        while not any((self.folder / name / "work").glob(f"{KIND_OF[stage]}-*")):
            assert child.poll() is None, f"{stage} ended before it was seen at work"
            time.sleep(0.002)

    def digest(self, stage: str, name: str) -> str:
        """Of all bytes of what the stage made, but logs."""
        outcome = Outcome.model_validate_json((self.folder / f"{name}.result.json").read_text())
        assert not outcome.failed, outcome.message
        assert [ref.kind for ref in outcome.refs] == [KIND_OF[stage]]
        assert (outcome.refs[0].path / MANIFEST).is_file()
        return outcome.refs[0].digest


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(("stage", "moment"), CASES)
def test_after_a_kill_the_next_start_makes_the_same(stage: str, moment: float, scene: Scene) -> None:
    name = f"{stage}-{moment}"
    child = scene.start(stage, name)
    scene.until_at_work(child, stage, name)
    time.sleep(moment * scene.seconds[stage])
    child.kill()
    child.wait()
    again = scene.start(stage, name)
    assert again.wait(300) == 0
    assert scene.digest(stage, name) == scene.golden[KIND_OF[stage]]
    assert not any((scene.folder / name / "work").glob("*-*")), "a half-written folder is left"
    shutil.rmtree(scene.folder / name)


def test_there_are_ten_moments_of_both_stages() -> None:
    assert len(set(CASES)) == 10
    assert {stage for stage, _ in CASES} == set(KIND_OF)
