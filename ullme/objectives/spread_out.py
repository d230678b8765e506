"""Spread-out regularisation: embeddings of different texts are pushed towards right angles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["SpreadOut"]


class SpreadOut(Objective):
    """L = mean over i != j of (q_i . q_j)^2 + the same over the targets p_i.

    The second moment of the global orthogonal regulariser (arXiv 1708.06320), as EmbeddingGemma adds it to InfoNCE
    (arXiv 2509.20354). Two queries that share their target are no pair of targets. Use it in a `sum`, beside a loss that
    brings query and passage together.
    """

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """One term, `spread_out`."""
        del generation
        import torch

        target = representations.target
        others = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        different = target.unsqueeze(0) != target.unsqueeze(1)
        positives = representations.documents[target]
        terms = [
            (rows @ rows.T).square()[pairs].sum() / pairs.sum().clamp_min(1)
            for rows, pairs in ((representations.queries, others), (positives, different))
        ]
        return {"spread_out": terms[0] + terms[1]}
