"""The same numbers and gradients as sentence-transformers' own losses, called on the same embeddings; and the same numbers as
trl's own trainers, as `fixtures/make_trl.py` wrote them down.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ullme.components import resolve
from ullme.objectives.preference import Preference
from ullme.representations import CandidateLogprobs, Representations
from ullme.tiny import tiny_causal_lm

QUERIES, NEGATIVES, WIDTH = 6, 2, 16
LOSSES = "sentence_transformers.sentence_transformer.losses"


class Echo(nn.Module):
    """A model whose embeddings are given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def __getitem__(self, index: int) -> Echo:  # their cached losses look at its first module
        return self

    def get_embedding_dimension(self) -> int:
        return WIDTH


class Spoken(Echo):
    """The same, beside a tokenizer, which their guided loss asks both models for. reads: which embeddings it gives."""

    max_seq_length = 32

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.tokenizer, self.reads = tiny_causal_lm("llama")[1], reads

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.reads]}


def columns() -> list[Tensor]:
    """Queries, positives, and each negative: Float[6 16], unit norm, with gradient."""
    torch.manual_seed(0)
    rows = [normalize(torch.randn(QUERIES, WIDTH, dtype=torch.float64), dim=1) for _ in range(2 + NEGATIVES)]
    rows[1] = normalize(rows[0] + rows[1], dim=1)
    return [row.requires_grad_(True) for row in rows]


def theirs(name: str, rows: list[Tensor], **settings: Any) -> Tensor:
    loss = getattr(importlib.import_module(LOSSES), name)(Echo(), **settings)
    return loss([{"sentence_embedding": row} for row in rows], None)


def ours(spec: dict[str, Any], rows: list[Tensor], guide: list[Tensor] | None = None) -> Tensor:
    candidates = np.arange((len(rows) - 1) * QUERIES).reshape(len(rows) - 1, QUERIES).T
    held = Representations(
        rows[0], torch.cat(rows[1:]), torch.as_tensor(candidates), torch.zeros(QUERIES, candidates.size, dtype=torch.bool)
    )
    if guide is not None:
        held = replace(held, guide_queries=guide[0], guide_documents=torch.cat(guide[1:]))
    objective: Any = resolve("ullme.objectives", spec)
    return torch.stack(list(objective.batch_loss(held, None).values())).sum()


def same(one: Tensor, one_rows: list[Tensor], other: Tensor, other_rows: list[Tensor]) -> None:
    """Value and gradient. `other` is computed on normalised copies, as their losses normalise again."""
    assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-9)
    one.backward()
    other.backward()
    for mine, their in zip(one_rows, other_rows, strict=True):
        assert mine.grad is not None
        assert their.grad is not None
        # theirs goes through another normalisation, which takes the part along the embedding out
        across = mine.grad - (mine.grad * mine).sum(1, keepdim=True) * mine
        assert torch.allclose(across.detach(), their.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.5])
def test_contrastive_is_their_ranking_loss(temperature: float) -> None:
    mine, their = columns(), columns()
    loss = ours({"kind": "contrastive", "temperature": temperature}, mine)
    same(loss, mine, theirs("MultipleNegativesRankingLoss", their, scale=1 / temperature), their)


@pytest.mark.parametrize("rows_at_once", [1, 4, 32])
def test_contrastive_is_their_cached_ranking_loss(rows_at_once: int) -> None:
    mine, their = columns(), columns()
    other = theirs("CachedMultipleNegativesRankingLoss", their, scale=20.0, mini_batch_size=rows_at_once)
    same(ours({"kind": "contrastive", "temperature": 0.05}, mine), mine, other, their)


@pytest.mark.parametrize("margin", [0.0, 0.2, -0.2])
@pytest.mark.parametrize("negatives", [0, 1])
def test_what_a_guide_leaves_out_is_what_theirs_leaves_out(negatives: int, margin: float) -> None:
    mine, their = columns()[: 2 + negatives], columns()[: 2 + negatives]
    guide = [normalize(torch.randn(QUERIES, 5, dtype=torch.float64), dim=1) for _ in mine]
    settings: dict[str, Any] = {"temperature": 0.05, "margin": margin, "contrast_anchors": False, "contrast_positives": False}
    inner = importlib.import_module(LOSSES).GISTEmbedLoss(Spoken("embedding"), Spoken("guide"), **settings)
    other = inner([{"embedding": row, "guide": of} for row, of in zip(their, guide, strict=True)], None)
    same(ours({"kind": "contrastive", "guided": True, "guide_margin": margin}, mine, guide), mine, other, their)
    unguided = ours({"kind": "contrastive"}, columns()[: 2 + negatives])
    assert float(other.detach()) < float(unguided.detach())  # something was left out


@pytest.mark.parametrize("hardness_of", ["all_negatives", "in_batch_negatives", "hard_negatives"])
def test_hardness_is_theirs(hardness_of: str) -> None:
    mine, their = columns(), columns()
    loss = ours({"kind": "contrastive", "hardness": 5, "hardness_of": hardness_of}, mine)
    same(loss, mine, theirs("MultipleNegativesRankingLoss", their, hardness_mode=hardness_of, hardness_strength=5.0), their)


@pytest.mark.parametrize(("field", "sides"), [("symmetric", ()), ("all_pairs", ("query_to_query", "doc_to_doc"))])
def test_both_directions_are_theirs(field: str, sides: tuple[str, ...]) -> None:
    mine, their = columns(), columns()
    directions = ("query_to_doc", "doc_to_query", *sides)
    mode = "joint" if sides else "per_direction"
    other = theirs("MultipleNegativesRankingLoss", their, directions=directions, partition_mode=mode)
    same(ours({"kind": "contrastive", field: True}, mine), mine, other, their)


def test_matryoshka_is_theirs_averaged() -> None:
    mine, their = columns(), columns()
    dims = (16, 8, 3)
    inner = importlib.import_module(LOSSES).MultipleNegativesRankingLoss(Echo(), scale=20.0)
    model = inner.model
    wrapped = importlib.import_module(LOSSES).MatryoshkaLoss(model, inner, list(dims))
    other = wrapped([{"sentence_embedding": row} for row in their], None) / len(dims)
    loss = ours({"kind": "matryoshka", "dims": dims, "objective": {"kind": "contrastive", "temperature": 0.05}}, mine)
    same(loss, mine, other, their)


TRL = json.loads((Path(__file__).parent / "fixtures" / "trl.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "kto"])
def test_preferences_are_those_of_trls_trainers(loss: Any) -> None:
    kept = TRL["losses"][loss]
    policy, reference = (torch.tensor(kept[name], dtype=torch.float64) for name in ("policy", "reference"))
    baseline = torch.tensor(kept.get("mismatched", [0.0]), dtype=torch.float64).mean().clamp_min(0)
    assert (float(baseline) > 0) == (loss == "kto")
    every = torch.ones(policy.shape, dtype=torch.bool)
    held = CandidateLogprobs(torch.arange(4), policy, torch.tensor(kept["tokens"]), every, reference, baseline=baseline)
    terms = Preference(loss=loss, beta=TRL["beta"]).generation_loss(held)
    assert float(terms["preference"].mean()) == pytest.approx(kept["loss"], rel=1e-5)  # theirs sums in float32
