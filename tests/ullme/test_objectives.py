"""The contract of every objective: the folder is walked, so a new file is tested the moment it exists."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from toys import gem_encoder, gradients, text_batch, tiny_encoder, toy_batch

from ullme.attention import attention_dropout
from ullme.components import component_class, kinds, resolve
from ullme.encoder import Encoder
from ullme.errors import ConfigError, ContractError
from ullme.gradcache import TrainBatch, step
from ullme.objectives import Objective
from ullme.objectives.contrastive import Contrastive
from ullme.objectives.distill import Distill
from ullme.objectives.gem import Gem
from ullme.objectives.grl import Grl
from ullme.objectives.mntp import Mntp
from ullme.objectives.preference import Preference
from ullme.objectives.sft import Sft
from ullme.objectives.simcse import Simcse
from ullme.objectives.spread_out import SpreadOut
from ullme.representations import CandidateLogprobs, Representations
from ullme.training import LoraConfig

KINDS = kinds("ullme.objectives")
PARTS = [{"objective": "contrastive"}, {"objective": {"kind": "sft"}, "weight": 0.1}]


def spec_of(kind: str) -> dict[str, Any]:
    """The kind with its defaults, and what it requires."""
    required = {"sum": {"parts": PARTS}, "matryoshka": {"objective": "grl", "dims": [8, 4]}, "gem": {"learn_temperature": False}}
    return {"kind": kind} | required.get(kind, {})


def trained(objective: Objective) -> Encoder:
    """A tiny model that this objective can train."""
    made = gem_encoder if objective.uses_special_tokens else tiny_encoder
    return made(dtype=torch.float64, lora=LoraConfig(rank=4, alpha=8))


def batch_of(encoder: Encoder, objective: Objective) -> TrainBatch:
    """What it reads: queries and passages, or texts."""
    return text_batch(encoder, objective) if objective.reads_texts else toy_batch(encoder)


def test_the_folder_holds_the_known_kinds() -> None:
    pairs = {"contrastive", "distill", "grl", "matryoshka", "preference", "sft", "spread_out", "sum"}
    assert pairs | {"gem", "mntp", "simcse"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_do_not_depend_on_the_chunk_size(kind: str) -> None:
    objective: Any = resolve("ullme.objectives", spec_of(kind))
    assert isinstance(objective, Objective)
    encoder = trained(objective)
    found = []
    for budget in (1, 70, 100_000):
        report = step(encoder, objective, batch_of(encoder, objective), chunk_tokens=budget)
        assert report.terms
        found.append((report.terms, gradients(encoder)))
    for terms, got in found:
        assert terms == pytest.approx(found[0][0], rel=1e-9)
        assert all(bool(gradient.isfinite().all()) for gradient in got.values())
        for name, gradient in got.items():
            assert torch.allclose(gradient, found[0][1][name], rtol=1e-8, atol=1e-10 * float(found[0][1][name].abs().max())), name
    assert any(float(gradient.norm()) > 0 for gradient in found[0][1].values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_loss_is_pure_in_the_representations(kind: str) -> None:
    objective: Any = resolve("ullme.objectives", spec_of(kind))
    encoder = tiny_encoder()
    batch = toy_batch(encoder)
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    guide = torch.nn.functional.normalize(torch.randn(12, 6), dim=1)
    given = (torch.as_tensor(batch.candidates), torch.as_tensor(batch.known))
    held = Representations(unit[:5], unit[5:], *given, guide_queries=guide[:5], guide_documents=guide[5:])
    before = [value.clone() for value in (held.queries, held.documents, held.candidates, held.known)]
    first, second = objective.batch_loss(held, None), objective.batch_loss(held, None)
    assert {name: float(value) for name, value in first.items()} == {name: float(value) for name, value in second.items()}
    assert all(torch.equal(a, b) for a, b in zip(before, (held.queries, held.documents, held.candidates, held.known), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_documented_value(kind: str) -> None:
    found = component_class("ullme.objectives", kind)
    assert found.__doc__
    objective = resolve("ullme.objectives", spec_of(kind))
    assert objective.kind == kind
    assert resolve("ullme.objectives", objective.model_dump()) == objective
    with pytest.raises(ValidationError, match="frozen"):
        objective.kind = "other"
    with pytest.raises(ValidationError, match="extra"):
        resolve("ullme.objectives", {**spec_of(kind), "temperture": 1})


@pytest.mark.parametrize(
    "spec", [{"kind": "contrastive", "temperature": 0}, {"kind": "grl", "beta": 0}, {"kind": "grl", "label_smoothing": 0.5}]
)
def test_values_out_of_range_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(key for key in spec if key != "kind")):
        resolve("ullme.objectives", spec)


SUM: Any = resolve("ullme.objectives", spec_of("sum"))
NESTED: Any = resolve("ullme.objectives", spec_of("matryoshka"))
FIELDS = [
    (NESTED, {"dims": (64,)}),
    (NESTED, {"objective": Contrastive(kind="contrastive")}),
    (Contrastive(), {"temperature": 0.2}),
    (Contrastive(), {"learn_temperature": True}),
    (Contrastive(), {"in_batch": False}),
    (Contrastive(), {"symmetric": True}),
    (Contrastive(), {"all_pairs": True}),
    (Contrastive(), {"hardness": 5}),
    (Contrastive(hardness=5), {"hardness_of": "hard_negatives"}),
    (Contrastive(), {"false_negative_margin": -0.01}),
    (Contrastive(), {"guided": True}),
    (Contrastive(guided=True), {"guide_margin": 0.1}),
    (Distill(), {"target": "embeddings"}),
    (Distill(), {"temperature": 0.2}),
    (Distill(), {"guide_temperature": 0.2}),
    (Distill(), {"in_batch": True}),
    (Sft(), {"per_token": False}),
    (Preference(), {"loss": "ipo"}),
    (Preference(), {"loss": "hinge"}),
    (Preference(), {"loss": "kto"}),
    (Preference(), {"beta": 0.4}),
    (Preference(), {"label_smoothing": 0.2}),
    (Mntp(), {"share": 0.5}),
    (Mntp(share=0.5), {"style": "all"}),
    (Mntp(share=0.5), {"mask_token": "#"}),
    (Simcse(), {"temperature": 0.2}),
    (Simcse(), {"dropout": 0.1}),
    (Gem(), {"doubled": 0.8}),
    (Gem(), {"dropped": 0.4}),
    (Gem(learn_temperature=False), {"temperature": 0.2}),
    (Gem(), {"learn_temperature": False}),
    (Gem(), {"alpha": (0.5, 1.0)}),
    (Gem(), {"alpha_after": 0}),
    (Gem(), {"alpha_steps": 100}),
    (SUM, {"parts": (SUM.parts[0], SUM.parts[1].model_copy(update={"weight": 0.5}))}),
    *[
        (Grl(), change)
        for change in (
            {"contrastive_weight": 0.5},
            {"preference_weight": 0.25},
            {"kl_weight": 0.5},
            {"temperature": 0.2},
            {"in_batch": False},
            {"beta": 0.4},
            {"label_smoothing": 0.2},
            {"generation_temperature": 0.1},
            {"preference_loss": "ipo"},
            {"preference_loss": "kto"},
        )
    ],
]


@pytest.mark.parametrize(
    ("objective", "change"), FIELDS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__class__.__name__
)
def test_every_field_changes_the_gradient(objective: Objective, change: dict[str, Any]) -> None:
    encoder = trained(objective)
    encoder.model.train()
    found = []
    for candidate in (objective, objective.model_copy(update=change)):
        learned = {name: torch.tensor(0.3 - math.log(start)) for name, start in candidate.learned.items()}
        torch.manual_seed(0)
        dropping = attention_dropout(encoder.model, candidate.attention_dropout) if candidate.attention_dropout else nullcontext()
        with dropping:
            step(encoder, candidate.at(150), batch_of(encoder, candidate), chunk_tokens=1000, learned=learned)
        found.append(torch.cat([gradient.flatten() for gradient in gradients(encoder).values()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 1e-4
    assert set(change) <= set(type(objective).model_fields)


def test_every_field_is_among_those_tried() -> None:
    for kind in map(partial(component_class, "ullme.objectives"), KINDS):
        assert {field for value, change in FIELDS if isinstance(value, kind) for field in change} == set(kind.model_fields) - {
            "kind"
        }


LEARNED = {"kind": "contrastive", "learn_temperature": True}
SHORT = {"kind": "matryoshka", "dims": [8], "objective": LEARNED}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "sum", "parts": [PARTS[0]]}, "at least 2 items"),
        ({"kind": "matryoshka", "objective": "grl", "dims": [8, 8]}, "expected each length once"),
        ({"kind": "sum", "parts": [PARTS[0], PARTS[0]]}, "expected each kind once, got contrastive twice"),
        ({"kind": "contrastive", "symmetric": True, "all_pairs": True}, "set one of them"),
        ({"kind": "contrastive", "guide_margin": 0.1}, "needs guided: true"),
        ({"kind": "distill", "target": "embeddings", "in_batch": True}, "but target is embeddings"),
        (
            {"kind": "matryoshka", "dims": [8], "objective": {"kind": "distill", "target": "embeddings"}},
            "cannot be learned at several",
        ),
        ({"kind": "contrastive", "learn_temperature": True, "temperature": 2}, "stays between 0.01 and 1, got 2"),
        (
            {"kind": "sum", "parts": [{"objective": LEARNED}, {"objective": SHORT}]},
            "expected one objective that learns temperature",
        ),
        ({"kind": "contrastive", "all_pairs": True, "in_batch": False}, "needs in_batch: true"),
        ({"kind": "preference", "loss": "hinge", "label_smoothing": 0.1}, "label_smoothing is defined for loss: sigmoid"),
        ({"kind": "preference", "loss": "kto", "label_smoothing": 0.1}, "label_smoothing is defined for loss: sigmoid"),
        ({"kind": "grl", "preference_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is defined for preference_loss"),
    ],
)
def test_what_has_no_meaning_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        resolve("ullme.objectives", spec)


def test_embeddings_at_right_angles_are_spread_out_and_queries_of_one_target_are_no_pair() -> None:
    rows = torch.eye(4)
    apart = Representations(rows[:2], rows[2:], torch.tensor([[0], [1]]), torch.zeros(2, 2, dtype=torch.bool))
    assert SpreadOut().batch_loss(apart, None)["spread_out"].item() == 0
    near = Representations(rows[[0, 0]], rows[[2, 3]], torch.tensor([[0], [0]]), torch.zeros(2, 2, dtype=torch.bool))
    assert SpreadOut().batch_loss(near, None)["spread_out"].item() == 1  # the queries alone


@pytest.mark.parametrize("spec", [{"kind": "distill"}, {"kind": "contrastive", "guided": True}])
def test_a_batch_without_a_guide_is_refused_by_what_reads_one(spec: dict[str, Any]) -> None:
    objective: Any = resolve("ullme.objectives", spec)
    held = Representations(torch.eye(2), torch.eye(2), torch.tensor([[0], [1]]), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ContractError, match="reads the embeddings of a guide, and the batch has none"):
        objective.batch_loss(held, None)


def test_an_embedding_equal_to_the_guides_is_learned_already() -> None:
    rows = torch.eye(4)
    given = (torch.tensor([[0], [1]]), torch.zeros(2, 2, dtype=torch.bool))
    held = Representations(rows[:2], rows[2:], *given, guide_queries=rows[:2], guide_documents=rows[2:])
    for spec in ({"target": "embeddings"}, {"in_batch": True}, {}):
        assert Distill.model_validate(spec).batch_loss(held, None)["distill"].item() == pytest.approx(0, abs=1e-7)
    turned = Representations(rows[:2], rows[2:], *given, guide_queries=rows[2:], guide_documents=rows[:2])
    assert Distill(target="embeddings").batch_loss(turned, None)["distill"].item() == 1


def test_a_length_beyond_the_embedding_is_refused() -> None:
    held = Representations(torch.eye(2), torch.eye(2), torch.tensor([[0], [1]]), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"matryoshka.dims: expected at most 2, the embedding's length, got 8"):
        NESTED.batch_loss(held, None)


def test_a_known_positive_and_a_passage_shared_as_target_are_never_pushed_away() -> None:
    queries = torch.eye(2, 4).requires_grad_(True)
    documents = torch.nn.functional.normalize(torch.ones(2, 4), dim=1).requires_grad_(True)
    shared = Representations(queries, documents, torch.tensor([[0], [0]]), torch.tensor([[False, True], [False, True]]))
    for symmetric in (False, True):
        loss = Contrastive(symmetric=symmetric).batch_loss(shared, None)["contrastive"]
        assert loss.item() == pytest.approx(0, abs=1e-7)


def test_the_preference_is_averaged_over_the_negatives_that_are_there() -> None:
    total = torch.tensor([[-5.0, -7.0, -6.0], [-5.0, -7.0, 0.0], [-5.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    held = CandidateLogprobs(torch.arange(3), total, torch.full((3, 3), 4), present, torch.zeros(3, 3))
    per_query = Grl(preference_weight=1.0, beta=1.0).generation_loss(held)["preference"]
    two, one = (float(torch.nn.functional.softplus(torch.tensor(-margin))) for margin in (2.0, 1.0))
    assert per_query.tolist() == pytest.approx([(two + one) / 2, two, 0.0])
    assert held.mean[0].tolist() == pytest.approx([-1.25, -1.75, -1.5])
