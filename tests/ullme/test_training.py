from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from toys import json_lines, tiny_encoder, toy_data

from ullme import checkpoints, gradcache
from ullme.artifacts import ArtifactRef, Store, sha256_file
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import Example, read_examples
from ullme.encoder import Encoder
from ullme.errors import ConfigError, DataError, LimitExceeded, NotFinite
from ullme.loop import Loop
from ullme.prompts import PromptConfig
from ullme.sampling import Sampler
from ullme.training import TRAIN, GenerationConfig, LoraConfig, PhaseConfig, TrainConfig

PHASE: dict[str, Any] = {"objective": "contrastive", "steps": 3, "batch_size": 4, "num_negatives": 2, "learning_rate": 0.01}
GRL: dict[str, Any] = {**PHASE, "objective": "grl", "generation": {"passage_tokens": 12, "queries": 2}}
SMALL: dict[str, Any] = {"rank": 2, "alpha": 4}


def config(*phases: dict[str, Any], **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"phases": phases or (GRL,), "adapter": SMALL, **settings})


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    """A tiny base model and a toy data set."""
    store = Store(tmp_path_factory.mktemp("inputs"))
    base = BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=32, prompts=PromptConfig(query="q:\n"))
    return {"data": toy_data(store), "model": store.produce(BACKBONE, base, {}, seed=0)}


CLOCK = {"seconds", "tokens_per_second", "peak_memory_gb"}


def rows_of(ref: ArtifactRef) -> list[dict[str, Any]]:
    """Metrics without what the clock and the machine decide."""
    return [
        {name: value for name, value in row.items() if name not in CLOCK} for row in json_lines(ref.path / "logs/metrics.jsonl")
    ]


def weights_of(ref: ArtifactRef) -> str:
    return sha256_file(ref.path / "model.safetensors")


# The order of examples


def examples(count: int) -> list[Example]:
    return [
        Example(
            f"q{n}",
            f"query {n}",
            (f"p{n}", "shared"),
            (f"passage {n}", "passage of all"),
            ("n0", "n1", "n2"),
            ("no", "never", "not"),
        )
        for n in range(count)
    ]


def sampler(count: int = 7, *, seed: int = 3, phase_index: int = 0, **phase: Any) -> Sampler:
    settings = PhaseConfig.model_validate({**GRL, "batch_size": 3, "steps": 100, **phase})
    return Sampler(examples(count), settings, seed, phase_index)


