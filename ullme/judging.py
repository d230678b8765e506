"""A second opinion on mined negatives: a judge reads each with its query, and those it likes as well as the positive are suspects.

What ranks by words or vectors cannot tell an unlabelled answer from a hard negative; what reads query and passage together can
(the LLM's own generation score finds the positive among hard negatives without any label, see `ullme.generation`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ullme.components import Section, component
from ullme.journal import Journal
from ullme.progress import Progress
from ullme.reranking import Reranker

if TYPE_CHECKING:
    from ullme.encoder import Encoder
    from ullme.mining_context import MiningContext

__all__ = ["JudgeConfig", "Judgement", "judge"]

logger = logging.getLogger(__name__)

AT_ONCE = 64
Rows = list[list[tuple[int, float]]]


class JudgeConfig(Section):
    """Who reads the mined negatives, and what becomes of those that look like answers. The scores kept are the judge's."""

    reranker: Annotated[Reranker, component("ullme.rerankers")]
    margin: float = Field(default=0.0)
    """Suspected is what scores more than the positive less this, in units of the judge's score."""
    suspects: Literal["keep", "drop", "relabel"] = "drop"
    """drop: no negative; relabel: one more positive of its query; keep: a negative all the same, with the judge's score."""


@dataclass(frozen=True)
class Judgement:
    """chosen: (pool row, the judge's score) of each query, best first; relabelled: pool rows that became positives; found: how good
    the judge is and what it did, for the report.
    """

    chosen: Rows
    relabelled: list[list[int]]
    found: dict[str, Any]


def judge(config: JudgeConfig, context: MiningContext, chosen: Rows, encoder: Callable[[], Encoder] | None) -> Judgement:
    """Have the negatives of every query read, beside its positives.

    encoder: loads the model that the stage was given; None where it was given none, and the judge needs none. What was read is
    kept in the context's folder, and an interrupted attempt goes on after it.
    """
    kept: Rows = []
    relabelled: list[list[int]] = []
    suspects = right = 0
    chances: list[float] = []
    answers = [context.positive_rows(query) for query in range(len(context.queries))]
    every = [[*of, *(row for row, _ in found)] for of, found in zip(answers, chosen, strict=True)]
    with _Reading(config, context, every, encoder) as reading:
        for start in range(0, len(every), AT_ONCE):
            rows = every[start : start + AT_ONCE]
            for of, read, positives in zip(rows, reading.scores(start), answers[start : start + AT_ONCE], strict=True):
                count = len(positives)
                order = count + np.argsort(-read[count:], kind="stable")
                bar = float(read[:count].min()) - config.margin if count else float("inf")
                suspected = [place for place in order if read[place] > bar]
                suspects += len(suspected)
                if count and len(of) > count:
                    right += int(read[:count].max() > read[count:].max())
                    chances.append(count / len(of))
                stay = order if config.suspects == "keep" else [place for place in order if read[place] <= bar]
                kept.append([(of[place], float(read[place])) for place in stay])
                relabelled.append([of[place] for place in suspected] if config.suspects == "relabel" else [])
    accuracy, chance = (right / len(chances), float(np.mean(chances))) if chances else (1.0, 1.0)
    found = {
        "kind": config.reranker.kind,
        "finds_positive": round(accuracy, 4),
        "chance": round(chance, 4),
        "queries": len(chances),
        "suspects": suspects,
        "became_of_them": config.suspects,
    }
    logger.info(
        "mine: the judge (%s) finds the positive in %.1f%% of %d queries, chance is %.1f%%; %d suspected negatives: %s",
        *(config.reranker.kind, 100 * accuracy, len(chances), 100 * chance, suspects, config.suspects),
    )
    if chances and accuracy <= chance + 2 * (chance * (1 - chance) / len(chances)) ** 0.5:
        logger.warning(
            "mine: the judge (%s) finds the positive no better than chance; it takes out good negatives: use another, or none",
            config.reranker.kind,
        )
    return Judgement(kept, relabelled, found)


class _Reading:
    """The judge at work, query by query. rows: the pool rows that it reads for each."""

    def __init__(
        self, config: JudgeConfig, context: MiningContext, rows: Sequence[list[int]], encoder: Callable[[], Encoder] | None
    ) -> None:
        self._judge, self._context, self._rows = config.reranker, context, rows
        self._encoder = cache(encoder) if encoder is not None and config.reranker.needs_model else lambda: None
        self._journal = Journal(context.folder / "judged.jsonl") if context.folder is not None else None
        self._before = len(self._journal.entries) * AT_ONCE if self._journal else 0
        self._progress = Progress(len(rows), "judge negatives", unit="query", initial=min(self._before, len(rows)))

    def __enter__(self) -> _Reading:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        if self._journal:
            self._journal.__exit__(*error)

    def scores(self, start: int) -> list[np.ndarray]:
        """Float32[K] of each of the AT_ONCE queries from this one on."""
        if self._journal and start < self._before:
            return [np.array(of, dtype=np.float32) for of in self._journal.entries[start // AT_ONCE]]
        block = range(start, min(start + AT_ONCE, len(self._rows)))
        texts = [[self._context.documents[row].content for row in self._rows[query]] for query in block]
        found = self._judge.scores(self._encoder(), [self._context.queries[query].text for query in block], texts)
        found = [np.asarray(of, dtype=np.float32) for of in found]
        if self._journal:
            self._journal.append([of.tolist() for of in found])
        self._progress.advance(len(block))
        return found


def merged(one: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The findings of several data sets as one; None where nobody judged."""
    if not one:
        return None
    queries = sum(found["queries"] for found in one)
    mean = {
        name: round(sum(found[name] * found["queries"] for found in one) / max(1, queries), 4)
        for name in ("finds_positive", "chance")
    }
    return {**one[0], **mean, "queries": queries, "suspects": sum(found["suspects"] for found in one)}
