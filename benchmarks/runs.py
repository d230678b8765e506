"""Experiments of many runs: each in a process of its own, kept when it has ended, and never repeated."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullme.artifacts import write_atomic

__all__ = ["Runs", "experiment"]


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


def experiment(
    script: str,
    description: str | None,
    *,
    run: Callable[[argparse.Namespace, Path, Sequence[Any]], Any],
    everything: Callable[[argparse.Namespace, Path, Runs], Iterator[Mapping[str, Any]]],
    tables: Callable[[Mapping[str, Any]], str],
) -> None:
    """The command line of an experiment: run what is missing, print, and write JSON and tables after every part.

    run: one run by its name, in a process of its own; everything: what is known so far, part by part.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the collections; what needs them is otherwise left out")
    parser.add_argument("--work", type=Path, help="folder of what is kept between starts (default: one that is deleted)")
    parser.add_argument("--json", type=Path, help="write the result to this file, after every part")
    parser.add_argument("--write", type=Path, help="write the tables into this page")
    parser.add_argument("--quick", action="store_true", help="a few queries and steps of a part of it: does it run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ullme-experiment-") as scratch:
        folder = arguments.work or Path(scratch)
        again = ["--work", str(folder), *(["--quick"] if arguments.quick else [])]
        again += ["--data", str(arguments.data)] if arguments.data else []
        runs = Runs(folder, script, again)
        if arguments.one:
            name = json.loads(arguments.one)
            runs.keep(name, run(arguments, folder, name))
            return
        text = ""
        for result in everything(arguments, folder, runs):
            text = tables(result)
            if arguments.json:
                write_atomic(arguments.json, json.dumps(result, indent=1) + "\n")
            if arguments.write:
                write_tables(arguments.write, Path(script).stem, text)
        print(text)
