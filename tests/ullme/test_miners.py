"""The contract of every kind in ullme/miners: the folder is walked, so a new file is tested the moment it exists."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from ullme.components import kinds, resolve
from ullme.data import Document, Query
from ullme.errors import ConfigError, ContractError
from ullme.lexical import LexicalConfig
from ullme.miner import Miner, RankingMiner
from ullme.mining_context import MiningContext
from ullme.rankers import FusedRanker, VectorRanker
from ullme.records import normalise

KINDS = kinds("ullme.miners")
# A kind with fields that must be given is tried with these.
FIELDS: dict[str, dict[str, Any]] = {"mixed": {"miners": [{"kind": "bm25"}, {"kind": "topk", "num_negatives": 3}]}}
WORDS = ["red", "green", "blue", "fox", "dog", "cat", "runs", "sleeps", "eats", "fast"]


def miner_of(kind: str, **fields: Any) -> Miner:
    found = resolve("ullme.miners", {"kind": kind, **FIELDS.get(kind, {}), **fields})
    assert isinstance(found, Miner)
    return found


def context_of(*, count: int = 60, seed: int = 0, shift: float = 0.0, model: bool = True) -> MiningContext:
    """Random sentences, some of them twice in another spelling; vectors near the first positive, `shift` turns them away."""
    random = np.random.default_rng(11)
    texts = [" ".join(random.choice(WORDS, 5)) for _ in range(count)]
    for copy in range(5):
        texts[count - 1 - copy] = texts[copy].upper() + "!"
    documents = [Document(f"d{n}", text) for n, text in enumerate(texts)]
    queries = [
        Query(f"q{n}", " ".join(texts[n].split()[:3]), "train", {f"d{n}": 1} | ({f"d{n + 20}": 2} if n % 3 == 0 else {}))
        for n in range(15)
    ]
    vectors = random.normal(size=(count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = np.stack([vectors[[int(doc[1:]) for doc in query.positives]].mean(axis=0) for query in queries]) - shift * vectors[:15]
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    return MiningContext(queries, documents, seed, (lambda _: VectorRanker(asked, vectors)) if model else None)


def untaken(context: MiningContext) -> list[set[int]]:
    return [set() for _ in context.queries]


@pytest.mark.parametrize("kind", KINDS)
def test_never_a_positive_nor_its_text_nor_a_text_twice(kind: str) -> None:
    context, miner = context_of(), miner_of(kind)
    selection = miner.select(context, untaken(context))
    assert len(selection.chosen) == len(context.queries)
    assert any(selection.chosen)
    for query, chosen in zip(context.queries, selection.chosen, strict=True):
        texts = [normalise(context.documents[row].content) for row, _ in chosen]
        positives = {normalise(context.documents[context.row_of[doc]].content) for doc in query.positives}
        assert not positives & set(texts)
        assert len(set(texts)) == len(texts) <= miner.wanted


@pytest.mark.parametrize("kind", KINDS)
def test_texts_already_taken_are_left_alone(kind: str) -> None:
    context, miner = context_of(), miner_of(kind)
    first = miner.select(context, untaken(context)).chosen
    taken = [{context.keys[row] for row, _ in chosen} for chosen in first]
    second = miner.select(context, taken).chosen
    assert any(second)
    for keys, chosen in zip(taken, second, strict=True):
        assert not keys & {context.keys[row] for row, _ in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_negatives(kind: str) -> None:
    first, second = (miner_of(kind).select(context, untaken(context)).chosen for context in (context_of(), context_of()))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_does_not_depend_on_the_others(kind: str) -> None:
    context = context_of()
    ranker = context.model
    alone = MiningContext(context.queries[4:5], context.documents, 0, lambda _: VectorRanker(ranker.queries[4:5], ranker.documents))
    first, second = miner_of(kind).select(alone, [set()]).chosen[0], miner_of(kind).select(context, untaken(context)).chosen[4]
    assert [row for row, _ in first] == [row for row, _ in second]
    np.testing.assert_allclose([score for _, score in first], [score for _, score in second], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_smaller_than_the_wish_is_not_padded(kind: str) -> None:
    context = context_of()
    small = MiningContext(
        context.queries[:1],
        context.documents[:3],
        0,
        lambda _: VectorRanker(context.model.queries[:1], context.model.documents[:3]),
    )
    chosen = miner_of(kind).select(small, [set()]).chosen[0]
    assert len(chosen) <= 2
    assert all(0 < row < 3 and np.isfinite(score) for row, score in chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_model_a_kind_that_needs_one_says_so(kind: str) -> None:
    context, miner = context_of(model=False), miner_of(kind)
    if not miner.needs_model:
        assert any(miner.select(context, untaken(context)).chosen)
        return
    with pytest.raises(ConfigError, match="needs a model's vectors"):
        miner.select(context, untaken(context))


RANKING = [kind for kind in KINDS if isinstance(miner_of(kind), RankingMiner)]


@pytest.mark.parametrize("kind", RANKING)
def test_top_takes_the_best_first_and_skip_top_starts_lower(kind: str) -> None:
    context = context_of()
    fields: dict[str, Any] = {"depth": 60, "skip_top": 0, "sampling": "top"}
    everything = miner_of(kind, num_negatives=10, **fields).select(context, untaken(context)).chosen
    few = miner_of(kind, num_negatives=2, **fields).select(context, untaken(context)).chosen
    lower = miner_of(kind, num_negatives=2, **{**fields, "skip_top": 20}).select(context, untaken(context)).chosen
    for whole, part, below in zip(everything, few, lower, strict=True):
        scores = [score for _, score in whole]
        assert scores == sorted(scores, reverse=True)
        assert part == whole[:2]
        assert not set(part) & set(below)


@pytest.mark.parametrize("kind", RANKING)
def test_random_draws_within_the_depth_by_the_seed(kind: str) -> None:
    fields: dict[str, Any] = {"num_negatives": 2, "depth": 12, "skip_top": 0, "sampling": "random"}
    contexts = [context_of(seed=seed) for seed in (0, 1)]
    drawn = [miner_of(kind, **fields).select(context, untaken(context)).chosen for context in contexts]
    window = miner_of(kind, num_negatives=12, depth=12, skip_top=0).select(contexts[0], untaken(contexts[0])).chosen
    assert drawn[0] != drawn[1]
    for chosen in drawn:
        assert all(set(part) <= set(whole) for part, whole in zip(chosen, window, strict=True))


@pytest.mark.parametrize("kind", RANKING)
def test_a_window_too_small_is_a_configuration_error(kind: str) -> None:
    with pytest.raises(ValueError, match="raise depth"):
        miner_of(kind, num_negatives=4, depth=10, skip_top=8)


def test_topk_equals_brute_force() -> None:
    context = context_of()
    chosen = miner_of("topk", num_negatives=5).select(context, untaken(context)).chosen
    for query in range(len(context.queries)):
        scores = context.model.documents @ context.model.queries[query]
        seen, expected = {context.keys[row] for row in context.positive_rows(query)}, []
        for row in np.argsort(-scores, kind="stable"):
            if context.keys[row] not in seen:
                seen.add(context.keys[row])
                expected.append(row)
        assert [row for row, _ in chosen[query]] == expected[:5]
        np.testing.assert_allclose([score for _, score in chosen[query]], scores[expected[:5]], rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.95, 0.5])
def test_perc_pos_stays_below_its_share_of_the_lowest_positive(ratio: float) -> None:
    context = context_of()
    miner = miner_of("perc_pos", num_negatives=60, depth=60, max_ratio=ratio)
    naive = miner_of("topk", num_negatives=60, depth=60).select(context, untaken(context)).chosen
    for query, chosen in enumerate(miner.select(context, untaken(context)).chosen):
        lowest = min(context.model.score([query], [context.positive_rows(query)])[0])
        assert chosen == [entry for entry in naive[query] if entry[1] < ratio * lowest]


def test_perc_pos_refuses_a_model_whose_positives_score_nothing() -> None:
    context = context_of(shift=3.0)
    with pytest.raises(ContractError, match=r"15 of 15 queries refused: perc_pos needs s\(query, positive\) > 0.*mine with bm25"):
        miner_of("perc_pos").select(context, untaken(context))


def test_perc_pos_leaves_out_and_counts_a_single_such_query(caplog: pytest.LogCaptureFixture) -> None:
    context = context_of()
    asked = context.model.queries.copy()
    asked[7] = -asked[7]
    turned = MiningContext(context.queries, context.documents, 0, lambda _: VectorRanker(asked, context.model.documents))
    with caplog.at_level(logging.WARNING):
        selection = miner_of("perc_pos").select(turned, untaken(turned))
    assert not selection.chosen[7]
    assert selection.passed_over["queries refused: perc_pos needs s(query, positive) > 0, got a score of 0 or less"] == 1
    assert "1 of 15 queries refused" in caplog.text


@pytest.mark.parametrize("margin", [0.05, 0.4])
def test_margin_pos_stays_a_margin_below_the_lowest_positive(margin: float) -> None:
    context = context_of()
    miner = miner_of("margin_pos", num_negatives=60, depth=60, margin=margin)
    naive = miner_of("topk", num_negatives=60, depth=60).select(context, untaken(context)).chosen
    for query, chosen in enumerate(miner.select(context, untaken(context)).chosen):
        lowest = min(context.model.score([query], [context.positive_rows(query)])[0])
        assert chosen == [entry for entry in naive[query] if entry[1] < lowest - margin]


def test_margin_pos_takes_positives_that_score_below_zero() -> None:
    context = context_of(shift=1.2)
    chosen = miner_of("margin_pos", num_negatives=60, depth=60).select(context, untaken(context)).chosen
    naive = miner_of("topk", num_negatives=60, depth=60).select(context, untaken(context)).chosen
    lowest = [min(context.model.score([query], [context.positive_rows(query)])[0]) for query in range(15)]
    assert any(value < 0 for value in lowest)
    assert chosen == [[row for row in rows if row[1] < value - 0.05] for rows, value in zip(naive, lowest, strict=True)]


def test_a_rank_window_is_drawn_from_its_ranks_alone() -> None:
    context = context_of()
    window = miner_of("topk", skip_top=10, depth=25, num_negatives=15).select(context, untaken(context)).chosen
    drawn = miner_of("rank_window", skip_top=10, depth=25, num_negatives=5).select(context, untaken(context)).chosen
    for whole, chosen in zip(window, drawn, strict=True):
        assert set(chosen) < set(whole)
        assert len(chosen) == 5
    assert any(chosen != whole[:5] for whole, chosen in zip(window, drawn, strict=True))
    lexical = miner_of("rank_window", by="bm25", skip_top=0, depth=30, sampling="top")
    assert not lexical.needs_model
    assert lexical.select(context, untaken(context)).chosen == (miner_of("bm25", depth=30).select(context, untaken(context)).chosen)


def test_random_negatives_spread_over_the_pool() -> None:
    context = context_of()
    chosen = miner_of("random", num_negatives=8).select(context, untaken(context)).chosen
    assert all(len(rows) == 8 for rows in chosen)
    assert len({row for rows in chosen for row, _ in rows}) > 40
    assert not miner_of("random").rankers(context)


def test_mixed_adds_up_its_parts_in_order() -> None:
    context = context_of()
    parts = [{"kind": "bm25", "num_negatives": 2}, {"kind": "topk", "num_negatives": 3}]
    mixed = miner_of("mixed", miners=parts)
    lexical = miner_of("bm25", num_negatives=2).select(context, untaken(context)).chosen
    assert mixed.wanted == 5
    assert mixed.needs_model
    for chosen, first in zip(mixed.select(context, untaken(context)).chosen, lexical, strict=True):
        assert len(chosen) == 5
        assert chosen[:2] == first


def test_mixed_of_mixed_works_and_no_miner_at_all_is_refused() -> None:
    context = context_of()
    nested = miner_of("mixed", miners=[{"kind": "mixed", "miners": [{"kind": "bm25"}]}])
    assert not nested.needs_model
    assert nested.select(context, untaken(context)).chosen == miner_of("bm25").select(context, untaken(context)).chosen
    with pytest.raises(ValueError, match="at least 1 item"):
        miner_of("mixed", miners=[])


# Two rankings as one


def spread(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean()) / scores.std()


@pytest.mark.parametrize("by", ["ranks", "scores"])
def test_fused_rankings_follow_their_definitions(by: Any) -> None:
    """Written plainly over the whole pool, which is as deep as the rankings are looked at."""
    context = context_of()
    size, queries = len(context.documents), range(len(context.queries))
    words, vectors = context.bm25(LexicalConfig()), context.model
    fused = FusedRanker([words, vectors], by, depth=size)
    found = fused.search(queries, size)
    for query in (query for query in queries if query % 3):  # the others lie halfway between two documents: a tie
        lexical = words.searcher.scores(context.queries[query].text).astype(np.float64)
        dense = (vectors.documents[:] @ vectors.queries[query]).astype(np.float64)
        if by == "scores":
            expected = (spread(lexical) + spread(dense)) / 2
        else:
            expected = np.zeros(size)
            for scores, ranked in ((lexical, lexical > 0), (dense, np.ones(size, bool))):
                order = [row for row in np.argsort(-scores, kind="stable") if ranked[row]]
                expected[order] += 1 / (60 + 1 + np.arange(len(order)))
        np.testing.assert_allclose(fused.score([query], [range(size)])[0], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.scores[query], -np.sort(-expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["ranks", "scores"])
def test_what_is_deep_in_both_rankings_is_not_looked_at(by: Any) -> None:
    context = context_of()
    fused = FusedRanker([context.bm25(LexicalConfig()), context.model], by, depth=5)
    found = fused.search([3], 20)
    near = {row for ranker in fused.rankers for row in ranker.search([3], 20).rows[0].tolist()}
    assert set(found.rows[0].tolist()) <= near | {-1}
    assert fused.search([3], 3).rows.tolist() == found.rows[:, :3].tolist()
