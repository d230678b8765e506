"""The store: what goes in decides the key, what came out decides the digest, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.components import Section
from ullme.errors import ArtifactError, LimitExceeded


class Runtime(Section):
    """Speed only."""

    workers: int = 1


class Words(Section):
    """A section to test with."""

    text: str = "hello"
    runtime: Runtime = Runtime()


def write(section: Words, inputs: Inputs, draft: Draft) -> None:
    draft.restart()
    before = (inputs["before"] / "words.txt").read_text() if "before" in inputs else ""
    (draft.path / "words.txt").write_text(before + section.text)
    (draft.path / "logs").mkdir()
    (draft.path / "logs" / "time.txt").write_text(str(time.time()))
    draft.meta["words"] = 1


WRITE = Stage("write", "words", 1, write)


def made(store: Store, text: str = "hello", **refs: ArtifactRef) -> ArtifactRef:
    return store.produce(WRITE, Words(text=text), refs, seed=0)


def test_everything_that_goes_in_is_in_the_key(store: Store) -> None:
    a, b = made(store, "a"), made(store, "b")
    base = store.key(WRITE, Words(), {"before": a}, seed=0)
    others = [
        store.key(WRITE, Words(text="other"), {"before": a}, seed=0),
        store.key(WRITE, Words(), {"before": b}, seed=0),
        store.key(WRITE, Words(), {"other": a}, seed=0),
        store.key(WRITE, Words(), {}, seed=0),
        store.key(WRITE, Words(), {"before": a}, seed=1),
        store.key(Stage("write", "words", 2, write), Words(), {"before": a}, seed=0),
        store.key(Stage("rewrite", "words", 1, write), Words(), {"before": a}, seed=0),
    ]
    assert len({base, *others}) == 8


def test_runtime_fields_are_not_in_the_key(store: Store) -> None:
    slow, fast = Words(), Words(runtime=Runtime(workers=8))
    assert store.key(WRITE, slow, {}, seed=0) == store.key(WRITE, fast, {}, seed=0)


def test_the_second_time_nothing_is_run(store: Store) -> None:
    first = made(store)

    def never(section: Words, inputs: Inputs, draft: Draft) -> None:
        raise AssertionError("ran again")

    assert store.produce(Stage("write", "words", 1, never), Words(), {}, seed=0) == first


def test_the_digest_follows_the_files_and_not_the_logs(store: Store, tmp_path: Path) -> None:
    first = made(store)
    again = made(Store(tmp_path / "elsewhere"))
    assert again.digest == first.digest
    assert (again.path / "logs" / "time.txt").read_text() != (first.path / "logs" / "time.txt").read_text()
    assert made(store, "other").digest != first.digest


def test_an_input_reaches_the_next_stage_by_name(store: Store) -> None:
    second = made(store, " world", before=made(store))
    assert (second.path / "words.txt").read_text() == "hello world"
    with pytest.raises(ArtifactError, match="needs an input called 'nothing'"):
        Inputs(store, {})["nothing"]


def _flip(ref: ArtifactRef) -> None:
    file = ref.path / "words.txt"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip, "words.txt is damaged"),
        (lambda ref: (ref.path / "words.txt").unlink(), "words.txt is missing"),
        (lambda ref: (ref.path / "more.txt").write_text(""), "unexpected file more.txt"),
        (lambda ref: (ref.path / "logs" / "time.txt").write_text(""), "time.txt is damaged"),
        (lambda ref: (ref.path / "manifest.json").unlink(), "never finished"),
        (lambda ref: (ref.path / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_open_finds_damage(tmp_path: Path, damage: Callable[[ArtifactRef], object], words: str) -> None:
    ref = made(Store(tmp_path))
    damage(ref)
    with pytest.raises(ArtifactError, match=words):
        Store(tmp_path).open(ref)


def test_an_edited_manifest_does_not_hide_a_changed_file(tmp_path: Path) -> None:
    ref = made(Store(tmp_path))
    _flip(ref)
    file = ref.path / "manifest.json"
    manifest = json.loads(file.read_text())
    import hashlib

    manifest["files"]["words.txt"]["sha256"] = hashlib.sha256((ref.path / "words.txt").read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="was edited"):
        Store(tmp_path).open(ref)


def test_open_refuses_another_kind_and_another_digest(store: Store) -> None:
    ref = made(store)
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'index', got 'words'"):
        store.open(ref, "index")
    with pytest.raises(ArtifactError, match="not the artifact that was meant"):
        store.open(ref.model_copy(update={"digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="no such artifact"):
        store.open(ref.model_copy(update={"uri": str(store.root / "words" / "gone")}))


def test_a_damaged_artifact_is_set_aside_and_made_again(tmp_path: Path) -> None:
    ref = made(Store(tmp_path))
    _flip(ref)
    again = made(Store(tmp_path))
    assert again.digest == ref.digest
    assert Store(tmp_path).open(again) == ref.path
    assert [path.name for path in ref.path.parent.iterdir() if "damaged" in path.name] == [f"{ref.path.name}.damaged-0"]


def test_a_stage_that_fails_leaves_no_artifact_and_keeps_its_scratch(store: Store) -> None:
    def fail(section: Words, inputs: Inputs, draft: Draft) -> None:
        (draft.scratch / "checkpoint").write_text("3")
        raise RuntimeError("out of memory")

    def resume(section: Words, inputs: Inputs, draft: Draft) -> None:
        (draft.path / "words.txt").write_text((draft.scratch / "checkpoint").read_text())

    with pytest.raises(RuntimeError):
        store.produce(Stage("write", "words", 1, fail), Words(), {}, seed=0)
    assert store.find(WRITE, Words(), {}, seed=0) is None
    ref = store.produce(Stage("write", "words", 1, resume), Words(), {}, seed=0)
    assert (ref.path / "words.txt").read_text() == "3"
    assert sorted(path.name for path in ref.path.iterdir()) == ["manifest.json", "words.txt"]
    assert not list((store.root / "work").iterdir())


def test_the_manifest_is_written_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    rename = os.rename

    def watch(source: Path, target: Path) -> None:
        names = sorted(Path(source).rglob("*"), key=lambda path: path.stat().st_mtime_ns)
        seen.append([path.name for path in names if path.is_file()])
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    made(store)
    assert seen[0][-1] == "manifest.json"


PROCESS = dedent(
    """
    import sys, time
    from pathlib import Path
    from ullme.artifacts import Stage, Store
    from ullme.components import Section

    class Words(Section):
        text: str = "hello"

    def run(section, inputs, draft):
        runs = Path(sys.argv[1]) / "runs"
        with runs.open("a") as handle:
            handle.write("run\\n")
        for part in range(int(sys.argv[2])):
            file = draft.path / f"part-{part}"
            if not file.exists():
                file.write_text(section.text)
            print("part", part, flush=True)
            time.sleep(float(sys.argv[3]))

    print(Store(sys.argv[1]).produce(Stage("write", "words", 1, run), Words(), {}, seed=0).digest, flush=True)
    """
)


def start(root: Path, parts: int, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(root), str(parts), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_leaves_nothing_that_looks_finished_and_the_next_run_resumes(tmp_path: Path) -> None:
    with start(tmp_path, 3, 30) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "part 0\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "words").exists()
    with start(tmp_path, 3, 0) as process:
        assert process.wait(20) == 0
    ref = json.loads(next(tmp_path.glob("words/*/manifest.json")).read_text())
    assert sorted(ref["files"]) == ["part-0", "part-1", "part-2"]


def test_two_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    with start(tmp_path, 2, 0.3) as first, start(tmp_path, 2, 0.3) as second:
        digests = [process.communicate(timeout=20)[0].splitlines()[-1] for process in (first, second)]
    assert digests[0] == digests[1]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_no_pickle_anywhere_in_the_source() -> None:
    root = Path(__file__).resolve().parents[2]
    forbidden = ("import " + "pickle", "torch." + "load(", "allow_pickle=" + "True", "import " + "joblib")
    found = [
        f"{path.relative_to(root)}: {word}"
        for package in ("ullme", "indexes", "flows")
        for path in (root / package).rglob("*.py")
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []


# Disk


def weighed(count: int | None) -> Stage:
    return Stage("write", "words", 1, write, lambda section, inputs: count)


def test_a_stage_that_does_not_fit_is_refused_with_the_numbers_and_nothing_is_begun(tmp_path: Path) -> None:
    store = Store(tmp_path, reserve_bytes=10**6)
    with pytest.raises(LimitExceeded) as caught:
        store.produce(weighed(10**17), Words(), {}, seed=0)
    said = r"write writes up to 100,000,000 GB, but \S+ has [\d.,]+ [GM]B free, of which 1\.0 MB stay in reserve \(limits\.disk_"
    assert re.match(said, str(caught.value))
    assert not (tmp_path / "work").exists()


def test_a_finished_artifact_needs_no_space(tmp_path: Path) -> None:
    ref = made(Store(tmp_path))
    assert Store(tmp_path, reserve_bytes=10**17).produce(weighed(10**17), Words(), {}, seed=0) == ref


@pytest.mark.parametrize("needed", [None, 0])
def test_the_reserve_is_kept_also_where_nobody_can_tell_what_is_needed(needed: int | None, tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="nobody can tell how much" if needed is None else r"up to 0\.0 kB"):
        Store(tmp_path, reserve_bytes=10**17).produce(weighed(needed), Words(), {}, seed=0)


def test_space_follows_from_the_manifests_of_the_inputs(store: Store) -> None:
    ref = made(store, "twelve bytes")
    stage = Stage("again", "words", 1, write, lambda section, inputs: sum(inputs.sizes("before").values()))
    found = store.space(stage, Words(), {"before": ref})
    assert found == sum((ref.path / name).stat().st_size for name in ("words.txt", "logs/time.txt"))
    assert store.space(WRITE, Words(), {}) is None


# What a crash or a power cut leaves


def test_everything_is_on_the_disk_before_it_gets_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    before: list[list[str]] = []
    plain_sync, plain_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        plain_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        before.append(list(synced))
        synced.clear()
        plain_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    made(store)
    assert set(before[0]) == {"words.txt", "time.txt", "logs", "manifest.json.partial", "artifact", store.root.name}
    assert before[0].index("manifest.json.partial") > before[0].index("logs")
    assert synced == ["words"]  # the folder that holds the name


def test_what_a_crash_right_after_the_commit_left_is_cleaned_up(store: Store) -> None:
    ref = made(store)
    left = store.root / "work" / f"words-{ref.path.name}" / "scratch"
    left.mkdir(parents=True)
    (left / "state").write_text("no longer needed")
    assert made(store) == ref
    assert not list((store.root / "work").iterdir())
