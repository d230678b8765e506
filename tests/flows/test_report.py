# ruff: noqa: E501
"""The end of a run: the numbers that a person reads are those of the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.report import page_rows, plot, show
from ullme.artifacts import ArtifactRef

SUMMARY: dict[str, Any] = {
    "scores": {
        "base": {"retrieval": {"ndcg_at_10": 0.1}},
        "tuned": {"retrieval": {"ndcg_at_10": 0.4}},
        "bm25": {"retrieval": {"ndcg_at_10": 0.3}},
    },
    "intervals": {
        "base": {"retrieval": {"ndcg_at_10": [0.05, 0.15]}},
        "tuned": {"retrieval": {"ndcg_at_10": [0.35, 0.45]}},
        "bm25": {"retrieval": {"ndcg_at_10": [0.25, 0.35]}},
    },
    "index_scores": {"tuned": {"retrieval": {"ndcg_at_10": 0.39}}},
    "index_intervals": {"tuned": {"retrieval": {"ndcg_at_10": [0.34, 0.44]}}},
    "queries": {"retrieval": 300},
    "documents": {"retrieval": 1200},
    "controls": {"retrieval": {"shuffled": 0.004}},
    "metric": "ndcg_at_10",
    "task": "retrieval",
    "comparisons": {"base": {"difference": 0.3, "low": 0.25, "high": 0.35, "p": 0.0001}},
    "stages": {"data": {"status": "reused", "seconds": 0.1, "artifact": "data/abc"}},
    "description": "the [better] one",
    "texts_encoded": 25,
    "released": {
        "name": "ullme", "version": 2, "promoted": True, "champion": True, "created": True, "why": "better than [its] base", "model": "m", "index": "i",
    },
    "question": "what's new?",
    "seconds": 12.0,
}  # fmt: skip


def test_a_row_has_every_system_exact_and_through_the_index() -> None:
    assert page_rows(SUMMARY) == [
        {
            "task": "retrieval",
            "metric": "ndcg_at_10",
            "base": "0.100 [0.050, 0.150]",
            "tuned": "0.400 [0.350, 0.450]",
            "tuned (index)": "0.390 [0.340, 0.440]",
            "bm25": "0.300 [0.250, 0.350]",
        }
    ]


def test_the_end_says_what_was_measured_released_and_what_to_do_next() -> None:
    console = Console(width=132, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    show(SUMMARY, console, search=" --config c.yaml")
    console.file.close()
    text = console.export_text()
    for words in (
        "300 queries, 1200 documents",
        "[0.350, 0.450]",
        "tuned - base: ndcg_at_10 +0.300 [+0.250, +0.350], p 0.0001",
        "control of retrieval: shuffled 0.004",
        "the [better] one",
        "reused",
        "25 texts encoded; the vectors of the others were there",
        "ullme version 2, new champion: better than [its] base",
        """try: ullme search 'what'"'"'s new?' --config c.yaml""",
    ):
        assert words in text


@pytest.mark.parametrize("more", [{}, {"loss/contrastive/nli": 0.4, "accuracy": 0.5, "development_mrr": 0.3}])
def test_plots_are_made_of_what_training_wrote(more: dict[str, float], tmp_path: Path) -> None:
    logs = tmp_path / "model" / "logs"
    logs.mkdir(parents=True)
    rows = [{"step": step, "loss": 1 / step, "loss/contrastive": 0.5 / step, **more} for step in (1, 2, 3)]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (logs / "scores.json").write_text(
        json.dumps({when: {"positive": [0.5, 0.6], "negative": [0.1]} for when in ("before", "after")})
    )
    plot(tmp_path, SUMMARY, ArtifactRef(kind="model", uri=str(tmp_path / "model"), digest=""))
    for name in ("loss.png", "scores_before_after.png", "scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
