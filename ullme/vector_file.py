"""Tables of vectors in `.npy` files that are larger than memory: written block by block, read by rows or by ranges."""

from __future__ import annotations

import os
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np

from ullme.artifacts import settle, write_atomic
from ullme.errors import ArtifactError

__all__ = ["VectorFile", "VectorReader", "read_vectors"]


class VectorFile:
    """A `.npy` file [N D] that is written block by block, as plain writes: a mapped one would fill the memory.

    It has its name when it is closed, in one piece or not at all. rows: how many are written.
    """

    def __init__(self, file: Path, shape: tuple[int, int], dtype: type[np.floating], *, resume: bool = False) -> None:
        """dtype: float16 or float32. resume: go on after the last block that an interrupted attempt wrote whole."""
        self._file, self._dtype = file, np.dtype(dtype)
        self._partial = file.with_name(file.name + ".partial")
        marker = self._partial.with_suffix(".rows")
        self._marker = marker if resume else None
        self.rows = int(marker.read_text(encoding="ascii")) if resume and marker.is_file() and self._partial.is_file() else 0
        self._out = self._partial.open("r+b" if self.rows else "wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._out, header)
        self._out.seek(self.rows * shape[1] * self._dtype.itemsize, os.SEEK_CUR)
        self._out.truncate()

    def append(self, block: np.ndarray) -> None:
        """Add Float[n D]; with `resume`, it is on the disk when this returns."""
        self._out.write(np.ascontiguousarray(block, dtype=self._dtype).data)
        self.rows += len(block)
        if self._marker is not None:
            self._out.flush()
            os.fsync(self._out.fileno())
            write_atomic(self._marker, str(self.rows))

    def __enter__(self) -> VectorFile:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close it; an error leaves what was written for an attempt that goes on."""
        if error is None:
            self.close()
        else:
            self._out.close()

    def close(self) -> None:
        """Give the file its name."""
        self._out.close()
        settle(self._partial, self._file)
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)


def read_vectors(file: Path) -> np.ndarray:
    """What a `VectorFile` wrote, mapped into memory.

    Raises:
        ArtifactError: not such a file.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a table of vectors ({error}); build the index again") from error


class VectorReader:
    """Rows of a `.npy` file [N D], read when asked for: of a mapped one, what was read once stays in memory."""

    def __init__(self, file: Path) -> None:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype, self._offset = table.shape, table.dtype, table.offset
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Float[*n D]: the rows at Int64[*n], or those of a range."""
        if isinstance(rows, slice):
            return self._distinct(np.arange(*rows.indices(len(self))))
        wanted, places = np.unique(rows, return_inverse=True)
        return self._distinct(wanted)[places.reshape(rows.shape)]

    def _distinct(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.shape[1]), dtype=self.dtype)
        runs = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        for start, stop in pairwise([*runs, len(rows)]):
            self._read(int(rows[start]), found[start:stop])
        return found

    def _read(self, row: int, target: np.ndarray) -> None:
        left, place = memoryview(target.data).cast("B"), self._offset + row * target.strides[0]
        while len(left):
            read = os.preadv(self._file, [left], place)
            if not read:
                raise ArtifactError(f"a table of {self.shape[0]} vectors ends before vector {row + len(target) - 1}")
            left, place = left[read:], place + read
