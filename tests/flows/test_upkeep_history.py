"""`ullme history` and `ullme rollback`: what was in use when, and back to it, killed at any moment or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, BETTER, GOOD, Scene

import flows.registry
from flows.cli import _ullme_app, dispatch
from flows.registry import Registry, Version
from flows.retriever import Release
from flows.tracking import TrackingConfig, connect

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def ullme(scene: Scene, *words: str) -> int:
    """The exit code of a command on the scene's store."""
    return dispatch(_ullme_app(), [*words, "--config", str(scene.config)])


def version(scene: Scene, number: int) -> Version:
    return next(one for one in scene.registry.versions() if one.number == number)


def champion(registry: Registry) -> int:
    found = registry.champion()
    assert found is not None
    return found.number


# History


def test_history_shows_versions_newest_first_with_scores_reigns_and_aliases(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.refresh(GOOD)
    scene.promote(scene.release("other", "other_index"), tuned=BASE, base=BASE, champion=GOOD)
    assert ullme(scene, "history") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("test: 3 versions, newest first")
    numbers = {line.split()[0]: line for line in lines[2:] if not line.startswith("         ")}
    assert list(numbers) == ["3", "2", "1"]
    assert numbers["3"].endswith("challenger")
    assert numbers["2"].endswith("champion")
    for part in ("model", "index", "data"):
        assert getattr(scene.release("other", "other_index"), part).path.name[:8] in numbers["3"]
    assert f"{GOOD.mean():.3f}" in numbers["1"]
    assert f"{BASE.mean():.3f}" in numbers["3"]
    assert sum(": not worse than champion version 1" in line for line in lines) == 1
    assert sum(": better than its base model" in line for line in lines) == 1


def test_history_as_json_has_whole_names_and_every_reign(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.refresh(GOOD)
    assert ullme(scene, "rollback", "--why", "wrong answers") == 0
    capsys.readouterr()
    assert ullme(scene, "history", "--json") == 0
    second, first = json.loads(capsys.readouterr().out)
    assert (first["version"], first["aliases"], second["aliases"]) == (1, ["champion"], [])
    assert first["index"] == str(scene.artifacts["index"])
    assert first["exact"] == first["index_score"] == pytest.approx(GOOD.mean())
    assert [reign["why"].split(":")[0] for reign in first["crowned"]] == [
        "better than its base model (there is no champion yet)",
        "rolled back from version 2",
    ]
    assert second["withdrawn"].endswith("wrong answers")


def test_history_follows_the_decisive_metric_and_says_what_is_gone(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = {"scores": GOOD, "recall": BETTER}
    gone = scene.release("model", "index")
    copy = scene.store.root / "index" / gone.index.path.name
    shutil.copytree(gone.index.path, copy)
    scene.promote(gone.model_copy(update={"index": gone.index.model_copy(update={"uri": str(copy)})}), tuned=tuned, base=BASE)
    shutil.rmtree(copy)
    assert ullme(scene, "history", "--set", "promotion.metric=recall_at_10") == 0
    out = capsys.readouterr().out
    assert "recall_at_10" in out
    assert f"{BETTER.mean():.3f}" in out
    assert "champion, artifacts gone" in out
    assert f"gone: {gone.index}" in out
    shutil.rmtree(version(scene, 1).release.reports["tuned"].path)
    assert ullme(scene, "history", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["exact"] is None


def test_history_of_nothing_is_one_line(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert ullme(scene, "history") == 0
    assert capsys.readouterr().out.splitlines() == [
        "no version of 'test' was registered yet; `ullme run train-and-index --config FILE` makes the first"
    ]


# Rollback


def test_rollback_moves_model_and_index_back_and_withdraws_what_it_leaves(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.refresh(GOOD)
    assert ullme(scene, "rollback", "--why", "wrong answers") == 0
    assert "test version 1 is the champion, version 2 is withdrawn" in capsys.readouterr().out
    found = scene.registry.champion()
    assert found is not None
    assert (found.number, found.release.index.digest) == (1, scene.artifacts["index"].digest)
    assert version(scene, 2).withdrawn.endswith(": wrong answers")
    again = scene.promote(scene.release(index="graph"), tuned=BETTER)
    assert not again.promoted
    assert ullme(scene, "rollback") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nothing to roll back to")
    assert len(captured.err.splitlines()) == 1
    assert champion(scene.registry) == 1


def test_rollback_passes_over_withdrawn_versions(scene: Scene) -> None:
    scene.refresh(GOOD)
    scene.promote(scene.release("other", "other_index"), tuned=BETTER, base=BASE, champion=GOOD)
    assert champion(scene.registry) == 3
    assert ullme(scene, "rollback") == 0
    assert champion(scene.registry) == 2
    assert ullme(scene, "rollback") == 0
    assert champion(scene.registry) == 1
    assert [bool(version(scene, number).withdrawn) for number in (1, 2, 3)] == [False, True, True]


def test_rolling_back_to_a_withdrawn_version_takes_its_mark_away(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.refresh(GOOD)
    assert ullme(scene, "rollback") == 0
    assert ullme(scene, "rollback", "--to", "2") == 0
    assert "no rollback" in capsys.readouterr().out
    assert champion(scene.registry) == 2
    assert [version(scene, number).withdrawn for number in (1, 2)] == ["", ""]


def test_a_challenger_is_crowned_by_hand_and_nothing_is_withdrawn(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    scene.promote(scene.release("other", "other_index"), tuned=GOOD, base=BASE, champion=GOOD)
    assert ullme(scene, "rollback", "--to", "2", "--why", "it reads better") == 0
    assert "crowned by hand: test version 2 is the champion in place of version 1" in capsys.readouterr().out
    assert scene.registry.holder("challenger") is None
    assert version(scene, 2).crowned[-1]["why"] == "by hand: it reads better"
    assert version(scene, 1).withdrawn == ""
    assert ullme(scene, "rollback", "--to", "2") == 0
    assert "already" in capsys.readouterr().out
    assert len(version(scene, 2).crowned) == 1


def test_without_a_champion_a_version_can_be_crowned_by_hand(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.promote(scene.release(), tuned=BASE, base=BASE)
    assert ullme(scene, "rollback") == 1
    assert "no version is the champion" in capsys.readouterr().err
    assert ullme(scene, "rollback", "--to", "7") == 1
    assert "there are: 1" in capsys.readouterr().err
    assert ullme(scene, "rollback", "--to", "1") == 0
    assert champion(scene.registry) == 1


def moved(release: Release, part: str, to: Path) -> Release:
    """The same release with a copy of one artifact."""
    ref = getattr(release, part)
    shutil.copytree(ref.path, to / ref.kind / ref.path.name)
    return release.model_copy(update={part: ref.model_copy(update={"uri": str(to / ref.kind / ref.path.name)})})


@pytest.mark.parametrize("part", ["model", "index", "data"])
def test_a_version_that_cannot_be_opened_is_refused_and_nothing_changes(
    scene: Scene, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = moved(scene.release(), part, scene.store.root)
    scene.promote(first, tuned=GOOD, base=BASE)
    scene.promote(scene.release(index="graph"), tuned=GOOD)
    before = scene.registry.versions()
    file = max(getattr(first, part).path.iterdir(), key=lambda file: 0 if file.is_dir() else file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert ullme(scene, "rollback") == 1
    captured = capsys.readouterr()
    assert "test version 1 cannot be opened, so nothing was changed" in captured.err
    assert file.name in captured.err
    assert scene.registry.versions() == before


def test_an_index_of_another_model_is_not_rolled_back_to(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.promote(scene.release("other", "index"), tuned=GOOD, base=BASE)
    scene.promote(scene.release("other", "other_index"), tuned=GOOD)
    assert champion(scene.registry) == 2
    assert ullme(scene, "rollback") == 1
    assert "index was built with model" in capsys.readouterr().err
    assert champion(scene.registry) == 2


# Killed at any moment


class Fragile:
    """A client that is killed before its n-th call that changes something."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("set_", "delete_")):
            return getattr(self._client, name)
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return getattr(self._client, name)


def killed(scene: Scene, monkeypatch: pytest.MonkeyPatch, calls: int, *words: str) -> bool:
    """Run a command that is killed before its call number `calls`; whether it was."""
    with monkeypatch.context() as patch:
        patch.setattr(flows.registry, "connect", lambda uri: Fragile(connect(uri), calls))
        return ullme(scene, *words) == 130


@pytest.mark.parametrize("calls", range(6))
def test_a_rollback_that_is_killed_is_finished_by_repeating_it(
    scene: Scene, calls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.refresh(GOOD)
    scene.registry.register(scene.release("other", "other_index"), run_id=None)  # never champion: never gone back to
    was_killed = killed(scene, monkeypatch, calls, "rollback", "--why", "wrong answers")
    assert was_killed == (calls < 5)  # a mark, the intent, the alias, the entry, the intent away
    between = scene.registry.champion()
    assert between is not None
    assert between.number == (1 if calls >= 3 else 2)
    assert between.crowned
    if was_killed:
        assert ullme(scene, "rollback", "--why", "wrong answers") == 0
    assert champion(scene.registry) == 1
    assert version(scene, 2).withdrawn.endswith("wrong answers")
    assert [reign["why"].split(":")[0].split(" (")[0] for reign in version(scene, 1).crowned] == [
        "better than its base model",
        "rolled back from version 2",
    ]
    assert len(version(scene, 2).crowned) == 1
    assert ullme(scene, "rollback") == 1
    assert "nothing to roll back to" in capsys.readouterr().err


@pytest.mark.parametrize("calls", range(5))
def test_a_crowning_that_is_killed_leaves_one_of_the_two_and_is_finished_later(
    scene: Scene, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    scene.promote(scene.release("other", "other_index"), tuned=GOOD, base=BASE, champion=GOOD)
    assert killed(scene, monkeypatch, calls, "rollback", "--to", "2")
    if calls < 2:
        assert champion(scene.registry) == 1
        assert list(version(scene, 2).crowned) == []
    else:
        assert champion(scene.registry) == 2
        assert len(version(scene, 2).crowned) == 1
    assert ullme(scene, "rollback", "--to", "2") == 0
    assert champion(scene.registry) == 2
    assert scene.registry.holder("challenger") is None
    assert len(version(scene, 2).crowned) == 1
    assert version(scene, 1).withdrawn == ""


def test_a_server_that_does_not_answer_is_not_taken_for_an_empty_registry(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    registry = Registry.at(TrackingConfig(model_name="test"), scene.store.root)
    (scene.store.root / "mlflow.db").write_bytes(b"no database" * 100)
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException):
        registry.champion()


def test_a_version_carries_the_description_of_its_configuration(scene: Scene) -> None:
    described = Registry.at(TrackingConfig(model_name="test", description="functions, by their docstrings"), scene.store.root)
    registered = [registry.register(scene.release(), run_id=None) for registry in (described, scene.registry)]
    client = connect(scene.tracking.address(scene.store.root))
    found = [client.get_model_version("test", str(version.number)).description for version in registered]
    assert found == ["functions, by their docstrings", None]
