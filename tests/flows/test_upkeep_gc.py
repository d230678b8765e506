"""`ullme gc`: what a champion needs stays, what nothing needs goes, and nothing half deleted is ever taken for finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import FUNCTIONS, WORDS, Nothing, Scene

import flows.garbage
from flows.cli import _ullme_app, dispatch
from flows.config import RunConfig, validate
from flows.garbage import Entry, remove
from flows.pipeline import Model, Pipeline
from flows.registry import Registry
from flows.retriever import Release
from flows.stage import STAGES
from flows.tracking import Tracker, TrackingConfig, connect
from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.errors import ArtifactError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def gc(config: Path, *words: str) -> int:
    """The exit code of `ullme gc`."""
    return dispatch(_ullme_app(), ["gc", *words, "--config", str(config)])


def folders(store: Path) -> set[str]:
    """`kind/key` of everything that lies in the kinds' folders."""
    return {f"{kind}/{path.name}" for kind in flows.garbage.KINDS for path in (store / kind).glob("*")}


# A champion whose documents change


class House:
    """A store, its configuration, and runs of the real pipeline on it, without Prefect."""

    def __init__(self, folder: Path, plain: Mapping[str, Any]) -> None:
        self.code, self.store, self.file = folder / "code", folder / "store", folder / "house.yaml"
        self.code.mkdir()
        for module in range(12):
            self.write(module, 0)
        data = {**plain["data"], "source": {**plain["data"]["source"], "roots": [str(self.code)]}, "max_documents": None}
        self.plain = {**plain, "store": str(self.store), "data": data, "tracking": {"model_name": "house"}}
        self.file.write_text(json.dumps(self.plain))
        self.registry = Registry.at(self.config().tracking, self.store)

    def config(self) -> RunConfig:
        return validate(self.plain).resolved()

    def write(self, module: int, edition: int) -> None:
        """The functions of a module; of the first, those of this edition."""
        parts = [
            FUNCTIONS.format(
                name=f"{word}_{module}", what=f"{word} number {module}", number=module * 100 + place + 7000 * edition * (place == 0)
            )
            for place, word in enumerate(WORDS)
        ]
        (self.code / f"module{module}.py").write_text("\n".join(parts))

    def run(self, model: Model) -> Pipeline:
        """Make everything in this process, and record it in MLflow as a run does."""
        config = self.config()
        pipeline = Pipeline(config, self.registry.usable_champion(), model=model)
        with Tracker.start(config.tracking, config.store, "a run") as tracker:
            tracker.parameters(config.as_json())
            for name in list(pipeline.steps):
                if name not in pipeline.named(*pipeline.steps):
                    continue
                request = pipeline.request(name)
                work = STAGES[request.stage]
                with tracker.stage(name, request.section) as run:
                    ref = pipeline.store.produce(work.stage, work.section(request.section), request.refs, seed=request.seed)
                    run.finish(ref, seconds=1.0, reused=False)
                pipeline.made[name] = ref
        return pipeline

    def release(self, pipeline: Pipeline) -> Release:
        """Register what was made, and make it the champion."""
        release = pipeline.release()
        self.registry.crown(self.registry.register(release, run_id=None), why="for the test")
        return release


