from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gradcache import LORA, OBJECTIVES, SEEDS, learned_of, of_learned
from test_training import GRL, PHASE, config, killed, refs, rows_of
from toys import tiny_encoder, toy_batch

from ullme import distributed
from ullme.artifacts import ArtifactRef, Store
from ullme.distributed import Processes, Turn
from ullme.errors import NotFinite, StageFailed
from ullme.gradcache import step
from ullme.training import TRAIN

__all__ = ["refs"]  # the fixture


class Case(NamedTuple):
    """A step: which objective, whether through an adapter, with weights in pieces, and the tokens of a chunk."""

    kind: str
    adapted: bool
    sharded: bool
    budget: int


GENERAL = ["contrastive", "all pairs", "learned", "grl", "sft", "preference, ipo", "preference, kto", "spread_out", "sum"]
CASES = [
    *[Case(kind, True, False, 60) for kind in GENERAL],
    Case("grl", True, False, 1),
    Case("grl", True, False, 100_000),
    Case("contrastive", False, False, 60),
    Case("sft", False, False, 60),
    *[Case(kind, True, True, 60) for kind in ("contrastive", "grl", "sum")],
    Case("contrastive", False, True, 60),
    Case("sft", False, True, 60),
]
Found = tuple[dict[str, np.ndarray], dict[str, float], float]


