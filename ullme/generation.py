"""The generation score: how well the language model finds that a passage answers a query. GRL aligns embeddings with it.

    passage_given_query    mean log pi(p | q)                     ULLME's (arXiv 2408.03402, section 2.3)
    pmi                    (log pi(p | q) - log pi(p)) / |p|      less the passage's own likelihood, which drowns the query
    query_given_passage    mean log pi(q | p)                     the query-likelihood model of retrieval (Ponte and Croft, 1998)
    sum                    pmi + query_given_passage

Means run over the tokens that are scored. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ullme.attention import trunk
from ullme.batches import TokenRow, chunk_by_tokens
from ullme.distributed import current
from ullme.encoder import Encoder
from ullme.fused import fused_layers
from ullme.losses import entropy
from ullme.scoring import GenerationScore

__all__ = ["Logprobs", "Quality", "Rows", "logprobs", "passage_rows", "quality", "teacher_scores"]

Rows = Sequence[Sequence[TokenRow | None]]


@dataclass(frozen=True)
class Logprobs:
    """Of G x K rows: log-probabilities summed over the scored tokens, and the number of these; 0 where there is no row.

    cost: tokens that went through the model.
    """

    total: Float[Tensor, "G K"]
    tokens: Int[Tensor, "G K"]
    cost: int


def passage_rows(prompts: Sequence[Sequence[int]], passages: Sequence[Sequence[Sequence[int]]]) -> list[list[TokenRow | None]]:
    """Condition and passage as rows: G prompts, K passages each (empty = there is none)."""
    return [
        [TokenRow([*prompt, *passage], len(prompt)) if len(passage) else None for passage in group]
        for prompt, group in zip(prompts, passages, strict=True)
    ]


@torch.no_grad()
def logprobs(encoder: Encoder, rows: Rows, *, chunk_tokens: int) -> Logprobs:
    """Score rows with the language model. Equal rows (one passage, several queries) are scored once."""
    places: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    width = max((len(group) for group in rows), default=0)
    for number, group in enumerate(rows):
        for place, row in enumerate(group):
            if row is not None:
                places.setdefault((row.prompt, tuple(int(token) for token in row.ids)), []).append(number * width + place)
    different = [TokenRow(list(ids), prompt) for prompt, ids in places]
    where = list(places.values())
    total = torch.zeros(len(rows) * width, device=encoder.device, dtype=torch.float32)
    tokens = torch.zeros(len(rows) * width, device=encoder.device, dtype=torch.long)
    together = current()
    lengths = [len(row) for row in different]
    with fused_layers(trunk(encoder.model)):
        for chunk, counts in together.turns(chunk_by_tokens(lengths, together.budget(lengths, chunk_tokens))):
            sums, scored = encoder.sequence_logprobs(encoder.collate([different[index] for index in chunk]))
            total = total.to(sums.dtype)
            if counts:
                flat = torch.tensor([place for index in chunk for place in where[index]], device=encoder.device)
                each = torch.tensor([number for number, index in enumerate(chunk) for _ in where[index]], device=encoder.device)
                total[flat], tokens[flat] = sums[each], scored[each]
    together.add(total, tokens)
    shape = (len(rows), width)
    return Logprobs(total.view(shape), tokens.view(shape), sum(map(len, different)))


def teacher_scores(
    encoder: Encoder, score: GenerationScore, *, given: Logprobs | None, alone: Rows, questions: Rows, chunk_tokens: int
) -> tuple[Float[Tensor, "G K"], int]:
    """The score of G x K candidates, and the tokens that went through the model for it.

    given: log pi(p | q), which every score but `query_given_passage` reads. alone: rows of the passages without the query (`pmi`,
    `sum`); questions: rows of passage, then query (`query_given_passage`, `sum`). Rows that the score does not read may be empty.
    """
    parts: list[Tensor] = []
    cost = 0
    if score != "query_given_passage":
        assert given is not None
        sums = given.total
        if score != "passage_given_query":
            prior = logprobs(encoder, alone, chunk_tokens=chunk_tokens)
            sums, cost = sums - prior.total, cost + prior.cost
        parts.append(sums / given.tokens.clamp_min(1))
    if score in ("query_given_passage", "sum"):
        query = logprobs(encoder, questions, chunk_tokens=chunk_tokens)
        parts.append(query.total / query.tokens.clamp_min(1))
        cost += query.cost
    return torch.stack(parts).sum(0), cost


@dataclass(frozen=True)
class Quality:
    """Whether a score teaches. accuracy: share of the queries whose positive (column 0) scores highest; chance: what guessing
    reaches; entropy: nats of softmax(score / temperature), of `most` at uniform; queries: with at least two candidates.
    """

    accuracy: float
    chance: float
    entropy: float
    most: float
    queries: int

    @property
    def near_chance(self) -> bool:
        """No better than guessing, at two standard errors."""
        return self.accuracy <= self.chance + 2 * (self.chance * (1 - self.chance) / max(1, self.queries)) ** 0.5


def quality(scores: Float[Tensor, "G K"], present: Bool[Tensor, "G K"], *, temperature: float) -> Quality:
    """Measure a score on queries whose first candidate is the positive."""
    several = present.sum(1) > 1
    scores, present = scores[several], present[several]
    if not len(scores):
        return Quality(1.0, 1.0, 0.0, 0.0, 0)
    best = scores.masked_fill(~present, float("-inf")).argmax(1)
    counts = present.sum(1).double()
    return Quality(
        accuracy=float((best == 0).double().mean()),
        chance=float((1 / counts).mean()),
        entropy=float(entropy(scores, present, temperature=temperature).mean()),
        most=float(counts.log().mean()),
        queries=len(scores),
    )
