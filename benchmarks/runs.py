"""Experiments of many runs: each in a process of its own, kept when it has ended, and never repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullme.artifacts import write_atomic

__all__ = ["Runs", "write_tables"]


@dataclass(frozen=True)
class Runs:
    """folder: where a row per run is kept. script, arguments: what a run is started with, `--one NAME` behind them."""

    folder: Path
    script: str
    arguments: Sequence[str]

    def file(self, name: Sequence[Any]) -> Path:
        """Where the row of a run is kept."""
        text = "-".join(map(str, name))
        slug = "".join(character if character.isalnum() or character in ".-" else "_" for character in text)
        return self.folder / "rows" / f"{slug}.json"

    def keep(self, name: Sequence[Any], row: Any) -> None:
        """A run has ended."""
        file = self.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(row))

    def row(self, *name: Any) -> Any:
        """What a run found; it is made now where it is not there."""
        file = self.file(name)
        if not file.is_file():
            print(f"{time.strftime('%H:%M:%S')} {', '.join(map(str, name))}", flush=True)
            started = time.monotonic()
            try:
                subprocess.run([sys.executable, self.script, *self.arguments, "--one", json.dumps(name)], check=True)
            finally:
                seconds = time.monotonic() - started
                write_atomic(self.folder / "spent.json", json.dumps(round(self.spent() + seconds, 1)))
            print(f"  {seconds:.0f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def spent(self) -> float:
        """Seconds of all runs, also of those that were interrupted."""
        file = self.folder / "spent.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0


def write_tables(file: Path, name: str, text: str) -> None:
    """Put tables between the page's two marks of this name.

    Raises:
        SystemExit: it has none.
    """
    page = file.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if start not in page or end not in page:
        raise SystemExit(f"{file}: expected the marks {start.strip()} and {end} to write the tables between")
    write_atomic(file, page.partition(start)[0] + start + text + end + page.partition(end)[2])
