"""Centroids of inverted lists, learned and looked up with torch: the part of a build that a GPU makes short; no faiss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["found_device", "learned", "nearest_centroids"]

ROUNDS = 10
SCORES_AT_ONCE, POINTS_AT_ONCE = 2**28, 2**17
SPLIT = 1 / 1024
"""How far the halves of a split list move apart."""


def found_device() -> str | None:
    """The GPU that torch sees, or None."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def learned(points: np.ndarray, lists: int, *, seed: int, device: str) -> np.ndarray:
    """Float32[lists D]: centroids of Float32[n D] unit vectors, n >= lists, themselves of unit length.

    Spherical k-means (Dhillon and Modha 2001), ten rounds from points drawn by seed, as faiss learns them for inner products. A
    list that nobody is nearest to takes half of the largest. Sums are in float64: a GPU, which adds in no fixed order, gives the
    same centroids up to the last digit of float32.
    """
    import torch

    first = np.random.default_rng([seed, 2]).choice(len(points), size=lists, replace=False)
    centroids = torch.from_numpy(points[np.sort(first)]).to(device)
    for _ in range(ROUNDS):
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
        sizes = torch.zeros(lists, dtype=torch.int64, device=device)
        for start in range(0, len(points), POINTS_AT_ONCE):
            part = torch.from_numpy(points[start : start + POINTS_AT_ONCE]).to(device)
            nearest = _nearest(part, centroids)
            sums.index_add_(0, nearest, part.double())
            sizes += torch.bincount(nearest, minlength=lists)
        _split(sums, sizes)
        centroids = torch.nn.functional.normalize(sums, dim=1).float()
    return centroids.cpu().numpy()


def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, *, device: str) -> np.ndarray:
    """Int64[n]: the centroid with the highest inner product with each of Float32[n D]; of equal ones, any."""
    import torch

    found = _nearest(torch.from_numpy(vectors).to(device), torch.from_numpy(centroids).to(device))
    return found.cpu().numpy()


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    import torch

    rows = max(1, SCORES_AT_ONCE // len(centroids))
    return torch.cat([(part @ centroids.T).argmax(1) for part in points.split(rows)])


def _split(sums: Tensor, sizes: Tensor) -> None:
    """Give every empty list half of the largest one, in place."""
    import torch

    for empty in (sizes == 0).nonzero().flatten().tolist():
        largest = int(sizes.argmax())
        apart = torch.ones_like(sums[largest])
        apart[1::2] = -1
        apart *= SPLIT * sums[largest].abs().mean()
        sums[empty], sums[largest] = sums[largest] / 2 - apart, sums[largest] / 2 + apart
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
