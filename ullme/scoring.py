"""What the language model reads to rate a passage for a query, and the rating itself, for whoever ranks with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from ullme.components import Section

if TYPE_CHECKING:
    from ullme.batches import TokenRow
    from ullme.encoder import Encoder

__all__ = ["GenerationScore", "ScoreConfig", "ScoredRows", "rate"]

GenerationScore = Literal["passage_given_query", "pmi", "query_given_passage", "sum"]
"""How the language model rates a candidate (see `ullme.generation`)."""
GROUPS_AT_ONCE = 64


class ScoreConfig(Section):
    """What is rated, and the words around query and passage."""

    score: GenerationScore = "passage_given_query"
    """What is read off the language model (see `ullme.generation`); passage_given_query is ULLME's."""
    template: str = "{query}\n"
    """The condition of the passage."""
    passage_template: str = "{passage}\n"
    """What stands before the query in query_given_passage and sum."""
    passage_tokens: int = Field(default=128, ge=1)
    """Longest passage that is scored; the rest is cut."""

    @field_validator("template", "passage_template")
    @classmethod
    def _has_its_place_once(cls, value: str, info: ValidationInfo) -> str:
        place = "{query}" if info.field_name == "template" else "{passage}"
        if value.count(place) != 1 or value.replace(place, "").count("{"):
            raise ValueError(f"expected a text with {place} in it once, and no other braces")
        return value


@dataclass(frozen=True)
class ScoredRows:
    """Rows of G queries with K candidates each, as `ullme.generation` takes them.

    kept: positions of these queries among all; the others have no token, or their first candidate has none, and so no probability.
    alone and questions are empty where the score does not read them.
    """

    kept: list[int]
    prompts: list[list[int]]
    passages: list[list[list[int]]]
    alone: list[list[TokenRow | None]]
    questions: list[list[TokenRow | None]]

    @classmethod
    def of(
        cls, encoder: Encoder, settings: ScoreConfig, queries: Sequence[str], candidates: Sequence[Sequence[str | None]]
    ) -> ScoredRows:
        """Tokenise; None stands for a candidate that is not there."""
        from ullme.batches import TokenRow
        from ullme.generation import passage_rows

        tokenizer = encoder.tokenizer

        def cut(texts: list[str]) -> list[list[int]]:
            if not texts:
                return []
            return tokenizer(texts, add_special_tokens=False, truncation=True, max_length=settings.passage_tokens)["input_ids"]

        flat = iter(cut([text for group in candidates for text in group if text is not None]))
        bodies = [[next(flat) if text is not None else [] for text in group] for group in candidates]
        asked = cut(list(queries))
        kept = [place for place in range(len(queries)) if bodies[place][0] and asked[place]]
        passages = [bodies[place] for place in kept]
        prompts = [tokenizer(settings.template.format(query=queries[place]))["input_ids"] for place in kept]
        alone: list[list[TokenRow | None]] = []
        questions: list[list[TokenRow | None]] = []
        if settings.score in ("pmi", "sum"):
            start: Any = tokenizer(settings.template.format(query=""))["input_ids"] or [tokenizer.eos_token_id]
            alone = passage_rows([start] * len(kept), passages)
        if settings.score in ("query_given_passage", "sum"):
            before, _, after = settings.passage_template.partition("{passage}")
            first, end = tokenizer(before)["input_ids"], tokenizer(after, add_special_tokens=False)["input_ids"]
            questions = [
                [
                    TokenRow([*first, *body, *end, *asked[place]], len(first) + len(body) + len(end)) if body else None
                    for body in bodies[place]
                ]
                for place in kept
            ]
        return cls(kept, prompts, passages, alone, questions)


def rate(
    encoder: Encoder,
    settings: ScoreConfig,
    queries: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    chunk_tokens: int = 8192,
) -> list[np.ndarray]:
    """Float32[K] for each query: how well the language model finds that each of its K candidates answers it.

    -inf where there is no probability: of a text without a token.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(queries), GROUPS_AT_ONCE):
        some = slice(start, start + GROUPS_AT_ONCE)
        found += _rated(encoder, settings, queries[some], candidates[some], chunk_tokens)
    return found


def _rated(
    encoder: Encoder, settings: ScoreConfig, queries: Sequence[str], candidates: Sequence[Sequence[str]], chunk_tokens: int
) -> list[np.ndarray]:
    from ullme.generation import logprobs, passage_rows, teacher_scores

    found = [np.full(len(group), -np.inf, dtype=np.float32) for group in candidates]
    places = [place for place, group in enumerate(candidates) if group]
    ordered = [[*sorted(candidates[place], key=lambda text: not text.strip())] for place in places]  # one with tokens first
    width = max((len(group) for group in ordered), default=0)
    padded = [[*group, *[None] * (width - len(group))] for group in ordered]
    rows = ScoredRows.of(encoder, settings, [queries[place] for place in places], padded)
    if not rows.kept:
        return found
    given = None
    if settings.score != "query_given_passage":
        given = logprobs(encoder, passage_rows(rows.prompts, rows.passages), chunk_tokens=chunk_tokens)
    scores, _ = teacher_scores(
        encoder, settings.score, given=given, alone=rows.alone, questions=rows.questions, chunk_tokens=chunk_tokens
    )
    for number, kept in enumerate(rows.kept):
        by_text = {
            text: float(scores[number, column]) for column, text in enumerate(ordered[kept]) if rows.passages[number][column]
        }
        place = places[kept]
        found[place] = np.array([by_text.get(text, -np.inf) for text in candidates[place]], dtype=np.float32)
    return found
