"""Smaller embeddings: Matryoshka truncation, scalar codes with calibrated ranges, and bits. Pure functions over vectors.

    truncate    float [N D]                -> float [N dim], unit norm again
    quantise    float [N D], int8, uint8   -> codes [N D]: 255 steps between the lowest and highest value of each dimension
    quantise    float [N D], binary        -> packed signs [N ceil(D/8)], one bit a dimension (`ubinary`: the same as uint8)
    dequantise  what came of them          -> float32 [N D], to score with

Codes equal those of `sentence_transformers.util.quantize_embeddings` bit by bit, so an index of either reads the other's. A model
keeps its meaning under truncation only where it was trained for it (Matryoshka representation learning, arXiv 2205.13147).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from ullme.artifacts import write_atomic
from ullme.components import did_you_mean
from ullme.errors import ArtifactError, ContractError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CALIBRATION_FILE", "CALIBRATION_VECTORS", "Calibration", "Precision", "dequantise", "quantise", "truncate"]

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
SCALAR, BITS = ("int8", "uint8"), ("binary", "ubinary")
STEPS = 255
SIGN = 128
"""What signed codes are less than unsigned ones."""
CALIBRATION_FILE = "calibration.json"
CALIBRATION_VECTORS = 100
"""The fewest vectors that ranges are learned from; of fewer, most new texts lie outside somewhere."""
SMALLEST_NORM = 1e-12

Vectors = TypeVar("Vectors", np.ndarray, "Tensor")


@dataclass(frozen=True, eq=False)
class Calibration:
    """The range of every dimension: what the 255 steps of int8 and uint8 are spread over.

    low, high: Float32[D]. vectors: how many they were learned from.
    """

    low: np.ndarray
    high: np.ndarray
    vectors: int

    def __post_init__(self) -> None:
        low, high = (np.array(values, dtype=np.float32) for values in (self.low, self.high))
        if low.ndim != 1 or low.shape != high.shape or not len(low):
            raise ContractError(
                f"calibration: expected low and high of one shape [D], got {list(low.shape)} and {list(high.shape)}; learn it again"
            )
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise ContractError("calibration: expected finite ranges with low <= high in every dimension; learn it again")
        for name, values in (("low", low), ("high", high)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @classmethod
    def learn(cls, vectors: np.ndarray | Tensor) -> Calibration:
        """The lowest and highest value of each dimension among `vectors` [N D]: documents like those to come.

        Raises:
            ContractError: fewer than 100 vectors, of another shape, or not finite.
        """
        rows = _checked(vectors)
        if len(rows) < CALIBRATION_VECTORS:
            raise ContractError(
                f"calibration: expected at least {CALIBRATION_VECTORS} vectors to learn ranges from, got {len(rows)}; encode more "
                "documents, or use precision binary, which needs none"
            )
        return cls(rows.min(axis=0), rows.max(axis=0), len(rows))

    @property
    def dim(self) -> int:
        """Length of the vectors that it is for."""
        return len(self.low)

    @property
    def ranges(self) -> np.ndarray:
        """Float32[2 D], as sentence-transformers takes it."""
        return np.stack([self.low, self.high])

    @property
    def steps(self) -> np.ndarray:
        """Float32[D]: width of one step; 1 in a dimension that never changed."""
        steps = (self.high - self.low) / STEPS
        return np.where(steps == 0, np.float32(1), steps)

    def save(self, folder: Path) -> None:
        """Write `calibration.json` into the folder of the model, or index, that it belongs to."""
        content = {"low": self.low.tolist(), "high": self.high.tolist(), "vectors": self.vectors}
        write_atomic(folder / CALIBRATION_FILE, json.dumps(content) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """What `save` wrote into a folder.

        Raises:
            ArtifactError: not there, or damaged.
        """
        file = folder / CALIBRATION_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(content["low"], content["high"], int(content["vectors"]))
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder}: no {CALIBRATION_FILE}; learn ranges from some vectors first: Calibration.learn"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, ContractError) as error:
            raise ArtifactError(f"{file}: cannot be read as ranges ({error}); learn them again: Calibration.learn") from error


def truncate(vectors: Vectors, dim: int) -> Vectors:
    """The first `dim` values of each vector, scaled to norm 1; [..., D] -> [..., dim]. A tensor keeps its gradient.

    Raises:
        ContractError: dim is less than 1 or more than D.
    """
    width = vectors.shape[-1]
    if not 1 <= dim <= width:
        raise ContractError(f"dim: expected 1 to {width}, the length of the model's vectors, got {dim}")
    if dim == width:
        return vectors
    cut: Any = vectors[..., :dim]
    return cut / (cut * cut).sum(-1)[..., None].clip(min=SMALLEST_NORM**2) ** 0.5


def quantise(vectors: np.ndarray | Tensor, precision: Precision, calibration: Calibration | None = None) -> np.ndarray:
    """Float [N D] -> int8 or uint8 [N D], or packed signs [N ceil(D/8)] (int8 for binary, uint8 for ubinary).

    A value outside the calibrated range gets the nearest code that there is. Binary: 1 where a value is above 0; the last byte
    is filled with zeros where D is no multiple of 8.

    Raises:
        ContractError: an unknown precision, vectors that are not finite [N D], or a calibration that is missing or of another dim.
    """
    _check_precision(precision)
    rows = _checked(vectors)
    if precision == "float32":
        return rows
    if precision in BITS:
        bits = np.packbits(rows > 0, axis=-1)
        return bits if precision == "ubinary" else _signed(bits)
    ranges = _fitting(precision, calibration, rows.shape[1])
    codes = np.clip(np.floor((rows - ranges.low) / ranges.steps), 0, STEPS).astype(np.uint8)
    return codes if precision == "uint8" else _signed(codes)


def dequantise(
    codes: np.ndarray, precision: Precision, calibration: Calibration | None = None, *, dim: int | None = None
) -> np.ndarray:
    """What `quantise` gave -> float32 [N D]: the middle of each step; of bits, +-1/sqrt(D), a vector of norm 1.

    Codes keep one bit or one step a value, so this is not what was quantised: within the ranges it is at most half a step off.
    dim: D of bits, where it is no multiple of 8.

    Raises:
        ContractError: codes of another shape, type or dim than expected.
    """
    _check_precision(precision)
    signed, kind = precision in ("int8", "binary"), precision
    expected = np.float32 if kind == "float32" else np.int8 if signed else np.uint8
    if codes.ndim != 2 or codes.dtype != expected:
        raise ContractError(
            f"dequantise: expected {np.dtype(expected)} codes [N D] of precision {kind}, got {codes.dtype} {list(codes.shape)}"
        )
    if kind == "float32":
        return codes
    unsigned = (codes.astype(np.int16) + SIGN).astype(np.uint8) if signed else codes
    if kind in BITS:
        width = 8 * codes.shape[1] if dim is None else dim
        if not 8 * (codes.shape[1] - 1) < width <= 8 * codes.shape[1]:
            raise ContractError(
                f"dequantise: {codes.shape[1]} bytes of bits hold up to {8 * codes.shape[1]} dimensions, not {width}"
            )
        signs = np.unpackbits(unsigned, axis=-1, count=width).astype(np.float32)
        return (2 * signs - 1) / np.float32(np.sqrt(width))
    ranges = _fitting(kind, calibration, codes.shape[1])
    return ranges.low + (unsigned.astype(np.float32) + np.float32(0.5)) * ranges.steps


def _signed(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) - SIGN).astype(np.int8)


def _check_precision(precision: str) -> None:
    allowed = get_args(Precision)
    if precision not in allowed:
        raise ContractError(f"precision: expected {', '.join(allowed)}, got '{precision}'{did_you_mean(precision, allowed)}")


def _checked(vectors: np.ndarray | Tensor) -> np.ndarray:
    """Float32[N D], finite."""
    rows = vectors if isinstance(vectors, np.ndarray) else vectors.detach().float().cpu().numpy()
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise ContractError(f"precision: expected float vectors [N D], got {rows.dtype} {list(rows.shape)}")
    rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        broken = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ContractError(f"precision: vector {broken} is not finite; it cannot be quantised, look at what was encoded there")
    return rows


def _fitting(precision: str, calibration: Calibration | None, dim: int) -> Calibration:
    if calibration is None:
        raise ContractError(
            f"precision {precision} needs the ranges of the vectors: give a calibration, Calibration.learn(vectors) of at least "
            f"{CALIBRATION_VECTORS} documents"
        )
    if calibration.dim != dim:
        raise ContractError(
            f"precision {precision}: the calibration is of dim {calibration.dim}, the vectors of dim {dim}; learn one from vectors "
            "of this model, truncated alike"
        )
    return calibration
