"""The language model before a phase begins: how well it teaches its own embeddings, and what is scored once and stored."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ullme.generation import Quality, Rows, logprobs, passage_rows, quality, teacher_scores
from ullme.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ullme.encoder import Encoder
    from ullme.sampling import Asked, Sampler

__all__ = ["frozen", "measure", "reference", "report"]

logger = logging.getLogger(__name__)

MEASURED = 48
AT_ONCE = 32


def measure(encoder: Encoder, sampler: Sampler, *, chunk_tokens: int) -> Quality:
    """How often the score finds the positive among its negatives, on the first queries that training will score."""
    asked: dict[str, Asked] = {}
    for step in range(sampler.phase.steps):
        for one in sampler.asked(step):
            asked.setdefault(one.query_id, one)
        if len(asked) >= MEASURED:
            break
    _, scores, present = _scored(encoder, sampler, list(asked.values())[:MEASURED], chunk_tokens=chunk_tokens)
    return quality(scores, present, temperature=sampler.phase.objective.teacher_temperature)


def report(found: Quality, score: str) -> None:
    """Say it; warn where the score is as good as guessing."""
    said = f"generation score {score}: finds the positive of {found.accuracy:.0%} of {found.queries} queries"
    detail = f"chance {found.chance:.0%}; entropy {found.entropy:.2f} of {found.most:.2f} nats"
    if not found.queries:
        logger.info("generation score %s: no query has a negative, so the alignment has nothing to teach", score)
    elif found.near_chance:
        other = "" if score == "sum" else "generation.score: sum, or "
        logger.warning("%s, no better than chance (%s): try %skl_weight: 0", said, detail, other)
    else:
        logger.info("%s (%s)", said, detail)


def frozen(encoder: Encoder, sampler: Sampler, *, chunk_tokens: int) -> dict[str, float]:
    """The score of every pair of query and candidate that the phase will read, each once, from the model as it is now."""
    return _every_pair(encoder, sampler, _scored, "score candidates", chunk_tokens=chunk_tokens)


def reference(encoder: Encoder, sampler: Sampler, *, chunk_tokens: int) -> dict[str, float]:
    """The summed log-probability of every candidate given its query that the phase will read, from the model as it is now."""
    return _every_pair(encoder, sampler, _summed, "score the reference", chunk_tokens=chunk_tokens)


def _every_pair(encoder: Encoder, sampler: Sampler, score: _Score, called: str, *, chunk_tokens: int) -> dict[str, float]:
    asked: dict[str, dict[str, Asked]] = {}
    for step in range(sampler.phase.steps):
        for one in sampler.asked(step):
            for found in one.candidates:
                if found is not None:
                    asked.setdefault(one.query_id, {})[found[0]] = one
    groups = [_together(list(pairs.values())) for pairs in asked.values()]
    stored: dict[str, float] = {}
    with Progress(len(groups), called, unit="query") as progress:
        for start in range(0, len(groups), AT_ONCE):
            part = groups[start : start + AT_ONCE]
            kept, scores, present = score(encoder, sampler, part, chunk_tokens=chunk_tokens)
            for place, row, there in zip(kept, scores.tolist(), present.tolist(), strict=True):
                one = part[place]
                for found, value, is_there in zip(one.candidates, row, there, strict=False):
                    if found is not None and is_there:
                        stored[one.pair(found[0])] = value
            progress.advance(len(part))
    return stored


def _together(several: Sequence[Asked]) -> Asked:
    """One query with all candidates that it is drawn with, in the order of their first drawing."""
    candidates = {found[0]: found for one in several for found in one.candidates if found is not None}
    return replace(several[0], candidates=list(candidates.values()))


class _Score(Protocol):
    """Scores some queries: (places in `asked` of those that have a score, Float[G K], Bool[G K] where there is one)."""

    def __call__(
        self, encoder: Encoder, sampler: Sampler, asked: Sequence[Asked], *, chunk_tokens: int
    ) -> tuple[list[int], Tensor, Tensor]: ...


def _rows(encoder: Encoder, sampler: Sampler, asked: Sequence[Asked]) -> tuple[dict[str, Any], Rows, Tensor]:
    """What the language model reads for these queries, the rows of condition and passage, and which of them there are."""
    width = max(len(one.candidates) for one in asked)
    wide = [replace(one, candidates=[*one.candidates, *[None] * (width - len(one.candidates))]) for one in asked]
    fields = sampler.scoring(wide, range(len(wide)), encoder)
    rows = passage_rows(fields["prompts"], fields["passages"])
    present = [[row is not None for row in group] for group in rows]
    return fields, rows, torch.tensor(present, dtype=torch.bool, device=encoder.device).reshape(len(rows), width)


def _summed(encoder: Encoder, sampler: Sampler, asked: Sequence[Asked], *, chunk_tokens: int) -> tuple[list[int], Tensor, Tensor]:
    fields, rows, present = _rows(encoder, sampler, asked)
    return fields["scored"], logprobs(encoder, rows, chunk_tokens=chunk_tokens).total, present


def _scored(encoder: Encoder, sampler: Sampler, asked: Sequence[Asked], *, chunk_tokens: int) -> tuple[list[int], Tensor, Tensor]:
    fields, rows, present = _rows(encoder, sampler, asked)
    given = None if fields["score"] == "query_given_passage" else logprobs(encoder, rows, chunk_tokens=chunk_tokens)
    scores, _ = teacher_scores(
        encoder,
        fields["score"],
        given=given,
        alone=fields.get("alone", ()),
        questions=fields.get("questions", ()),
        chunk_tokens=chunk_tokens,
    )
    return fields["scored"], scores, present
