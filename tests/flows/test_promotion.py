"""The registry: a tie is called a tie, a worse model stays out, a better one comes in together with its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import report

from flows.registry import Promotion, PromotionConfig, Registry, promote
from flows.retriever import Release, Retriever
from flows.tracking import TrackingConfig
from ullme.artifacts import ArtifactRef, Store
from ullme.errors import ConfigError, ContractError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RULE = PromotionConfig()
RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0.0, 0.3, 60)
GOOD = BASE + RANDOM.uniform(0.1, 0.5, 60)
BETTER = np.minimum(GOOD + RANDOM.uniform(0.0, 0.2, 60), 1.0)
NOISE = np.clip(GOOD + RANDOM.normal(0, 0.05, 60), 0, 1)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables made, once for all tests: that takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    Registry.at(TrackingConfig(), folder)
    return folder / "mlflow.db"


class Scene:
    """A registry and a store to release into."""

    def __init__(self, folder: Path, artifacts: Mapping[str, ArtifactRef]) -> None:
        self.store, self.artifacts = Store(folder / "reports"), artifacts
        self.registry = Registry.at(TrackingConfig(model_name="test"), folder)

    def release(self, model: str = "model", index: str = "index") -> Release:
        return Release(model=self.artifacts[model], index=self.artifacts[index], data=self.artifacts["data"])

    def promote(self, release: Release, *, rule: PromotionConfig = RULE, pinned: bool = True, **scores: Any) -> Promotion:
        reports = {name: report(self.store, f"{name} {hash(tuple(values))}", values).path for name, values in scores.items()}
        return promote(self.registry, release, reports, rule=rule, pinned=pinned)


@pytest.fixture
def scene(tmp_path: Path, artifacts: Mapping[str, ArtifactRef], empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(tmp_path)
    return Scene(tmp_path, artifacts)


def versions(scene: Scene) -> dict[str, int | None]:
    held = {alias: scene.registry.holder(alias) for alias in ("champion", "challenger")}
    return {alias: version.number if version else None for alias, version in held.items()}


def test_the_first_must_beat_its_base(scene: Scene) -> None:
    tie = scene.promote(scene.release(), tuned=BASE, base=BASE)
    assert (tie.promoted, tie.created, tie.version, tie.p) == (False, True, 1, 1.0)
    assert "a tie" in tie.why
    assert versions(scene) == {"champion": None, "challenger": 1}
    better = scene.promote(scene.release(), tuned=GOOD, base=BASE)
    assert (better.promoted, better.created, better.version) == (True, False, 1)
    assert versions(scene) == {"champion": 1, "challenger": None}


def test_the_same_release_twice_is_one_version_and_not_promoted_again(scene: Scene) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    again = scene.promote(scene.release(), tuned=GOOD, base=BASE)
    assert (again.promoted, again.champion, again.created, again.version) == (False, True, False, 1)
    assert "champion already" in again.why


def test_the_same_model_with_another_index_is_a_tie(scene: Scene) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    found = scene.promote(scene.release(index="other_index"), tuned=GOOD, base=BASE)
    assert (found.promoted, found.created, found.difference) == (False, True, 0.0)
    assert "a tie" in found.why
    assert "same model" in found.why
    assert versions(scene) == {"champion": 1, "challenger": 2}


@pytest.mark.parametrize(("scores", "words"), [(GOOD - 0.08, "worse than"), (NOISE, "a tie"), (GOOD, "a tie")])
def test_worse_or_as_good_is_not_promoted(scene: Scene, scores: Sequence[float], words: str) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    found = scene.promote(scene.release("other", "other_index"), tuned=scores, base=BASE, champion=GOOD)
    assert not found.promoted
    assert words in found.why
    assert versions(scene) == {"champion": 1, "challenger": 2}


def test_better_is_promoted_with_its_index(scene: Scene) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    found = scene.promote(scene.release("other", "other_index"), tuned=BETTER, base=BASE, champion=GOOD)
    assert found.promoted
    assert "better than champion version 1" in found.why
    assert versions(scene) == {"champion": 2, "challenger": None}
    champion = scene.registry.champion()
    assert champion is not None
    assert champion.release.index.digest == scene.artifacts["other_index"].digest
    assert Retriever.open(champion.release).index.fingerprint == scene.artifacts["other"].digest


def test_alpha_decides_what_is_more_than_chance(scene: Scene) -> None:
    few = {"tuned": GOOD[:4], "base": BASE[:4]}
    assert not scene.promote(scene.release(), **few).promoted
    assert scene.promote(scene.release(), rule=PromotionConfig(alpha=0.5), **few).promoted


def test_an_unpinned_model_is_registered_and_not_promoted(scene: Scene) -> None:
    found = scene.promote(scene.release(), tuned=GOOD, base=BASE, pinned=False)
    assert (found.promoted, found.created) == (False, True)
    assert "backbone.revision" in found.why


def test_a_champion_that_cannot_be_measured_keeps_its_place(scene: Scene) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    found = scene.promote(scene.release("other", "other_index"), tuned=BETTER, base=BASE)
    assert not found.promoted
    assert "could not be measured" in found.why


def test_reports_of_another_corpus_are_refused(scene: Scene) -> None:
    reports = {
        "tuned": report(scene.store, "here", GOOD).path,
        "base": report(scene.store, "there", BASE, corpus="another").path,
    }
    with pytest.raises(ContractError, match="different corpus"):
        promote(scene.registry, scene.release(), reports, rule=PromotionConfig())


def test_the_registered_model_gives_the_encoders_vectors(scene: Scene) -> None:
    import mlflow

    from ullme.encoder import Encoder

    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    model = mlflow.pyfunc.load_model("models:/test@champion")
    texts = ["the sum of all values", "the median"]
    expected = Encoder.load(scene.artifacts["model"].path).encode(texts, prompt="query")
    np.testing.assert_allclose(np.array(model.predict(texts)), expected, atol=1e-6)


def test_a_server_that_is_not_there_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.uri: .* cannot be used"):
        Registry.at(TrackingConfig(uri="ftp://nowhere"), tmp_path)