def test_what_a_champion_needs_stays_so_that_search_and_refresh_go_on(
    tmp_path: Path, plain_config: Mapping[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    house = House(tmp_path, plain_config)
    released = [house.release(house.run("trained"))]
    for edition in (1, 2, 3):
        house.write(0, edition)
        released.append(house.release(house.run("champion")))
    before = folders(house.store)

    assert gc(house.file, "--runs", "1", "--champions", "1") == 0
    told = capsys.readouterr().out
    assert folders(house.store) == before
    assert "nothing was deleted" in told

    assert gc(house.file, "--runs", "1", "--champions", "1", "--delete") == 0
    told = capsys.readouterr().out
    after = folders(house.store)
    gone = before - after
    assert all(name in told for name in gone)
    kept = {str(getattr(release, part)) for release in released[2:] for part in ("model", "index", "data")}
    assert kept <= after
    # of the first two refreshes: their documents, vectors, indexes and reports
    assert {str(release.index) for release in released[:2]} <= gone
    assert str(released[1].data) in gone
    assert str(released[0].data) in after  # the champion's model was trained on it
    embeddings = {name for name in after if name.startswith("embeddings/")}
    assert embeddings == {str(house.run("champion").made["encode tuned"])}
    assert "house version 4 (champion)" in told
    assert "house version 3 (former champion)" in told

    assert dispatch(_ullme_app(), ["history", "--config", str(house.file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("artifacts gone")] == ["2", "1"]
    assert dispatch(_ullme_app(), ["search", "the sum", "--config", str(house.file), "--json", "-k", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    house.write(0, 4)
    refreshed = house.run("champion")
    assert refreshed.made["encode tuned"].meta["texts_encoded"] == 1
    assert dispatch(_ullme_app(), ["rollback", "--config", str(house.file)]) == 0
    assert gc(house.file, "--runs", "1", "--champions", "1", "--delete") == 0
    assert Pipeline(house.config(), house.registry.usable_champion(), model="champion").plan()[0].ref is not None


# Small stores


def artifact(store: Store, kind: str, label: str, **refs: ArtifactRef) -> ArtifactRef:
    """An artifact of 1,000 bytes. Embeddings tell their model."""

    def write(section: Nothing, inputs: Inputs, draft: Draft) -> None:
        (draft.path / "content").write_bytes(label.encode().ljust(1000))
        if "model" in refs:
            draft.meta["fingerprint"] = refs["model"].digest

    return store.produce(Stage(kind, kind, 1, write), Nothing(label=label), refs, seed=0)


def small_release(scene: Scene, label: str) -> Release:
    """A release of artifacts of the scene's own store, each made from what such a thing is made from."""
    store = scene.store
    data, base = artifact(store, "data", label), artifact(store, "model", f"base of {label}")
    negatives = artifact(store, "negatives", label, data=data)
    model = artifact(store, "model", label, data=data, negatives=negatives, model=base)
    embeddings = artifact(store, "embeddings", label, data=data, model=model)
    index = artifact(store, "index", label, embeddings=embeddings)
    report = artifact(store, "report", label, data=data, model=model, embeddings=embeddings, index=index)
    return Release(model=model, index=index, data=data, reports={"tuned": report})


def test_an_alias_keeps_everything_that_its_version_was_made_from(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.registry.challenge(scene.registry.register(small_release(scene, "a"), run_id=None))
    needed = folders(scene.store.root)
    orphan = artifact(scene.store, "data", "b")
    assert gc(scene.config, "--delete") == 0
    assert folders(scene.store.root) == needed
    told = capsys.readouterr().out
    assert f"{orphan}" in told
    assert "nothing needs it" in told
    assert "test version 1 (challenger)" in told
    assert "freed 1.5 kB" in told or "freed 1.4 kB" in told  # the content and its manifest


def test_other_names_of_the_registry_keep_their_versions_too(scene: Scene) -> None:
    for number in range(101):  # MLflow answers with a hundred at a time
        connect(scene.tracking.address(scene.store.root)).create_registered_model(f"name {number:03d}")
    other = scene.registry.named("one that comes last")
    other.challenge(other.register(small_release(scene, "a"), run_id=None))
    needed = folders(scene.store.root)
    assert gc(scene.config, "--delete") == 0
    assert folders(scene.store.root) == needed


def test_a_former_champion_keeps_the_newest_vectors_of_its_model_and_a_withdrawn_one_nothing(scene: Scene) -> None:
    registry, store = scene.registry, scene.store
    releases = {label: small_release(scene, label) for label in ("a", "b", "c")}
    for label, release in releases.items():
        version = registry.register(release, run_id=None)
        registry.crown(version, why="for the test")
        if label == "b":
            registry.withdraw(version, why="wrong")
    first = {label: artifact(store, "embeddings", label, data=one.data, model=one.model) for label, one in releases.items()}
    time.sleep(1.1)  # of which is newer a manifest tells the second
    second = artifact(store, "embeddings", "newer", data=artifact(store, "data", "newer"), model=releases["a"].model)
    assert gc(scene.config, "--champions", "1", "--delete") == 0

    def there(label: str) -> list[str]:
        return [kind for kind in ("model", "index", "data") if getattr(releases[label], kind).path.is_dir()]

    assert [there(label) for label in ("a", "b", "c")] == [["model", "index", "data"], [], ["model", "index", "data"]]
    assert {label: ref.path.is_dir() for label, ref in first.items()} == {"a": False, "b": False, "c": True}
    assert second.path.is_dir()
    assert gc(scene.config, "--champions", "0", "--delete") == 0
    assert [there(label) for label in ("a", "c")] == [[], ["model", "index", "data"]]
    assert not second.path.exists()


def test_the_model_that_a_training_started_from_goes_unless_it_is_the_base(scene: Scene) -> None:
    first = small_release(scene, "a")
    later = artifact(scene.store, "model", "later", model=first.model)
    release = first.model_copy(update={"model": later, "index": artifact(scene.store, "index", "later"), "reports": {}})
    scene.registry.challenge(scene.registry.register(release, run_id=None))
    assert gc(scene.config, "--delete") == 0
    assert {path.name for path in (scene.store.root / "model").iterdir()} == {later.path.name}


def test_the_last_runs_keep_what_they_made_or_used(scene: Scene) -> None:
    made = [artifact(scene.store, "data", label) for label in ("a", "b", "c")]
    scene.registry.challenge(scene.registry.register(small_release(scene, "kept"), run_id=None))
    for experiment, ref in (("one", made[0]), ("one", made[1]), ("two", made[2])):
        with (
            Tracker.start(TrackingConfig(experiment=experiment), scene.store.root, "a run") as tracker,
            tracker.stage("data", {}) as run,
        ):
            run.finish(ref, seconds=0.0, reused=True)
        time.sleep(0.01)
    assert gc(scene.config, "--runs", "1", "--delete") == 0
    assert [ref.path.exists() for ref in made] == [False, True, True]
    assert gc(scene.config, "--runs", "0", "--delete") == 0
    assert [ref.path.exists() for ref in made] == [False, False, False]


def test_a_store_that_nothing_is_known_of_is_left_alone(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    ref = artifact(scene.store, "data", "a")
    assert gc(scene.config, "--delete") == 2
    assert "know anything of" in capsys.readouterr().err
    assert ref.path.is_dir()


# Half-written, half deleted


def work_folder(store: Store, name: str, *, days: float) -> Path:
    folder = store.root / "work" / name
    (folder / "artifact").mkdir(parents=True)
    (folder / "artifact" / "part").write_bytes(b"x" * 500)
    for path in (folder / "artifact" / "part", folder / "artifact", folder):
        os.utime(path, (time.time() - days * 86_400,) * 2)
    return folder


def test_half_written_folders_go_when_they_are_old_and_nobody_writes_there(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.registry.challenge(scene.registry.register(small_release(scene, "a"), run_id=None))
    old, young, busy = (
        work_folder(scene.store, f"model-{name}", days=days) for name, days in (("old", 8), ("young", 6), ("busy", 8))
    )
    records = scene.store.root / "work" / "runs"
    records.mkdir()
    os.utime(records, (0, 0))
    with (scene.store.root / "locks" / "model-busy").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert gc(scene.config, "--delete") == 0
        assert [path.exists() for path in (old, young, busy, records)] == [False, True, True, True]
    assert gc(scene.config, "--delete", "--work-days", "5") == 0
    assert [path.exists() for path in (young, busy, records)] == [False, False, True]
    assert list((scene.store.root / "work").iterdir()) == [records]


def test_what_was_set_aside_as_damaged_goes(scene: Scene) -> None:
    release = small_release(scene, "a")
    scene.registry.challenge(scene.registry.register(release, run_id=None))
    aside = release.model.path.with_name(f"{release.model.path.name}.damaged-0")
    shutil.copytree(release.model.path, aside)
    assert gc(scene.config) == 0
    assert aside.exists()
    assert gc(scene.config, "--delete") == 0
    assert not aside.exists()
    assert release.model.path.exists()


def killed_while_deleting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ullme gc --delete`, killed before it has removed the first file."""

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flows.garbage.shutil, "rmtree", killed)
        assert gc(config, "--delete") == 130


def test_an_interrupted_deletion_is_never_opened_and_is_finished_next_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.registry.challenge(scene.registry.register(small_release(scene, "a"), run_id=None))
    ref = artifact(scene.store, "data", "b")
    killed_while_deleting(scene.config, monkeypatch)
    assert (ref.path / "content").is_file()
    store = Store(scene.store.root)
    with pytest.raises(ArtifactError, match="never finished"):
        store.open(ref)
    assert ref not in store.finished("data")
    assert gc(scene.config, "--delete") == 0
    assert "its deletion was interrupted" in capsys.readouterr().out
    assert not ref.path.exists()
    killed_again = artifact(store, "data", "b")
    killed_while_deleting(scene.config, monkeypatch)
    assert artifact(Store(scene.store.root), "data", "b") == killed_again  # made anew where somebody wants it
    assert store.open(killed_again) == killed_again.path


def test_an_interrupted_deletion_of_a_half_written_folder_is_not_resumed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.registry.challenge(scene.registry.register(small_release(scene, "a"), run_id=None))
    work = work_folder(scene.store, "model-old", days=8)
    killed_while_deleting(scene.config, monkeypatch)
    assert not work.exists()
    assert [path.name for path in work.parent.iterdir()] == ["model-old.deleted"]
    assert gc(scene.config, "--delete", "--work-days", "1000") == 0
    assert list(work.parent.iterdir()) == []


def test_an_artifact_that_is_locked_is_not_deleted(scene: Scene) -> None:
    ref = artifact(scene.store, "data", "b")
    entry = Entry(ref.path, 1000, 0.0, "nothing needs it")
    with (scene.store.root / "locks" / f"data-{ref.path.name}").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert not remove(scene.store, entry)
        assert scene.store.open(ref) == ref.path
    assert remove(scene.store, entry)
    assert not ref.path.exists()


def test_gc_refuses_with_one_line_while_a_pipeline_runs(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.liveness import alone

    scene.registry.challenge(scene.registry.register(small_release(scene, "a"), run_id=None))
    ref = artifact(scene.store, "data", "b")
    with alone(scene.store.root):
        assert gc(scene.config, "--delete") == 1
    captured = capsys.readouterr()
    assert f"process {os.getpid()}" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert ref.path.exists()
    assert gc(scene.config, "--delete") == 0
    assert not ref.path.exists()