def gradients_of(cases: list[Case]) -> list[Found]:
    """Per case the gradient of one step in float64 by name and in full, its terms, and the norm that clipping sees."""
    found = []
    for case in cases:
        encoder = tiny_encoder(dtype=torch.float64, lora=LORA if case.adapted else None)
        if case.sharded and distributed.current().count > 1:
            distributed.shard(encoder.model)
        trained = encoder.trainable()
        objective = OBJECTIVES[case.kind]
        learned = learned_of(objective)
        report = step(
            encoder, objective, toy_batch(encoder, seed=SEEDS.get(case.kind, 0)), chunk_tokens=case.budget, learned=learned
        )
        norm = distributed.clip(list(trained.values()), 1e-3)
        whole = {name: distributed.whole(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in trained.items()}
        found.append(({name: value.numpy() for name, value in (whole | of_learned(learned)).items()}, report.terms, norm))
    return found


@pytest.fixture(scope="module")
def alone() -> list[Found]:
    return gradients_of(CASES)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest) -> list[Found]:
    return distributed.run(request.param, gradients_of, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_several_processes_have_the_gradient_of_one(number: int, alone: list[Found], together: list[Found]) -> None:
    (wanted, terms, norm), (found, said, clipped) = alone[number], together[number]
    assert set(found) == set(wanted)
    whole = float(np.sqrt(sum((value**2).sum() for name, value in wanted.items() if not name.startswith("learned"))))
    assert whole == pytest.approx(min(1e-3, norm), rel=1e-3)  # it is not zero
    for name, gradient in wanted.items():
        assert np.linalg.norm(found[name] - gradient) <= 1e-9 * np.linalg.norm(gradient) + 1e-12 * whole, name
    assert said == pytest.approx(terms, rel=1e-9)
    assert clipped == pytest.approx(norm, rel=1e-6)


def biased(cases: list[Case]) -> list[Found]:
    """The same, but the second process's part of every sum counts 1% too much."""
    plain = Processes.add_gradients

    def add(self: Processes, parameters: Any) -> None:
        kept = list(parameters)
        for parameter in kept:
            if self.rank and parameter.grad is not None:
                parameter.grad *= 1.01
        plain(self, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "add_gradients", add)
        return gradients_of(cases)


def test_the_comparison_sees_one_percent(alone: list[Found]) -> None:
    found, _, _ = distributed.run(2, biased, CASES[:1])[0]
    wanted, _, _ = alone[0]
    away = [np.linalg.norm(found[name] - value) / np.linalg.norm(value) for name, value in wanted.items() if value.any()]
    assert max(away) > 1e-4


# Shares


def test_every_chunk_has_one_process_and_every_process_as_many_turns() -> None:
    chunks = [[0], [1, 2], [3], [4, 5, 6], [7]]
    shares = [Processes(rank, 2).turns(chunks) for rank in range(2)]
    assert [turn.chunk for turn in shares[0]] == [[0], [3], [7]]
    assert shares[1] == [Turn([1, 2], counts=True), Turn([4, 5, 6], counts=True), Turn([7], counts=False)]
    assert Processes(4, 5).turns(chunks[:1]) == [Turn([0], counts=False)]
    assert Processes().turns(chunks) == [Turn(chunk, counts=True) for chunk in chunks]
    assert Processes(1, 2).turns([]) == []


def test_chunks_are_smaller_where_some_would_go_without() -> None:
    assert Processes(0, 4).budget([10, 10, 20], 1000) == 10
    assert Processes(0, 4).budget([10, 10, 20], 5) == 5
    assert Processes().budget([10, 10, 20], 1000) == 40


# Processes


def rank_of(boxes: list[str]) -> tuple[int, int, list[str]]:
    here = distributed.current()
    return here.rank, here.count, here.agreed(lambda: [*boxes, f"made by {here.rank}"])


def test_the_first_process_answers_and_all_agree_with_it() -> None:
    assert distributed.run(2, rank_of, ["a"]) == (0, 2, ["a", "made by 0"])
    assert not distributed.joined()


def blows_up() -> None:
    if distributed.current().rank == 1:
        raise NotFinite(3, "contrastive", ["q1"])
    distributed.current().add(torch.zeros(1))  # waits for the other


def test_an_error_of_any_process_is_the_error() -> None:
    with pytest.raises(NotFinite, match=r"step 3: contrastive is not finite .*q1") as caught:
        distributed.run(2, blows_up)
    assert caught.value.ids == ("q1",)


def crashes() -> None:
    if distributed.current().rank == 1:
        os._exit(7)
    distributed.current().add(torch.zeros(1))


def test_a_process_that_crashes_ends_the_run() -> None:
    with pytest.raises((StageFailed, RuntimeError)):
        distributed.run(2, crashes)


def speaks() -> None:
    logging.getLogger("ullme.training").info("said by %d, 100%% sure", distributed.current().rank)
    logging.getLogger("ullme.training").warning("warned by %d", distributed.current().rank)


def test_the_first_process_speaks_through_this_ones_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ullme"):
        distributed.run(2, speaks)
    said = [(record.levelno, record.getMessage()) for record in caplog.records if "by" in record.getMessage()]
    assert said == [(logging.INFO, "said by 0, 100% sure"), (logging.WARNING, "warned by 0")]


def in_turn(folder: str) -> list[str]:
    here = distributed.current()
    with here.leader_first():
        if here.leads:
            time.sleep(0.3)
        seen = sorted(file.name for file in Path(folder).iterdir())
        (Path(folder) / str(here.rank)).touch()
    gathered: list[list[str]] = [[], []]
    torch.distributed.all_gather_object(gathered, seen)
    return gathered[1]


def test_the_leader_goes_first(tmp_path: Path) -> None:
    assert distributed.run(2, in_turn, str(tmp_path)) == ["0"]


# Whole runs


def weights(ref: ArtifactRef) -> dict[str, torch.Tensor]:
    return load_file(ref.path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_on_two_processes_ends_where_one_does(
    shard: bool, adapter: bool, refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    stored = {**GRL, "generation": {**GRL["generation"], "reference": "stored"}, "learning_rate": 0.001}
    phases = (GRL, {**PHASE, "weight_decay": 0.1}) if adapter else (PHASE, stored)
    settings: dict[str, Any] = {} if adapter else {"adapter": None}
    one = Store(tmp_path / "one").produce(TRAIN, config(*phases, **settings), refs, seed=1)
    runtime = {"processes": 2, "shard": shard, "chunk_tokens": 60, "checkpoint_every": 2}
    two = Store(tmp_path / "two").produce(TRAIN, config(*phases, **settings, runtime=runtime), refs, seed=1)
    found, wanted = weights(two), weights(one)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-3) for name in wanted)
    for row, other in zip(rows_of(one), rows_of(two), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-3)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_go_on_where_a_killed_one_was(shard: bool, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(PHASE, {**GRL, "steps": 3}, runtime={"checkpoint_every": 2})
    one = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    store = killed(Store(tmp_path / "two"), section, refs, 6)
    runtime = {"checkpoint_every": 2, "processes": 2, "shard": shard}
    two = store.produce(TRAIN, config(PHASE, {**GRL, "steps": 3}, runtime=runtime), refs, seed=1)
    assert all(torch.allclose(weights(two)[name], value, atol=1e-3) for name, value in weights(one).items())
    assert [row["step"] for row in rows_of(two)] == [1, 2, 3, 4, 5, 6]
    assert rows_of(two)[:4] == rows_of(one)[:4]
