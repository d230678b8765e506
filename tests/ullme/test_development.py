from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_training import GRL, PHASE, Killed, config, examples, kill_at, refs, rows_of, weights_after_every_step
from toys import tiny_encoder

from ullme import loop
from ullme.artifacts import ArtifactRef, Store
from ullme.data import Example
from ullme.development import reciprocal_rank, set_aside
from ullme.errors import DataError
from ullme.training import TRAIN

__all__ = ["refs"]  # the fixture


def example(number: int, positives: tuple[str, ...], negatives: tuple[str, ...] = ()) -> Example:
    return Example(f"q{number}", f"query {number}", positives, positives, negatives, negatives)


def test_what_is_set_aside_shares_no_passage_with_what_is_trained_on() -> None:
    several = [example(n, (f"p{n // 2}",), ("common",)) for n in range(40)]
    rest, aside = set_aside(several, 8, seed=5)
    assert len(aside) == 8
    assert not {e.positive_ids for e in rest} & {e.positive_ids for e in aside}
    assert len(rest) >= 24
    assert (rest, aside) == set_aside(several, 8, seed=5)
    assert aside != set_aside(several, 8, seed=6)[1]


@pytest.mark.parametrize("count", [5, 30])
def test_too_few_queries_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=r"development\.queries: .* set aside leave \d+ of 7 queries"):
        set_aside(examples(7), count, seed=0)  # all of them share a passage


def test_the_reciprocal_rank_by_hand() -> None:
    encoder = tiny_encoder()
    several = [example(0, ("alpha beta",), ("gamma", "delta")), example(1, ("omega", "sigma"), ("alpha beta", "kappa"))]
    queries = encoder.encode([e.query for e in several], prompt="query")
    pool = ["alpha beta", "gamma", "delta", "omega", "sigma", "kappa"]
    scores = queries @ encoder.encode(pool, prompt="document").T
    expected = []
    for row, own in zip(scores, ({"alpha beta"}, {"omega", "sigma"}), strict=True):
        order = [pool[place] for place in np.argsort(-row)]
        expected.append(1 / (1 + min(order.index(text) for text in own)))
    assert reciprocal_rank(encoder, several, batch_tokens=64) == pytest.approx(np.mean(expected))


# In a run


LAST = {**GRL, "steps": 6, "learning_rate": 0.02}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What the first measurement finds, the second, and so on."""
    values: dict[int, float] = {}
    calls = iter(range(1, 100))
    monkeypatch.setattr(loop, "reciprocal_rank", lambda *_, **__: values[next(calls)])
    return values


def run(where: Path, refs: dict[str, ArtifactRef], *phases: dict[str, Any], **development: Any) -> ArtifactRef:
    settings = {"queries": 4, "every": 2, **development}
    return Store(where).produce(TRAIN, config(*phases, development=settings, runtime={"checkpoint_every": 1}), refs, seed=1)


def test_the_best_weights_of_the_last_phase_are_kept(
    refs: dict[str, ArtifactRef], tmp_path: Path, script: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    script |= {1: 0.3, 2: 0.5, 3: 0.5}
    seen = weights_after_every_step(monkeypatch)
    made = run(tmp_path, refs, PHASE, LAST)
    assert {name: made.meta[name] for name in ("best_step", "development_mrr", "steps")} == {
        "best_step": 7,
        "development_mrr": 0.5,
        "steps": 9,
    }
    assert {row["step"]: row["development_mrr"] for row in rows_of(made) if "development_mrr" in row} == {5: 0.3, 7: 0.5, 9: 0.5}
    for name, tensor in load_file(made.path / "adapter/adapter_model.safetensors").items():
        assert torch.equal(tensor, seen[6][name.replace(".weight", ".embedding.weight")])
    assert any(not torch.equal(seen[6][name], weight) for name, weight in seen[-1].items())


def test_training_ends_when_there_is_no_more_to_gain(
    refs: dict[str, ArtifactRef], tmp_path: Path, script: dict[int, float]
) -> None:
    script |= {1: 0.5, 2: 0.4, 3: 0.6}
    made = run(tmp_path, refs, PHASE, LAST, patience=1)
    assert (made.meta["steps"], made.meta["best_step"]) == (7, 5)
    assert [row["step"] for row in rows_of(made)] == list(range(1, 8))


@pytest.mark.parametrize("step", [6, 8, 9])
def test_a_killed_run_keeps_the_same_best(step: int, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    expected = run(tmp_path / "one", refs, PHASE, LAST)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step, "before")
        with pytest.raises(Killed):
            run(tmp_path / "two", refs, PHASE, LAST)
    made = run(tmp_path / "two", refs, PHASE, LAST)
    assert (made.digest, rows_of(made)) == (expected.digest, rows_of(expected))
    assert expected.meta["best_step"] in {5, 7, 9}


@pytest.mark.parametrize("other", [{"average_last": 2}, {"runtime": {"shard": True}}])
def test_what_does_not_go_together_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"development and .* do not go together"):
        config(PHASE, development={"queries": 4}, **other)