def test_a_step_is_a_pure_function_of_seed_phase_and_step() -> None:
    first, second = sampler(), sampler()
    forwards = [(first.draw(step), first.scored(step)) for step in range(30)]
    backwards = [(second.draw(step), second.scored(step)) for step in reversed(range(30))][::-1]
    assert forwards == backwards
    for other in (sampler(seed=4), sampler(phase_index=1)):
        assert [other.positions(step) for step in range(30)] != [first.positions(step) for step in range(30)]


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_epochs_are_permutations_with_nothing_left_over(batch_size: int) -> None:
    found = sampler(batch_size=batch_size)
    stream = [position for step in range(7 * 6) for position in found.positions(step)]
    epochs = [stream[start : start + 7] for start in range(0, len(stream), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all(len(found.positions(step)) == batch_size for step in range(42))


def test_a_batch_larger_than_the_examples_is_all_of_them() -> None:
    found = sampler(3, batch_size=8)
    assert found.mixture.size(0) == 3
    assert all(sorted(found.positions(step)) == [0, 1, 2] for step in range(10))


def test_a_query_repeats_in_a_batch_only_across_the_end_of_an_epoch() -> None:
    found = sampler(7, batch_size=3)
    repeats = [step for step in range(70) if len(set(found.positions(step))) < 3]
    assert all(step * 3 // 7 != (step * 3 + 2) // 7 for step in repeats)


def test_every_positive_and_every_negative_has_its_turn_and_none_twice_in_a_row_of_a_batch() -> None:
    drawn = [entry for step in range(60) for entry in sampler().draw(step)]
    assert {positive for _, positive, _ in drawn} == {0, 1}
    assert {negative for _, _, negatives in drawn for negative in negatives} == {0, 1, 2}
    assert all(len(set(negatives)) == len(negatives) == 2 for _, _, negatives in drawn)


def test_scored_queries_are_as_many_as_configured() -> None:
    assert {len(sampler(generation={"queries": 2}).scored(step)) for step in range(9)} == {2}
    assert sampler(generation={"queries": None}).scored(0) == [0, 1, 2]
    assert {row for step in range(30) for row in sampler(generation={"queries": 1}).scored(step)} == {0, 1, 2}


def test_a_batch_shares_passages_marks_known_positives_and_keeps_rows_together() -> None:
    encoder = tiny_encoder(prompts=PromptConfig(query="q:\n"))
    found = sampler(num_negatives=4, generation={"template": "{query}\n", "passage_tokens": 5, "queries": None})
    texts = {
        name: text
        for e in found.examples
        for name, text in zip((*e.positive_ids, *e.negative_ids), (*e.positives, *e.negatives), strict=True)
    }
    decode = encoder.tokenizer.decode
    for step in range(8):
        batch, drawn = found.batch(step, encoder), found.draw(step)
        documents = [decode(row.ids) for row in batch.documents]
        assert len(set(documents)) == len(documents)
        for row, (example, positive, negatives) in enumerate(drawn):
            assert decode(batch.queries[row].ids) == f"q:\n{example.query}"
            columns = batch.candidates[row]
            wanted = [example.positive_ids[positive], *(example.negative_ids[n] for n in negatives)]
            assert [documents[c] for c in columns if c >= 0] == [texts[name] for name in wanted]
            assert columns.tolist().count(-1) == 1  # four were asked for, there are three
            assert {documents[c] for c in np.flatnonzero(batch.known[row])} == (
                set(example.positives) - {example.positives[positive]}
            ) & set(documents)
            place = list(batch.scored).index(row)
            assert decode(batch.prompts[place]) == f"{example.query}\n"
            assert [decode(ids) for ids in batch.passages[place]] == [documents[c][:5] if c >= 0 else "" for c in columns]


def test_plain_contrastive_learning_scores_nothing() -> None:
    batch = sampler(objective="contrastive").batch(0, tiny_encoder())
    assert (batch.scored, batch.prompts, batch.passages) == ((), (), ())


def test_a_single_example_is_not_enough() -> None:
    with pytest.raises(DataError, match="at least 2 examples, got 1"):
        sampler(1)


# The schedule


def rates(**settings: Any) -> list[float]:
    phase = PhaseConfig.model_validate({**PHASE, "steps": 10, "learning_rate": 1.0, **settings})
    return [phase.learning_rate_at(step) for step in range(10)]


def test_the_learning_rate_by_hand() -> None:
    assert rates(schedule="constant", warmup_share=0.0) == [1.0] * 10
    assert rates(schedule="constant", warmup_share=0.4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)
    assert rates(schedule="linear", warmup_share=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = [0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert rates(schedule="cosine", warmup_share=0.2) == pytest.approx([0.5, 1.0, *cosine])


# Whole runs


def test_one_seed_is_bit_equal_in_any_store_and_another_differs(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    one, two = (Store(tmp_path / name).produce(TRAIN, config(), refs, seed=1) for name in ("one", "two/deeper"))
    other = Store(tmp_path / "one").produce(TRAIN, config(), refs, seed=2)
    assert one.digest == two.digest
    assert rows_of(one) == rows_of(two)
    assert weights_of(one) != weights_of(other)
    assert weights_of(one) != weights_of(refs["model"])
    assert rows_of(one) != rows_of(other)


def test_the_artifact_depends_on_no_place_no_clock_and_no_hash_seed(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    ref = Store(tmp_path).produce(TRAIN, config(), refs, seed=1)
    files = [file for file in ref.path.rglob("*") if file.is_file() and file.name != "manifest.json" and "logs" not in file.parts]
    assert {"model.safetensors", "ullme.json", "modules.json", "adapter_model.safetensors"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content, file
        assert str(refs["model"].path).encode() not in content, file
    adapter = json.loads((ref.path / "adapter/adapter_config.json").read_text())
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    assert len(adapter["target_modules"]) == 14


def test_the_result_is_an_encoder_with_the_settings_of_its_base(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    ref = Store(tmp_path).produce(TRAIN, config(), refs, seed=1)
    tuned, base = Encoder.load(ref.path), Encoder.load(refs["model"].path)
    assert tuned.config == base.config
    assert not tuned.has_adapter
    assert np.abs(tuned.encode(["alpha"]) - base.encode(["alpha"])).max() > 1e-3
    assert ref.meta["steps"] == 3
    assert ref.meta["examples"] == 11
    scores = json.loads((ref.path / "logs/scores.json").read_text())
    assert len(scores["before"]["positive"]) == len(scores["after"]["positive"]) == 11
    assert scores["before"] != scores["after"]


def test_every_step_leaves_a_row_with_each_term(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    rows = json_lines(Store(tmp_path).produce(TRAIN, config(GRL, PHASE), refs, seed=1).path / "logs/metrics.jsonl")
    assert [(row["step"], row["phase"]) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert [name for name in rows[0] if name.startswith("loss/")] == ["loss/preference", "loss/contrastive", "loss/kl"]
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in rows[0] if name.startswith("loss/")))
    assert [name for name in rows[3] if name.startswith("loss/")] == ["loss/contrastive"]
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["gradient_norm"] > 0 for row in rows)
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx(
        [0.01 * 0.5 * (1 + math.cos(math.pi * n / 3)) for n in range(3)]
    )


def test_the_loss_falls_on_a_toy_problem(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    objective = {"kind": "grl", "beta": 2.0, "temperature": 0.1}
    generation = {"passage_tokens": 12, "queries": None}
    phase = {**GRL, "steps": 25, "batch_size": 11, "learning_rate": 0.005, "objective": objective, "generation": generation}
    ref = Store(tmp_path).produce(TRAIN, config(phase, adapter={"rank": 8, "alpha": 16}), refs, seed=1)
    for name in ("loss", "loss/contrastive", "loss/preference", "loss/kl"):
        values = [row[name] for row in rows_of(ref)]
        assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5]), name


def test_a_learned_temperature_starts_where_it_is_told_moves_and_does_not_decay(
    refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    found = []
    for decay in (0.0, 0.9):
        phase = {**LEARNED, "weight_decay": decay}
        rows = rows_of(Store(tmp_path).produce(TRAIN, config(phase, phase), refs, seed=1))
        found.append([row["temperature"] for row in rows])
        assert rows[0]["temperature"] == rows[3]["temperature"] == pytest.approx(0.05, rel=1e-6)  # each phase has its own
        assert len({row["temperature"] for row in rows[:3]}) == 3
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("start", "beyond"), [(0.0101, 0.01), (0.99, 1.0)])
def test_a_learned_temperature_stays_in_range(
    start: float, beyond: float, refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradcache.step

    def pushed(*arguments: Any, **options: Any) -> Any:
        report = plain(*arguments, **options)
        options["learned"]["temperature"].grad = torch.tensor(-1.0 if beyond < 0.5 else 1.0)
        return report

    monkeypatch.setattr(gradcache, "step", pushed)
    phase = {**LEARNED, "objective": {**LEARNED["objective"], "temperature": start}, "learning_rate": 0.1}
    rows = rows_of(Store(tmp_path).produce(TRAIN, config(phase), refs, seed=1))
    assert [row["temperature"] for row in rows] == pytest.approx([start, beyond, beyond], rel=1e-6)


@pytest.mark.parametrize("kind", ["contrastive", {"kind": "grl", "preference_weight": 0}])
def test_full_fine_tuning_moves_every_weight(kind: Any, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    ref = Store(tmp_path).produce(TRAIN, config({**GRL, "objective": kind}, adapter=None), refs, seed=1)
    before, after = (load_file(where.path / "model.safetensors") for where in (refs["model"], ref))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (ref.path / "adapter").exists()


def test_full_fine_tuning_with_a_preference_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"phases\.1: objective 'grl' compares with.*set phases\.1\.generation\.reference: stored"
    ):
        config(PHASE, GRL, adapter=None)


# A guide


def guided(folder: Path, *, objective: Any = None, **settings: Any) -> dict[str, Any]:
    default = {"kind": "contrastive", "guided": True, "guide_margin": 0.02, "learn_temperature": True}
    return {**PHASE, "objective": objective or default, "guide": {"model": str(folder)}, **settings}


def save_guide(folder: Path, seed: int, **settings: Any) -> Path:
    encoder = tiny_encoder(**settings)
    torch.manual_seed(seed)
    for parameter in encoder.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    encoder.save(folder)
    return folder


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_guide(tmp_path_factory.mktemp("guide"), 0)


def test_another_guide_in_the_same_folder_is_another_key_and_another_model(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "guide"
    found = []
    for seed in (0, 1):
        section = config(guided(save_guide(folder, seed), objective="distill")).resolved()
        assert section.resolved() == section
        found.append((store.key(TRAIN, section, refs, seed=1), weights_of(store.produce(TRAIN, section, refs, seed=1))))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_a_guides_embeddings_are_learned(refs: dict[str, ArtifactRef], guide_folder: Path, tmp_path: Path) -> None:
    objective = {"kind": "sum", "parts": [{"objective": {"kind": "distill", "target": "embeddings"}}, {"objective": "contrastive"}]}
    phase = guided(guide_folder, objective=objective, steps=15, learning_rate=0.005)
    rows = rows_of(Store(tmp_path).produce(TRAIN, config(phase, adapter={"rank": 8, "alpha": 16}), refs, seed=1))
    values = [row["loss/distill"] for row in rows]
    assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3])


def test_an_objective_without_its_guide_and_a_guide_that_nothing_reads_are_refused(guide_folder: Path) -> None:
    with pytest.raises(ValidationError, match="guide: objective 'distill' compares with one; set guide"):
        config({**PHASE, "objective": "distill"})
    inner = {"kind": "matryoshka", "dims": [8], "objective": {"kind": "contrastive", "guided": True}}
    with pytest.raises(ValidationError, match="guide: objective 'matryoshka' compares with one"):
        config({**PHASE, "objective": inner})
    with pytest.raises(ValidationError, match="guide: the objective does not read it"):
        config(guided(guide_folder, objective="contrastive"))


def test_a_guide_of_another_length_is_refused_before_the_first_step_where_embeddings_are_learned(
    refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    folder = save_guide(tmp_path / "guide", 0, dim=24)
    phase = guided(folder, objective={"kind": "distill", "target": "embeddings"})
    with pytest.raises(ConfigError, match=r"the trained model's length 64, got 24; use target: scores"):
        Store(tmp_path / "store").produce(TRAIN, config(PHASE, phase), refs, seed=1)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    Store(tmp_path / "store").produce(TRAIN, config(guided(folder, objective="distill", steps=1)), refs, seed=1)


# Crash and resume


class Killed(BaseException):
    """What the operating system does to a process."""


FROZEN = {**GRL, "generation": {**GRL["generation"], "score": "sum", "teacher": "frozen"}}
LEARNED = {**PHASE, "objective": {"kind": "contrastive", "learn_temperature": True}}
TWO_PHASES = config(
    FROZEN, {**LEARNED, "weight_decay": 0.1}, adapter={**SMALL, "dropout": 0.2}, runtime={"checkpoint_every": 2, "chunk_tokens": 60}
)


def kill_at(patch: pytest.MonkeyPatch, step: int, moment: str) -> None:
    """Die before the given step (1, 2, ...), after its row was written, or while the next checkpoint is written."""
    count = [0]
    if moment == "checkpoint":
        plain_write = checkpoints.write_atomic

        def write(path: Path, text: str) -> None:
            if path.name == "position.json" and json.loads(text)["done"] >= step:
                raise Killed
            plain_write(path, text)

        patch.setattr(checkpoints, "write_atomic", write)
        return
    plain = Loop.advance

    def advance(self: Loop, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == step and moment == "before":
            raise Killed
        plain(self, *arguments)
        if count[0] == step:
            raise Killed

    patch.setattr(Loop, "advance", advance)


def weights_after_every_step(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Filled as training goes on."""
    plain, seen = Loop.advance, []

    def advance(self: Loop, *arguments: Any) -> None:
        plain(self, *arguments)
        seen.append({name: weight.clone() for name, weight in self.weights().items()})

    patch.setattr(Loop, "advance", advance)
    return seen


def killed(store: Store, section: TrainConfig, refs: dict[str, ArtifactRef], step: int, moment: str = "before") -> Store:
    """The store after a training that died there."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step, moment)
        with pytest.raises(Killed):
            store.produce(TRAIN, section, refs, seed=1)
    return store


@pytest.fixture(scope="module")
def undisturbed(refs: dict[str, ArtifactRef], tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return Store(tmp_path_factory.mktemp("undisturbed")).produce(TRAIN, TWO_PHASES, refs, seed=1)


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        *[(step, "before") for step in range(1, 7)],
        (1, "after"),
        (2, "after"),
        (4, "after"),
        (6, "after"),
        (2, "checkpoint"),
        (4, "checkpoint"),
        (6, "checkpoint"),
    ],
)
def test_a_killed_run_goes_on_to_the_bit_equal_result(
    step: int, moment: str, refs: dict[str, ArtifactRef], undisturbed: ArtifactRef, tmp_path: Path
) -> None:
    store = killed(Store(tmp_path), TWO_PHASES, refs, step, moment)
    left = [file.suffix for file in (tmp_path / "work").rglob("*") if file.is_file()]
    assert set(left) <= {".json", ".jsonl", ".safetensors"}  # nothing pickled
    ref = store.produce(TRAIN, TWO_PHASES, refs, seed=1)
    assert ref.digest == undisturbed.digest
    assert rows_of(ref) == rows_of(undisturbed)
    assert [row["step"] for row in rows_of(ref)] == [1, 2, 3, 4, 5, 6]
    scores = [json.loads((where.path / "logs/scores.json").read_text()) for where in (ref, undisturbed)]
    assert scores[0] == scores[1]
    assert ref.meta["final_loss"] == undisturbed.meta["final_loss"]


def test_a_resumed_run_does_not_repeat_finished_steps(
    refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = killed(Store(tmp_path), TWO_PHASES, refs, 6)
    plain, steps = Loop.advance, []
    monkeypatch.setattr(Loop, "advance", lambda self, s, phase, step: (steps.append((phase, step)), plain(self, s, phase, step))[1])
    store.produce(TRAIN, TWO_PHASES, refs, seed=1)
    assert steps == [(1, 1), (1, 2)]  # the checkpoint holds four


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_with_a_guide_goes_on_to_the_bit_equal_result_and_encodes_nothing_again(
    step: int, refs: dict[str, ArtifactRef], guide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config(guided(guide_folder), runtime={"checkpoint_every": 1})
    expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    store = killed(Store(tmp_path / "two"), section, refs, step)
    left = [file.suffix for file in (tmp_path / "two/work").rglob("*") if file.is_file()]
    assert set(left) <= {".json", ".jsonl", ".safetensors"}
    monkeypatch.setattr("ullme.guide._encoded", lambda *_, **__: pytest.fail("the guide encoded again"))
    ref = store.produce(TRAIN, section, refs, seed=1)
    assert ref.digest == expected.digest
    assert rows_of(ref) == rows_of(expected)


def test_two_crashes_in_a_row_do_no_harm(refs: dict[str, ArtifactRef], undisturbed: ArtifactRef, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (3, 2):
        killed(store, TWO_PHASES, refs, step, "after")
    assert store.produce(TRAIN, TWO_PHASES, refs, seed=1).digest == undisturbed.digest


def test_full_fine_tuning_resumes_bit_equal_too(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(PHASE, adapter=None, runtime={"checkpoint_every": 1})
    expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    store = killed(Store(tmp_path / "two"), section, refs, 3)
    assert store.produce(TRAIN, section, refs, seed=1).digest == expected.digest


# What is not finite


def test_a_loss_that_blows_up_names_step_term_and_queries_and_keeps_the_checkpoint(
    refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    phase = {**PHASE, "learning_rate": 1e30, "schedule": "constant", "warmup_share": 0.0}
    section = config(phase, runtime={"checkpoint_every": 1})
    with pytest.raises(NotFinite, match="step 2: contrastive is not finite") as caught:
        Store(tmp_path).produce(TRAIN, section, refs, seed=1)
    found = Sampler(read_examples(refs["data"].path), section.phases[0], 1)
    assert list(caught.value.ids) == [example.query_id for example, _, _ in found.draw(1)]
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]
    assert [row["step"] for row in json_lines(next(tmp_path.rglob("metrics.jsonl")))] == [1]


def test_a_gradient_that_is_not_finite_stops_the_run(
    refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradcache.step

    def poisoned(encoder: Encoder, *arguments: Any, **options: Any) -> Any:
        report = plain(encoder, *arguments, **options)
        next(p for p in encoder.model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return report

    monkeypatch.setattr(gradcache, "step", poisoned)
    with pytest.raises(NotFinite, match="step 1: the gradient is not finite"):
        Store(tmp_path).produce(TRAIN, config(), refs, seed=1)


# The key


BASE = config({**GRL, "warmup_share": 0.0, "generation": {**GRL["generation"], "score": "sum"}})
CHANGES: list[tuple[str, str, Any]] = [
    ("phase", "objective", {"kind": "grl", "beta": 0.5}),
    ("phase", "steps", 4),
    ("phase", "batch_size", 3),
    ("phase", "num_negatives", 1),
    ("phase", "max_tokens", 8),
    ("phase", "learning_rate", 0.02),
    ("phase", "warmup_share", 0.6),
    ("phase", "schedule", "linear"),
    ("phase", "weight_decay", 0.5),
    ("phase", "max_grad_norm", 0.05),
    ("generation", "template", "Q: {query}\nA:"),
    ("generation", "passage_tokens", 5),
    ("generation", "queries", 3),
    ("generation", "score", "pmi"),
    ("generation", "teacher", "frozen"),
    ("generation", "reference", "none"),
    ("generation", "passage_template", "P: {passage}\nQ:"),
    ("adapter", "rank", 3),
    ("adapter", "alpha", 8),
    ("adapter", "dropout", 0.3),
    ("adapter", "targets", ("q_proj", "v_proj")),
    ("adapter", "use_rslora", True),
    ("adapter", "use_dora", True),
]


def changed(place: str, field: str, value: Any) -> TrainConfig:
    section = BASE.model_dump()
    phase = section["phases"][0]
    {"phase": phase, "generation": phase["generation"], "adapter": section["adapter"]}[place][field] = value
    return TrainConfig.model_validate({**section, "phases": [phase]})


@pytest.fixture(scope="module")
def base_run(refs: dict[str, ArtifactRef], tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return Store(tmp_path_factory.mktemp("base")).produce(TRAIN, BASE, refs, seed=1)


@pytest.mark.parametrize(("place", "field", "value"), CHANGES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_changes_the_key_and_the_weights(
    place: str, field: str, value: Any, refs: dict[str, ArtifactRef], base_run: ArtifactRef, tmp_path: Path
) -> None:
    store, section = Store(tmp_path), changed(place, field, value)
    assert store.key(TRAIN, section, refs, seed=1) != store.key(TRAIN, BASE, refs, seed=1)
    assert weights_of(store.produce(TRAIN, section, refs, seed=1)) != weights_of(base_run)


def test_every_field_is_among_those_tried() -> None:
    tried = {(place, field) for place, field, _ in CHANGES}
    sections = {"phase": PhaseConfig, "generation": GenerationConfig, "adapter": LoraConfig}
    known = {(place, field) for place, section in sections.items() for field in section.model_fields}
    elsewhere = {("phase", name) for name in ("generation", "guide", "adapter", "mixture")}
    assert known - tried == elsewhere | {("adapter", "base_bits")}
    tried_below = {"generation_adapter", "average_last", "development", "start_from", "optimizer"}
    tried_below |= {"frozen_trunk", "keep_adapter"}  # in test_gem.py
    assert set(TrainConfig.model_fields) == {"phases", "adapter", "runtime", *tried_below}


def test_seed_adapter_and_start_are_in_the_key_and_runtime_is_not(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = {
        store.key(TRAIN, section, refs, seed=seed)
        for section, seed in (
            (BASE, 1),
            (BASE, 2),
            (BASE.model_copy(update={"adapter": None}), 1),
            (BASE.model_copy(update={"start_from": "champion"}), 1),
        )
    }
    assert len(keys) == 4
    other = TrainConfig.model_validate({**BASE.model_dump(), "runtime": {"chunk_tokens": 50, "checkpoint_every": 1}})
    assert store.key(TRAIN, other, refs, seed=1) == store.key(TRAIN, BASE, refs, seed=1)


def test_runtime_changes_speed_and_rounding_only(refs: dict[str, ArtifactRef], base_run: ArtifactRef, tmp_path: Path) -> None:
    other = TrainConfig.model_validate({**BASE.model_dump(), "runtime": {"chunk_tokens": 50, "checkpoint_every": 1}})
    ref = Store(tmp_path).produce(TRAIN, other, refs, seed=1)
    before, after = (load_file(where.path / "model.safetensors") for where in (base_run, ref))
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


@pytest.mark.parametrize("template", ["no question", "{query} {query}", "{query} {answer}", " "])
def test_a_template_without_exactly_the_query_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match=r"with \{query\} in it once"):
        GenerationConfig(template=template)


# Adapters


def test_with_two_adapters_each_side_of_the_loss_trains_its_own(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(GRL, generation_adapter=SMALL)
    made = Store(tmp_path).produce(TRAIN, section, refs, seed=3)
    encoder, base = Encoder.load(made.path), Encoder.load(refs["model"].path)
    assert encoder.adapters == ["embedding", "generation"]
    for name in encoder.adapters:
        weights = load_file(made.path / "adapters" / name / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_B" in key)
    with encoder.adapters_off():
        assert np.array_equal(encoder.encode(["alpha"]), base.encode(["alpha"]))
    assert np.abs(encoder.encode(["alpha"]) - base.encode(["alpha"])).max() > 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_eight_bits_need_a_gpu(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adamw_8bit runs on a GPU, and this model is on the CPU; set optimizer: adamw"):
        Store(tmp_path).produce(TRAIN, config(PHASE, optimizer="adamw_8bit"), refs, seed=1)


def test_a_generation_adapter_alone_is_refused() -> None:
    with pytest.raises(ValidationError, match="generation_adapter needs an adapter for embeddings beside it"):
        config(PHASE, adapter=None, generation_adapter=SMALL)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, of the extra qlora")
def test_an_adapter_trained_on_four_bits_is_merged_into_the_weights_as_they_were(
    refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    embed = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, batch: seen.append(type(projection(self)).__name__) or embed(self, batch))
    made = Store(tmp_path).produce(TRAIN, config(GRL, adapter={**SMALL, "base_bits": 4}), refs, seed=3)
    assert "Linear4bit" in seen
    base, trained = load_file(refs["model"].path / "model.safetensors"), load_file(made.path / "model.safetensors")
    adapter = load_file(made.path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert torch.allclose(trained[f"{name}.weight"], base[f"{name}.weight"] + SMALL["alpha"] / SMALL["rank"] * up @ down, atol=1e-6)


def projection(encoder: Encoder) -> torch.nn.Module:
    layer: Any = next(module for name, module in encoder.model.named_modules() if name.endswith("q_proj"))
    return getattr(layer, "base_layer", layer)


def test_four_bits_without_the_package_are_one_clear_line(
    refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"base_bits: 4 needs bitsandbytes, which is not installed: pip install 'ullme\[qlora\]'"):
        Store(tmp_path).produce(TRAIN, config(GRL, adapter={**SMALL, "base_bits": 4}), refs, seed=3)


def test_a_pooling_that_has_weights_is_trained_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    section = BackboneConfig.model_validate(
        {
            "model": "tiny:llama",
            "dtype": "float32",
            "max_tokens": 32,
            "pooling": "latent_attention",
            "latents": {"count": 8, "heads": 2},
        }
    )
    refs = {"data": toy_data(store), "model": store.produce(BACKBONE, section, {}, seed=0)}
    made = store.produce(TRAIN, config(PHASE), refs, seed=3)
    before, after = (load_file(ref.path / "1_LatentAttention" / "model.safetensors") for ref in (refs["model"], made))
    assert after["out.weight"].abs().max() > 0 == before["out.weight"].abs().max()
    assert Encoder.load(made.path).encode(["alpha"]).shape == (1, 64)


# Phases and their adapters


def last_phase(adapter: str, *, steps: int = 3, **phase: Any) -> dict[str, Any]:
    return {**PHASE, "steps": steps, "adapter": adapter, "warmup_share": 0.0, **phase}


def changes(ref: ArtifactRef, base: ArtifactRef) -> torch.Tensor:
    """What training added to the projections of the MLP, one below the other: one product of each adapter there has been."""
    name = "layers.0.mlp.up_proj.weight"
    after, before = (next(v for k, v in load_file(r.path / "model.safetensors").items() if k.endswith(name)) for r in (ref, base))
    return after - before


def rank(matrix: torch.Tensor) -> int:
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-4 * values[0]).sum())


@pytest.mark.parametrize(("policy", "ranks"), [("continue", 2), ("merge_then_new", 4), ("new", 2)])
def test_a_phase_begins_with_the_adapter_it_names(policy: str, ranks: int, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    store, base = Store(tmp_path), refs["model"]
    first = changes(store.produce(TRAIN, config(PHASE), refs, seed=1), base)
    still = changes(store.produce(TRAIN, config(PHASE, last_phase(policy, learning_rate=1e-12)), refs, seed=1), base)
    kept = {"continue": first, "merge_then_new": first, "new": torch.zeros_like(first)}[policy]
    assert torch.allclose(still, kept, atol=1e-6)
    moved = store.produce(TRAIN, config(PHASE, last_phase(policy)), refs, seed=1)
    assert rank(changes(moved, base)) == ranks
    assert torch.linalg.matrix_norm(changes(moved, base) - kept) > 1e-3


@pytest.mark.parametrize("step", [4, 5, 6])
@pytest.mark.parametrize("policy", ["merge_then_new", "new"])
def test_a_run_whose_adapter_changed_resumes_bit_equal(
    policy: str, step: int, refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    section = config(PHASE, last_phase(policy), runtime={"checkpoint_every": 1})
    expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    store = killed(Store(tmp_path / "two"), section, refs, step)
    assert store.produce(TRAIN, section, refs, seed=1).digest == expected.digest


WARMED_UP = config(
    {**PHASE, "objective": "sft"},
    {**PHASE, "objective": "preference", "generation": GRL["generation"]},
    runtime={"checkpoint_every": 1},
)


def test_a_preference_compares_with_the_model_at_the_beginning_of_its_phase(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    rows = rows_of(Store(tmp_path).produce(TRAIN, WARMED_UP, refs, seed=1))
    preferences = [row["loss/preference"] for row in rows if "loss/preference" in row]
    nothing_gained = [share * math.log(2) for share in (0.5, 1.0)]  # of the two queries, those that have a negative
    assert min(abs(preferences[0] - value) for value in nothing_gained) < 1e-6
    assert min(abs(preferences[-1] - value) for value in nothing_gained) > 5e-5
    adapter = load_file(Store(tmp_path).produce(TRAIN, WARMED_UP, refs, seed=1).path / "adapter/adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("step", [4, 5])
def test_what_it_compares_with_survives_a_crash(step: int, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    expected = Store(tmp_path / "one").produce(TRAIN, WARMED_UP, refs, seed=1)
    store = killed(Store(tmp_path / "two"), WARMED_UP, refs, step)
    made = store.produce(TRAIN, WARMED_UP, refs, seed=1)
    assert (made.digest, rows_of(made)) == (expected.digest, rows_of(expected))


@pytest.mark.parametrize(
    ("phases", "settings", "message"),
    [
        ((last_phase("new"),), {}, r"phases\.0\.adapter: new is for a phase after another"),
        ((PHASE, last_phase("new")), {"adapter": None}, r"phases\.1\.adapter: new needs one adapter"),
        ((PHASE, last_phase("new")), {"generation_adapter": SMALL}, r"phases\.1\.adapter: new needs one adapter"),
        ((PHASE, last_phase("merge_then_new")), {"adapter": {**SMALL, "base_bits": 4}}, "needs the weights in full"),
        ((PHASE, last_phase("merge_then_new")), {"runtime": {"shard": True}}, "needs the weights in full"),
        ((PHASE,), {"average_last": 4}, "average_last: expected at most the last phase's 3 steps"),
    ],
)
def test_what_cannot_begin_is_refused(phases: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(*phases, **settings)


# What preferences compare with


def compared(reference: str, **phase: Any) -> dict[str, Any]:
    return {**GRL, **phase, "generation": {**GRL["generation"], "queries": None, "reference": reference}}


def test_a_stored_reference_gives_the_steps_of_a_live_one_and_none_gives_others(
    refs: dict[str, ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second phase the reference is the model that the first one has made, not the base."""
    after: dict[str, list[dict[str, torch.Tensor]]] = {}
    for reference in ("live", "stored", "none"):
        with pytest.MonkeyPatch.context() as patch:
            after[reference] = weights_after_every_step(patch)
            Store(tmp_path / reference).produce(TRAIN, config(compared(reference), compared(reference)), refs, seed=1)
    for live, stored in zip(after["live"], after["stored"], strict=True):
        assert all(torch.allclose(live[name], stored[name], atol=2e-5) for name in live)
    moved = [max(float((a[name] - b[name]).abs().max()) for name in a) for a, b in zip(after["live"], after["none"], strict=True)]
    assert max(moved) > 2e-4


@pytest.mark.parametrize("step", [2, 4, 5, 6])
def test_a_stored_reference_survives_a_crash(step: int, refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(compared("stored"), compared("stored"), runtime={"checkpoint_every": 2})
    expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    store = killed(Store(tmp_path / "two"), section, refs, step)
    assert store.produce(TRAIN, section, refs, seed=1).digest == expected.digest


def test_every_weight_can_be_trained_with_a_stored_reference(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    made = Store(tmp_path).produce(TRAIN, config(compared("stored", learning_rate=0.001), adapter=None), refs, seed=1)
    queries = [row["loss/preference"] / (0.5 * math.log(2)) * 4 for row in rows_of(made)]  # those that have a negative
    assert queries[0] == pytest.approx(round(queries[0]), abs=1e-3), "nothing has moved yet"
    assert queries[0] > 0.5
    assert abs(queries[-1] - round(queries[-1])) > 2e-3


def test_kto_needs_a_live_reference() -> None:
    objective = {"kind": "grl", "preference_loss": "kto"}
    with pytest.raises(ValidationError, match=r"generation\.reference: stored: kto measures its baseline with a live reference"):
        config(compared("stored", objective=objective))


# Averages


def test_the_last_weights_are_averaged(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(PHASE, last_phase("continue", steps=4), average_last=3, runtime={"checkpoint_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        seen = weights_after_every_step(patch)
        expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    found = load_file(expected.path / "adapter/adapter_model.safetensors")
    for name, tensor in found.items():
        own = name.replace(".weight", ".embedding.weight")
        mean = torch.stack([weights[own] for weights in seen[-3:]]).mean(0)
        assert torch.allclose(tensor, mean, atol=1e-7)
    store = killed(Store(tmp_path / "two"), section, refs, 7)
    assert store.produce(TRAIN, section, refs, seed=1).digest == expected.digest
    assert weights_of(expected) != weights_of(store.produce(TRAIN, section.model_copy(update={"average_last": 0}), refs, seed=1))


# Memory


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gradients of more tokens than the first entry do not fit, half way through the step; the budgets that were tried follow."""
    tried = [60]
    plain = gradcache.step

    def step(encoder: Encoder, *arguments: Any, chunk_tokens: int, **options: Any) -> Any:
        tried.append(chunk_tokens)
        report = plain(encoder, *arguments, chunk_tokens=chunk_tokens, **options)
        if chunk_tokens > tried[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return report

    monkeypatch.setattr(gradcache, "step", step)
    return tried


def test_a_step_that_does_not_fit_is_done_again_with_half_the_tokens(
    refs: dict[str, ArtifactRef], base_run: ArtifactRef, tmp_path: Path, little_memory: list[int]
) -> None:
    section = TrainConfig.model_validate({**BASE.model_dump(), "runtime": {"chunk_tokens": 200}})
    made = Store(tmp_path).produce(TRAIN, section, refs, seed=1)
    assert little_memory == [60, 200, 100, 50, 50, 50]
    before, after = (load_file(where.path / "model.safetensors") for where in (base_run, made))
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_a_step_that_can_be_no_smaller_says_what_to_lower(
    refs: dict[str, ArtifactRef], tmp_path: Path, little_memory: list[int]
) -> None:
    little_memory[0] = 0
    section = TrainConfig.model_validate({**BASE.model_dump(), "runtime": {"chunk_tokens": 200}})
    with pytest.raises(LimitExceeded, match=r"do not fit into memory \(CUDA out of memory.*set training.runtime.chunk_tokens"):
        Store(tmp_path).produce(TRAIN, section, refs, seed=1)
