"""How fast exact search goes, and the assignment of vectors to inverted lists: torch on a device, beside numpy on the CPU.

    python benchmarks/search.py --json search.json                     on the CPU; on the GPU too, where torch sees one
    python benchmarks/search.py --quick                                fewer vectors, under 5 minutes

Random unit vectors of 576 numbers in float16, as embeddings are kept. Runs alternate, the median counts.

    rows_per_second      search: vectors passed, with 256 queries at once, for the 100 nearest; assign: vectors given the nearest
                         of 4,096 centroids
    share_of_matrix_rate operations of those products over what one large product reaches on the same device in float32
    differ               share of answers that are not those of numpy, and how far the scores of these are apart at most
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import NOT_RUN, alternate, machine, matrix_rate

from indexes._centroids import nearest_centroids
from ullme.artifacts import write_atomic
from ullme.neighbours import nearest

DIM, QUERIES, NEAREST, CENTROIDS = 576, 256, 100, 4_096
COUNT, QUICK_COUNT = 500_000, 40_000
REPETITIONS, QUICK_REPETITIONS = 5, 3


def unit(count: int, seed: int) -> np.ndarray:
    """Float32[count D]."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_numpy(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """What `nearest_centroids` finds."""
    return np.concatenate([(part @ centroids.T).argmax(1) for part in np.array_split(vectors, 1 + len(vectors) // 16_384)])


def differing(found: np.ndarray, wanted: np.ndarray, scores: Callable[[np.ndarray], np.ndarray]) -> Any:
    """How much of it is not what was wanted. scores: answers -> their inner products."""
    apart = np.abs(scores(found) - scores(wanted))
    return {"share": float((found != wanted).mean()), "furthest_apart": float(apart.max())}


def measure(count: int, repetitions: int) -> dict[str, Any]:
    """Every device that is here."""
    vectors, queries, centroids = unit(count, 0).astype(np.float16), unit(QUERIES, 1), unit(CENTROIDS, 2)
    block = vectors[: count // 4].astype(np.float32)
    devices = {"torch, cpu": "cpu:0", **({"torch, cuda": "cuda"} if torch.cuda.is_available() else {})}
    searches: dict[str, Callable[[], Any]] = {"numpy": lambda: nearest(queries, vectors, NEAREST).rows}
    assigns: dict[str, Callable[[], Any]] = {"numpy": lambda: by_numpy(block, centroids)}
    for name, device in devices.items():
        searches[name] = lambda device=device: nearest(queries, vectors, NEAREST, device=device).rows
        assigns[name] = lambda device=device: nearest_centroids(block, centroids, device=device)
    rates = {name: matrix_rate(torch.float32, "cuda" if name.endswith("cuda") else "cpu") for name in searches}
    result: dict[str, Any] = {}
    for what, runs, rows, products, scores in (
        ("search", searches, count, QUERIES, lambda rows: np.einsum("qd,qkd->qk", queries, vectors[rows].astype(np.float32))),
        ("assign", assigns, len(block), CENTROIDS, lambda rows: np.einsum("nd,nd->n", block, centroids[rows])),
    ):
        found = {name: run() for name, run in runs.items()}
        seconds = alternate(runs, repetitions)
        result[what] = {
            name: {
                "rows_per_second": round(rows / seconds[name]),
                "share_of_matrix_rate": round(2 * rows * products * DIM / seconds[name] / rates[name], 3),
                "differ": differing(found[name], found["numpy"], scores),
            }
            for name in runs
        }
        result[what].setdefault("torch, cuda", NOT_RUN)
    return {"vectors": count, "dim": DIM, **result, "machine": machine()}


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="fewer vectors and repetitions")
    arguments = parser.parse_args()
    result = measure(*((QUICK_COUNT, QUICK_REPETITIONS) if arguments.quick else (COUNT, REPETITIONS)))
    text = json.dumps(result, indent=1)
    if arguments.json:
        write_atomic(arguments.json, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
