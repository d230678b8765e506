"""Vectors in files: written in blocks, gone on with after a crash, read as numpy would."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from ullme.errors import ArtifactError
from ullme.neighbours import nearest
from ullme.vector_file import VectorFile, VectorReader

VECTORS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def write(file: Path, dtype: type[np.floating] = np.float32) -> Path:
    out = VectorFile(file, VECTORS.shape, dtype)
    for start in range(0, 50, 7):
        out.append(VECTORS[start : start + 7])
    assert not file.exists()
    out.close()
    return file


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_it_is_a_plain_npy_file(tmp_path: Path, dtype: type[np.floating]) -> None:
    file = write(tmp_path / "v.npy", dtype)
    np.testing.assert_array_equal(np.load(file), VECTORS.astype(dtype))
    assert list(tmp_path.iterdir()) == [file]


def test_rows_and_ranges_are_read_as_numpy_does(tmp_path: Path) -> None:
    reader = VectorReader(write(tmp_path / "v.npy"))
    assert len(reader) == 50
    for rows in ([], [3], [3, 4, 5], [49, 0, 3, 3, 4], [[1, 2], [2, 9]], range(50)):
        places = np.array(rows, dtype=np.int64)
        np.testing.assert_array_equal(reader[places], VECTORS[places])
    for part in (slice(0, 5), slice(45, 90), slice(7, 7), slice(None)):
        np.testing.assert_array_equal(reader[part], VECTORS[part])


def test_the_nearest_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    reader = VectorReader(write(tmp_path / "v.npy"))
    queries = np.random.default_rng(1).normal(size=(600, 6)).astype(np.float32)  # more than one tile
    found, expected = nearest(queries, reader, 9, block=8), np.argsort(-(queries @ VECTORS.T), axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.rows, expected)


def interrupt(file: Path, torn: int) -> None:
    """Two blocks, and some bytes of a third."""
    with contextlib.suppress(InterruptedError), VectorFile(file, VECTORS.shape, np.float16, resume=True) as first:
        first.append(VECTORS[:7])
        first.append(VECTORS[7:14])
        first._out.write(b"x" * torn)
        raise InterruptedError


@pytest.mark.parametrize("torn", [0, 1, 10_000])
def test_an_interrupted_attempt_is_gone_on_with(tmp_path: Path, torn: int) -> None:
    file = tmp_path / "v.npy"
    interrupt(file, torn)
    with VectorFile(file, VECTORS.shape, np.float16, resume=True) as again:
        assert again.rows == 14
        again.append(VECTORS[14:])
    np.testing.assert_array_equal(np.load(file), VECTORS.astype(np.float16))
    assert list(tmp_path.iterdir()) == [file]


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "v.npy"
    interrupt(file, 100)
    write(file, np.float16)
    np.testing.assert_array_equal(np.load(file), VECTORS.astype(np.float16))


def test_a_file_that_ends_too_early_is_said_to(tmp_path: Path) -> None:
    file = write(tmp_path / "v.npy")
    reader = VectorReader(file)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 5)
    with pytest.raises(ArtifactError, match="ends before vector 49"):
        reader[40:]
