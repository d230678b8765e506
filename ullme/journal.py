"""A file of JSON lines that a long piece of work adds to, so that an interrupted attempt is gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ullme.artifacts import write_atomic

__all__ = ["Journal"]


class Journal:
    """entries: all in order, those of an earlier attempt first."""

    def __init__(self, file: Path) -> None:
        """A line that was not finished is taken away."""
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            write_atomic(file, "".join(lines))
        self.entries: list[Any] = [json.loads(line) for line in lines]
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("a", encoding="utf-8")

    def append(self, entry: Any) -> None:
        """Add one; it is on the disk when this returns."""
        self._out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._out.flush()
        os.fsync(self._out.fileno())
        self.entries.append(entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
