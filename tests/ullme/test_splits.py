"""Splits by hash: growth moves nothing to the training side, and the same question never stands on two sides."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

from ullme.records import Query, normalise
from ullme.splits import ALIKE, canonical, content_words, split_queries

NOUNS = ["kettle", "invoice", "password", "server", "garden", "engine"]
VERBS = ["reset", "repair", "cancel"]
PLACES = ["office", "kitchen", "berlin"]


def queries(generator: random.Random, count: int) -> list[Query]:
    """Questions of which many are nearly the same."""
    made = []
    for number in range(count):
        words = [generator.choice(VERBS), *generator.sample(NOUNS, generator.randint(1, 5)), generator.choice(PLACES)]
        ask = generator.choice(["How do I {} ?", "how to {}", "{}", "What is the way to {}s?", "please {} the"])
        made.append(Query(f"q{number}", ask.format(" ".join(words)), positives={f"d{number % 7}": 1}))
    return made


def sides(given: Iterable[Query]) -> tuple[dict[str, str], int]:
    kept, dropped = split_queries(given, dev_share=0.15, test_share=0.25)
    return {query.id: query.split or "" for query in kept}, dropped


def alike(one: str, other: str) -> bool:
    first, second = content_words(one), content_words(other)
    return min(len(first), len(second)) >= 3 and len(first & second) / len(first | second) >= ALIKE


@pytest.mark.parametrize("seed", range(10))
def test_growing_data_never_moves_a_query_from_test_to_train_whatever_its_order(seed):
    generator = random.Random(seed)
    everything = queries(generator, 300)
    before: dict[str, str] = {}
    for size in (50, 120, 200, 300):
        some = everything[:size]
        generator.shuffle(some)
        now = sides(some)[0]
        assert all(now.get(name, side) == side for name, side in before.items())
        assert {name for name, side in now.items() if side == "train"}.isdisjoint(n for n, s in before.items() if s != "train")
        assert {name for name, side in before.items() if side == "test"} <= now.keys()
        before = now


@pytest.mark.parametrize("seed", range(10))
def test_near_duplicates_share_a_side_and_what_is_dropped_is_what_a_plain_search_finds(seed):
    given = queries(random.Random(seed), 200)
    kept, dropped = sides(given)
    text = {query.id: query.text for query in given}
    assert not [pair for pair in combinations(kept, 2) if kept[pair[0]] != kept[pair[1]] and alike(text[pair[0]], text[pair[1]])]
    rank = {"train": 0, "dev": 1, "test": 2}
    side = {query.id: sides([query])[0][query.id] for query in given}
    lesser = {
        query.id
        for query in given
        for other in given
        if rank[side[other.id]] > rank[side[query.id]]
        and (alike(query.text, other.text) or normalise(query.text) == normalise(other.text))
    }
    assert dropped == len(lesser) > 0
    assert kept == {name: found for name, found in side.items() if name not in lesser}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_keeps_its_judgements(seed):
    given = queries(random.Random(seed), 100)
    before = {query.id: query for query in given}
    for query in split_queries(given, dev_share=0.1, test_share=0.2)[0]:
        assert query.positives == before[query.id].positives
        assert query.text == before[query.id].text


def test_one_question_in_several_words_is_one_group():
    same = ["How do I reset my password?", "how to reset the passwords", "Reset passwords!", "what is the way to reset a PASSWORD"]
    assert len({canonical(text) for text in same}) == 1
    assert len({canonical(text) for text in ("reset a password", "reset a server", "what is it", "why is it")}) == 4


def test_a_group_of_its_own_decides_the_side():
    several: Sequence[Query] = [Query(f"q{n}", f"question number {n} about gardens", group="one") for n in range(30)]
    assert len(set(sides(several)[0].values())) == 1


def test_queries_with_a_split_of_their_own_are_compared_by_their_text_alone():
    given = [
        Query("train", "reset the office printer password today", "train"),
        Query("test", "reset the office printer password", "test"),
        Query("same", "Reset the office printer password?", "train"),
    ]
    assert alike(given[0].text, given[1].text)
    assert sides(given) == ({"train": "train", "test": "test"}, 1)
