"""Experiments of many runs: each in a process of its own, kept in a file beside the result when it has ended, never repeated."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from encode import machine

from ullme.artifacts import ArtifactRef, Store, write_atomic
from ullme.encoding import ENCODE, EncodeConfig
from ullme.evaluation import EVALUATE, EvalConfig
from ullme.heap import HEAP

__all__ = ["METRIC", "Runs", "evaluated", "experiment", "page_text", "scores_by_query"]

METRIC = "ndcg_at_10"


class Runs:
    """The runs of an experiment, one JSON line each.

    file: where they are kept; the first line says under which effort, and the ids of queries stand once, before the first run that
    has them. start: what starts a run, its name as JSON and a file for its row behind it. until: seconds on the monotonic clock
    after which none is started.

    Raises:
        SystemExit: the file holds runs of another effort.
    """

    def __init__(self, file: Path, start: Sequence[str], effort: Mapping[str, Any], until: float = float("inf")) -> None:
        self.file, self._start, self._until = file, start, until
        self._rows: dict[str, dict[str, Any]] = {}
        self._queries: dict[str, list[str]] = {}
        kept = json.loads(json.dumps(effort))
        if not file.is_file():
            self._append({"effort": kept})
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "effort" in line and line["effort"] != kept:
                raise SystemExit(f"{file}: expected runs of {kept}, got runs of {line['effort']}; move the file away to begin anew")
            self._take(line)

    def row(self, *name: Any) -> dict[str, Any] | None:
        """What a run found; it is made now where it is not there. None where no more runs are to be started."""
        key = json.dumps(name)
        if key not in self._rows:
            if time.monotonic() > self._until:
                return None
            self._make(key)
        row = self._rows[key]
        return {**row, "per_query": dict(zip(self._queries[row["queries"]], row["scores"], strict=True))}

    @property
    def hours(self) -> float:
        """What all runs took, until each was at its end."""
        return round(sum(row["seconds"] for row in self._rows.values()) / 3600, 2)

    def _make(self, key: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {', '.join(map(str, json.loads(key)))}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ullme-run-") as scratch:
            answer = Path(scratch) / "row.json"
            subprocess.run([*self._start, "--one", key, "--answer", str(answer)], check=True, env={**os.environ, **HEAP})
            row = json.loads(answer.read_text(encoding="utf-8"))
        seconds = time.monotonic() - started
        per_query = dict(sorted(row.pop("per_query").items()))
        queries = hashlib.sha256(json.dumps(list(per_query)).encode()).hexdigest()[:8]
        if queries not in self._queries:
            self._append({"queries": queries, "ids": list(per_query)})
        scores = [round(score, 4) for score in per_query.values()]
        self._append({"run": json.loads(key), "seconds": round(seconds), **row, "queries": queries, "scores": scores})
        print(f"  {seconds:.0f} s", flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "ids" in line:
            self._queries[line["queries"]] = line["ids"]
        elif "run" in line:
            self._rows[json.dumps(line["run"])] = line


def evaluated(store: Store, section: EvalConfig, inputs: Mapping[str, ArtifactRef]) -> ArtifactRef:
    """The report on inputs (data, and a model where there is one); the vectors that it needs are deleted when it is there."""
    if "model" not in inputs:
        return store.produce(EVALUATE, section, inputs, seed=0)
    embeddings = store.produce(ENCODE, EncodeConfig(), inputs, seed=0)
    report = store.produce(EVALUATE, section, {**inputs, "embeddings": embeddings}, seed=0)
    shutil.rmtree(embeddings.path)
    return report


def scores_by_query(report: ArtifactRef) -> dict[str, float]:
    """METRIC of the retrieval task by exact search, for each question's id."""
    import pyarrow.parquet as pq

    wanted = [("task", "=", "retrieval"), ("metric", "=", METRIC)]
    rows = pq.read_table(report.path / "per_query.parquet", filters=wanted).to_pylist()
    return {row["query_id"]: row["exact"] for row in rows}


def around_tables(file: Path, name: str) -> tuple[str, str]:
    """What stands before and behind the tables of this name: up to its first mark, and from its second.

    Raises:
        SystemExit: no such page, or it lacks the marks.
    """
    start, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    if start not in page or end not in page:
        raise SystemExit(f"{file}: expected a page with the marks {start.strip()} and {end} to write the tables between")
    return page.partition(start)[0] + start, end + page.partition(end)[2]


def page_text(result: Mapping[str, Any], tables: Callable[[Mapping[str, Any]], str]) -> str:
    """What stands between the marks: the tables, and where and how long."""
    where = result["machine"]
    return f"{tables(result)}\n\n{result['hours']} hours on {where['cpu']}, {where['threads']} threads, {where['date']}.\n"


def experiment(
    script: str,
    description: str | None,
    *,
    efforts: tuple[Any, Any],
    bench: Callable[[Path, Any, Path | None], Any],
    everything: Callable[[Runs, Any], Iterator[Mapping[str, Any]]],
    tables: Callable[[Mapping[str, Any]], str],
) -> None:
    """The command line of an experiment: run what is missing, print, and write JSON and tables after every part.

    efforts: dataclasses of what the runs of one file have in common, in full and for --quick; bench: (folder to work in, effort,
    --data) -> what makes one run, in a process of its own, by `run(*name)`; everything: what is known so far, part by part; tables:
    that in Markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the collections; what needs them is otherwise left out")
    parser.add_argument("--work", type=Path, help="folder of models and data between starts (default: one that is deleted)")
    parser.add_argument("--json", type=Path, help="write the result to this file, and beside it, as .runs.jsonl, every run")
    parser.add_argument("--write", type=Path, help="write the tables into this page")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after so long; start again to go on")
    parser.add_argument("--quick", action="store_true", help="a few queries and steps of a part of it: does it run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    effort, name = efforts[arguments.quick], Path(script).stem
    if arguments.write:
        around_tables(arguments.write, name)  # before hours of runs
    if arguments.one:
        row = bench(arguments.work, effort, arguments.data).run(*json.loads(arguments.one))
        arguments.answer.write_text(json.dumps(row), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(prefix="ullme-experiment-") as scratch:
        folder = arguments.work or Path(scratch)
        start = [sys.executable, script, "--work", str(folder), *(["--quick"] if arguments.quick else [])]
        start += ["--data", str(arguments.data)] if arguments.data else []
        file = arguments.json.with_suffix(".runs.jsonl") if arguments.json else folder / "runs.jsonl"
        runs = Runs(file, start, vars(effort), time.monotonic() + 3600 * arguments.hours)
        text = ""
        for part in everything(runs, bench(folder, effort, arguments.data)):
            result = {"effort": vars(effort), "machine": machine(), **part, "hours": runs.hours}
            text = page_text(result, tables)
            if arguments.json:
                write_atomic(arguments.json, json.dumps(result, indent=1) + "\n")
            if arguments.write:
                before, behind = around_tables(arguments.write, name)
                write_atomic(arguments.write, before + text + behind)
        print(text)
