"""Which queries are for training, development and testing, where the source does not say.

The side of a query is a hash of its group, so it does not depend on what other data there is: a query that was once for
testing is never trained on later. By default a group is the query's content words whatever their order and ending, so
"How do I reset my password?" and "how to reset the passwords" are one. What is still alike across two sides is dropped from
the one that matters less.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil

from ullme.lexical import tokenise
from ullme.records import SPLITS, Query, Split, hash_share, normalise

__all__ = ["ALIKE", "canonical", "content_words", "side_share", "split_queries"]

ALIKE = 0.8
"""Jaccard similarity of two queries' content words from which they count as the same question."""
FEWEST_WORDS = 3
# fmt: off
ASKING = frozenset({
    "about", "am", "any", "anyone", "best", "can", "could", "did", "do", "doe", "does", "doing", "done", "from", "get", "give",
    "had", "has", "have", "how", "i", "just", "know", "like", "me", "might", "must", "my", "need", "our", "please", "shall",
    "should", "so", "some", "someone", "tell", "than", "them", "us", "want", "way", "we", "were", "what", "when", "where",
    "whether", "which", "who", "whom", "whose", "why", "would", "you", "your",
})
# fmt: on
"""Words of asking, in the form that `tokenise` gives them; it leaves out the commonest of all itself."""
RANK = {split: position for position, split in enumerate(SPLITS)}


def content_words(text: str) -> frozenset[str]:
    """The words that say what a query is about, without plural endings."""
    return frozenset(tokenise(unicodedata.normalize("NFKC", text))) - ASKING


def canonical(text: str) -> str:
    """One spelling for all queries of the same content words; the normalised text where a query has none."""
    return " ".join(sorted(content_words(text))) or normalise(text)


def side_share(group: str) -> float:
    """Where a group stands in [0, 1): the share for testing is cut off at 0, then that for development."""
    return hash_share(group, "split")


def split_queries(queries: Iterable[Query], *, dev_share: float, test_share: float) -> tuple[list[Query], int]:
    """Every query with a split, and how many were dropped because they stand on a side that matters more, too.

    A query that has a split keeps it; two queries with one normalised text stay on one side in any case. Those split here
    are also dropped when their content words are nearly those of a query split here on a side that matters more.
    """
    given = list(queries)

    def side(query: Query) -> Split:
        share = side_share(query.group or canonical(query.text))
        return "test" if share < test_share else "dev" if share < test_share + dev_share else "train"

    split = [query if query.split else replace(query, split=side(query)) for query in given]
    sides: dict[str, int] = {}
    for query in split:
        text = normalise(query.text)
        sides[text] = max(sides.get(text, 0), RANK[query.split or "train"])
    kept = [query for query in split if RANK[query.split or "train"] == sides[normalise(query.text)]]
    hashed = {query.id for query in given if query.split is None}
    alike = _alike_across([query for query in kept if query.id in hashed])
    kept = [query for query in kept if query.id not in alike]
    return kept, len(given) - len(kept)


def _alike_across(queries: Sequence[Query]) -> set[str]:
    """Ids of queries that are nearly the same as one on a side that matters more.

    The words of each query are put in one order, the rarest first; sets with a Jaccard similarity of t or more then share a
    word among the first n - ceil(t n) + 1 of each, so only queries that do are compared (Bayardo, Ma and Srikant, "Scaling
    up all pairs similarity search", WWW 2007).
    """
    words = {query.id: found for query in queries if len(found := content_words(query.text)) >= FEWEST_WORDS}
    frequency = Counter(word for found in words.values() for word in found)

    def prefix(found: frozenset[str]) -> list[str]:
        ordered = sorted(found, key=lambda word: (frequency[word], word))
        return ordered[: len(ordered) - ceil(round(ALIKE * len(ordered), 9)) + 1]

    holders: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        if query.id in words and query.split != "train":
            for word in prefix(words[query.id]):
                holders[word].append(query)
    alike = set()
    for query in queries:
        if query.id not in words or query.split == "test":
            continue
        own, rank = words[query.id], RANK[query.split or "train"]
        others = {other.id for word in prefix(own) for other in holders.get(word, ()) if RANK[other.split or "train"] > rank}
        if any(_similarity(own, words[other]) >= ALIKE for other in others):
            alike.add(query.id)
    return alike


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
