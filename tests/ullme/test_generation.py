"""The generation scores, written plainly: one row at a time, full logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_training import GRL, sampler
from toys import gradients, logprob_by_hand, tiny_encoder

from ullme import gradcache, teacher
from ullme.batches import TokenRow
from ullme.encoder import Encoder
from ullme.generation import logprobs, passage_rows, quality
from ullme.gradcache import step
from ullme.objectives.grl import Grl
from ullme.sampling import Asked, Sampler
from ullme.training import LoraConfig

LORA = LoraConfig(rank=4, alpha=8)
SCORES = ["passage_given_query", "pmi", "query_given_passage", "sum"]
KL = {"kind": "grl", "preference_weight": 0, "contrastive_weight": 0, "generation_temperature": 0.5, "temperature": 0.2}


def encoder64() -> Encoder:
    return tiny_encoder(dtype=torch.float64, lora=LORA)


def by_hand(encoder: Encoder, score: str, query: str, passage: str) -> float:
    ids = lambda text: list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])[:12]  # noqa: E731
    prompt, prior = (list(encoder.tokenizer(text)["input_ids"]) for text in (f"{query}\n", "\n"))
    body, asked, start = ids(passage), ids(query), list(encoder.tokenizer("")["input_ids"])
    with torch.no_grad():
        given = float(logprob_by_hand(encoder, TokenRow([*prompt, *body], len(prompt))))
        alone = float(logprob_by_hand(encoder, TokenRow([*prior, *body], len(prior))))
        before = [*start, *body, *ids("\n")]
        question = float(logprob_by_hand(encoder, TokenRow([*before, *asked], len(before)))) / len(asked)
    pmi = (given - alone) / len(body)
    return {"passage_given_query": given / len(body), "pmi": pmi, "query_given_passage": question, "sum": pmi + question}[score]


def found_by_step(encoder: Encoder, score: str, **generation: Any) -> tuple[Sampler, gradcache.TrainBatch]:
    found = sampler(objective=KL, generation={**GRL["generation"], "queries": None, "score": score, **generation})
    return found, found.batch(0, encoder)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
@pytest.mark.parametrize("score", SCORES)
def test_the_alignment_reads_the_score_that_was_asked_for(score: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    found, batch = found_by_step(encoder, score)
    read = []
    plain = Grl.batch_loss
    monkeypatch.setattr(Grl, "batch_loss", lambda self, held, logs: (read.append(logs.score), plain(self, held, logs))[1])
    report = step(encoder, found.phase.objective, batch, chunk_tokens=budget)
    expected = [
        [by_hand(encoder, score, one.query, candidate[1]) for candidate in one.candidates if candidate is not None]
        for one in found.asked(0)
    ]
    assert torch.allclose(read[0], torch.tensor(expected, dtype=read[0].dtype), rtol=1e-9, atol=1e-9)
    best = [max(range(len(row)), key=row.__getitem__) for row in expected]
    assert report.health["generation_accuracy"] == pytest.approx(best.count(0) / len(best))


@pytest.mark.parametrize("score", SCORES)
def test_a_stored_score_gives_the_step_of_the_live_one_without_asking_the_model(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder64()
    live, batch = found_by_step(encoder, score)
    stored = replace(live, teacher=teacher.frozen(encoder, live, chunk_tokens=200))
    first = step(encoder, live.phase.objective, batch, chunk_tokens=60)
    expected = gradients(encoder)
    monkeypatch.setattr(Encoder, "sequence_logprobs", lambda *_: pytest.fail("the language model was run"))
    second = step(encoder, live.phase.objective, stored.batch(0, encoder), chunk_tokens=60)
    assert second.terms["kl"] == pytest.approx(first.terms["kl"], rel=1e-5)
    for name, gradient in gradients(encoder).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].abs().max())), name


def test_every_pair_of_a_phase_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    found, _ = found_by_step(encoder, "query_given_passage")
    rows: list[TokenRow] = []
    collated = Encoder.collate
    monkeypatch.setattr(Encoder, "collate", lambda self, given: (rows.extend(given), collated(self, given))[1])
    stored = teacher.frozen(encoder, found, chunk_tokens=200)
    pairs = {
        one.pair(candidate[0]) for step_ in range(100) for one in found.asked(step_) for candidate in one.candidates if candidate
    }
    assert set(stored) == pairs
    assert len(rows) == len(pairs)


def test_with_a_preference_the_stored_score_stands_beside_the_live_log_probabilities() -> None:
    encoder = encoder64()
    objective = {**KL, "preference_weight": 0.5}
    found = sampler(objective=objective, generation={**GRL["generation"], "score": "pmi"})
    stored = replace(found, teacher=teacher.frozen(encoder, found, chunk_tokens=200))
    reports = [step(encoder, found.phase.objective, of.batch(1, encoder), chunk_tokens=60) for of in (found, stored)]
    assert reports[0].terms == pytest.approx(reports[1].terms, rel=1e-5)
    assert reports[0].tokens > reports[1].tokens  # the prior is not asked for again


def test_the_scores_have_no_gradient() -> None:
    encoder = encoder64()
    given = logprobs(encoder, passage_rows([[3, 4]], [[[5, 6], []]]), chunk_tokens=100)
    assert not given.total.requires_grad
    assert given.tokens.tolist() == [[2, 0]]


def test_equal_rows_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    row, other = TokenRow([3, 4, 5], 1), TokenRow([3, 4, 5], 2)
    seen: list[int] = []
    plain = Encoder.collate
    monkeypatch.setattr(Encoder, "collate", lambda self, rows: (seen.append(len(rows)), plain(self, rows))[1])
    given = logprobs(encoder, [[row, None], [other, row]], chunk_tokens=1000)
    assert seen == [2]
    assert given.cost == 6
    assert given.total[0, 0] == given.total[1, 1] != given.total[1, 0]


# Does it teach?


def test_quality_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 99.0], [5.0, 7.0, 7.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    found = quality(scores, present, temperature=1.0)
    assert (found.queries, found.accuracy, found.chance) == (2, 0.5, pytest.approx((1 / 3 + 1 / 2) / 2))
    assert 0 < found.entropy < found.most
    assert found.near_chance
    assert not replace(found, accuracy=0.68, chance=0.2, queries=48).near_chance
    assert quality(scores[2:], present[2:], temperature=1.0).queries == 0


@pytest.mark.parametrize(
    ("accuracy", "level", "said"), [(0.21, logging.WARNING, "no better than chance"), (0.7, logging.INFO, "70%")]
)
def test_a_score_that_guesses_is_warned_of(accuracy: float, level: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = replace(quality(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), temperature=1.0), queries=48, chance=0.2)
    teacher.report(replace(found, accuracy=accuracy), "pmi")
    assert [record.levelno for record in caplog.records] == [level]
    assert said in caplog.text
    assert "pmi" in caplog.text


def test_the_first_queries_of_a_phase_are_measured() -> None:
    encoder = encoder64()
    found, _ = found_by_step(encoder, "sum")
    measured = teacher.measure(encoder, found, chunk_tokens=200)
    assert measured.queries == 7
    assert measured.chance == pytest.approx(1 / 3)


def asked(texts: Sequence[str]) -> Asked:
    return Asked("q", "a query", [(str(number), text) for number, text in enumerate(texts)])


def test_a_passage_without_a_token_has_no_score() -> None:
    encoder = encoder64()
    found, _ = found_by_step(encoder, "sum")
    fields = found.scoring([asked(["text", ""]), asked(["", "text"])], [0, 1], encoder)
    assert fields["scored"] == [0]
    assert [row is None for row in fields["questions"][0]] == [False, True]
    assert [row is None for row in fields["alone"][0]] == [False, True]
