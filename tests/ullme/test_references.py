"""The same numbers and gradients as sentence-transformers' own losses, called on the same embeddings."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ullme.components import resolve
from ullme.gradcache import Representations

QUERIES, NEGATIVES, WIDTH = 6, 2, 16
LOSSES = "sentence_transformers.sentence_transformer.losses"


class Echo(nn.Module):
    """A model whose embeddings are given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return WIDTH


def columns() -> list[Tensor]:
    """Queries, positives, and each negative: Float[6 16], unit norm, with gradient."""
    torch.manual_seed(0)
    rows = [normalize(torch.randn(QUERIES, WIDTH, dtype=torch.float64), dim=1) for _ in range(2 + NEGATIVES)]
    rows[1] = normalize(rows[0] + rows[1], dim=1)
    return [row.requires_grad_(True) for row in rows]


def theirs(name: str, rows: list[Tensor], **settings: Any) -> Tensor:
    loss = getattr(importlib.import_module(LOSSES), name)(Echo(), **settings)
    return loss([{"sentence_embedding": row} for row in rows], None)


def ours(spec: dict[str, Any], rows: list[Tensor]) -> Tensor:
    candidates = np.arange((1 + NEGATIVES) * QUERIES).reshape(1 + NEGATIVES, QUERIES).T
    held = Representations(
        rows[0], torch.cat(rows[1:]), torch.as_tensor(candidates), torch.zeros(QUERIES, candidates.size, dtype=torch.bool)
    )
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
