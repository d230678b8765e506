"""A second opinion on mined negatives: a judge reads each with its query, and those it likes as well as the positive are suspects.

What ranks by words or vectors cannot tell an unlabelled answer from a hard negative; what reads query and passage together can
(the LLM's own generation score finds the positive among hard negatives without any label, see `ullme.generation`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ullme.components import Section, component
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

    encoder: loads the model that the stage was given; None where it was given none, and the judge needs none.
    """
    opened = encoder() if encoder is not None and config.reranker.needs_model else None
    kept: Rows = []
    relabelled: list[list[int]] = []
    suspects = right = 0
    chances: list[float] = []
    with Progress(len(context.queries), "judge negatives", unit="query") as progress:
        for start in range(0, len(context.queries), AT_ONCE):
            block = range(start, min(start + AT_ONCE, len(context.queries)))
            answers = [context.positive_rows(query) for query in block]
            rows = [[*of, *(row for row, _ in chosen[query])] for query, of in zip(block, answers, strict=True)]
            texts = [[context.documents[row].content for row in of] for of in rows]
            scores = config.reranker.scores(opened, [context.queries[query].text for query in block], texts)
            for of, read, positives in zip(rows, scores, answers, strict=True):
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
            progress.advance(len(block))
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
