"""The table of an index's rows: which document each stands for, a digest of its vector, and whether it is still there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexes._corpus import BLOCK_ROWS, DIGEST_BYTES
from ullme.artifacts import settle
from ullme.errors import ArtifactError
from ullme.neighbours import MISSING_ROW

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """ids: of N rows, in the order of the segments; digests: Bytes16[N] of their vectors; alive: Bool[N], False = deleted."""

    ids: Sequence[str]
    digests: np.ndarray
    alive: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[str], digests: np.ndarray) -> Rows:
        """All of them alive."""
        return cls(ids, digests, np.ones(len(ids), dtype=bool))

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, ids: Sequence[str], digests: np.ndarray) -> np.ndarray:
        """Int64[n]: the living row that holds each of these documents with the same vector; -1 where there is none."""
        import pyarrow as pa
        from pyarrow import compute

        look_up: Any = vars(compute)["index_in"]  # made when pyarrow is imported: not in its types
        living = np.flatnonzero(self.alive)
        known = pa.array([self.ids[row] for row in living.tolist()], type=pa.string())
        found = look_up(pa.array(ids, type=pa.string()), value_set=known).fill_null(MISSING_ROW)
        rows = np.asarray(found, dtype=np.int64)
        if not len(living):
            return rows
        rows = np.where(rows == MISSING_ROW, MISSING_ROW, living[rows])
        return np.where((rows != MISSING_ROW) & (self.digests[rows] == digests), rows, MISSING_ROW)

    def write(self, file: Path) -> None:
        """An Arrow IPC file, in one piece or not at all."""
        import pyarrow as pa

        fields = [pa.field("id", pa.string(), nullable=False), pa.field("vector", pa.binary(DIGEST_BYTES), nullable=False)]
        schema = pa.schema([*fields, pa.field("alive", pa.bool_(), nullable=False)])
        partial = file.with_name(file.name + ".partial")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(self), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                held = self.digests[part]
                digests = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(DIGEST_BYTES), len(held), [None, pa.py_buffer(held.tobytes())]
                )
                ids = pa.array(self.ids[part], type=pa.string())
                writer.write_batch(pa.record_batch([ids, digests, pa.array(self.alive[part])], schema=schema))
        settle(partial, file)

    @classmethod
    def read(cls, file: Path) -> Rows:
        """What `write` wrote, or a table of ids alone, as it was written once.

        Raises:
            ArtifactError: not such a file.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_file(source).read_all()
                ids = table.column("id").to_pylist()
                if "vector" not in table.column_names:
                    return cls.of(ids, np.zeros(len(ids), dtype=f"S{DIGEST_BYTES}"))
                digests = b"".join(table.column("vector").to_pylist())
                return cls(ids, np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}"), np.asarray(table.column("alive"), dtype=bool))
        except (pa.ArrowException, KeyError, OSError, TypeError) as error:
            raise ArtifactError(f"{file}: not a table of ids ({error}); build the index again") from error
