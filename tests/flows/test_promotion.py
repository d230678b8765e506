"""The rule and the registry: a better model comes in together with its index; the same model with newer documents comes in
when it is not worse on the standing queries; a tie, a worse one and a withdrawn one stay out.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import BASE, BETTER, GOOD, Scene, report

from flows.promotion import PromotionConfig, promote
from flows.registry import Registry
from flows.retriever import Retriever
from flows.tracking import TrackingConfig
from ullme.errors import ConfigError, ContractError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NOISE = np.clip(GOOD + np.random.default_rng(1).normal(0, 0.05, 60), 0, 1)


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


def test_the_same_model_with_another_index_is_promoted_when_it_is_not_worse(scene: Scene) -> None:
    found = scene.refresh(GOOD)
    assert (found.promoted, found.created, found.version, found.difference) == (True, True, 2, 0.0)
    assert "not worse than champion version 1, the same model" in found.why
    assert versions(scene) == {"champion": 2, "challenger": None}


def test_the_margin_is_what_the_same_model_may_lose(scene: Scene) -> None:
    found = scene.refresh(GOOD - 0.03)
    assert not found.promoted
    assert "may be worse than champion version 1, the same model: ndcg_at_10 may have dropped by more than 0.02" in found.why
    assert found.difference == pytest.approx(-0.03)
    assert versions(scene) == {"champion": 1, "challenger": 2}
    release = scene.release(index="graph")
    assert scene.promote(release, tuned=GOOD - 0.03, rule=PromotionConfig(margin=0.04)).promoted


def test_the_lower_end_of_the_interval_decides_not_the_mean(scene: Scene) -> None:
    noisy = GOOD + np.where(np.arange(60) % 2, 0.2, -0.2)
    found = scene.refresh(noisy)
    assert found.difference == pytest.approx(0.0)
    assert not found.promoted


@pytest.mark.parametrize(("recall", "promoted"), [(GOOD - 0.05, False), (GOOD, True)])
def test_the_same_model_may_not_drop_in_a_further_metric(scene: Scene, recall: np.ndarray, promoted: bool) -> None:
    rule = PromotionConfig(must_not_drop=("recall_at_10",))
    found = scene.refresh({"scores": GOOD, "recall": recall}, before={"scores": GOOD, "recall": GOOD}, rule=rule)
    assert found.promoted is promoted
    assert ("recall_at_10 may have dropped by more than 0.02" in found.why) is not promoted


@pytest.mark.parametrize(("recall", "promoted"), [(GOOD - 0.05, False), (GOOD, True)])
def test_a_better_model_may_not_drop_in_a_further_metric(scene: Scene, recall: np.ndarray, promoted: bool) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    rule = PromotionConfig(must_not_drop=("recall_at_10",))
    tuned, champion = {"scores": BETTER, "recall": recall}, {"scores": GOOD, "recall": GOOD}
    found = scene.promote(scene.release("other", "other_index"), tuned=tuned, base=BASE, champion=champion, rule=rule)
    assert found.promoted is promoted
    assert found.why.startswith("better than champion version 1")
    assert ("but recall_at_10 may have dropped" in found.why) is not promoted


def test_queries_whose_judgements_changed_do_not_count(scene: Scene) -> None:
    changed = ["changed"] * 20 + ["same"] * 40
    worse_there = np.concatenate([GOOD[:20] - 0.5, GOOD[20:]])
    found = scene.refresh({"scores": worse_there, "judged": changed})
    assert found.promoted
    assert found.difference == 0.0
    assert "40 queries" in found.why


def test_without_a_standing_query_nothing_is_promoted(scene: Scene) -> None:
    found = scene.refresh({"scores": GOOD, "judged": ["changed"] * 60})
    assert not found.promoted
    assert "cannot be compared with champion version 1" in found.why
    assert "no query that both measurements share" in found.why
    assert "ullme rollback --to" in found.why
    assert versions(scene) == {"champion": 1, "challenger": 2}


def test_a_champion_whose_report_is_gone_keeps_its_place(scene: Scene) -> None:
    scene.promote(scene.release(), tuned=GOOD, base=BASE)
    champion = scene.registry.champion()
    assert champion is not None
    shutil.rmtree(champion.release.reports["tuned"].path)
    found = scene.promote(scene.release(index="graph"), tuned=BETTER)
    assert not found.promoted
    assert "cannot be compared with champion version 1" in found.why


def test_a_withdrawn_version_is_not_promoted_again_by_itself(scene: Scene) -> None:
    scene.refresh(GOOD)
    first, second = (scene.registry.find(scene.release(index=index)) for index in ("index", "graph"))
    assert first is not None
    assert second is not None
    scene.registry.withdraw(second, why="wrong answers")
    scene.registry.crown(first, why="rolled back")
    found = scene.promote(scene.release(index="graph"), tuned=BETTER)
    assert (found.promoted, found.created) == (False, False)
    assert "version 2 was rolled back" in found.why
    assert "wrong answers" in found.why
    assert versions(scene) == {"champion": 1, "challenger": None}


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
