"""A refresh of a corpus that changed by 1%: only what is new is encoded, deleted ones are gone, the former version still opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.refresh import Bench, Change, write
from flows.registry import Registry
from flows.tracking import TrackingConfig
from ullme.artifacts import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_of_1500_functions_only_the_25_that_are_new_or_changed_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny random model; `benchmarks/refresh.py` does the same with a real one and measures the time."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    change = Change.of(1500, edited=15, deleted=5, added=10)
    bench = Bench(tmp_path, change, model="tiny:llama", steps=2, queries=40)
    write(bench.roots, change.before)
    full = bench.run("train-and-index")
    registry = Registry.at(TrackingConfig(model_name="refresh"), tmp_path / "store")
    registry.crown(registry.versions()[0], why="a random model may not beat its base model")
    assert full["texts_encoded"] == 1500
    write(bench.roots, change.after)
    refreshed = bench.run("refresh")
    assert refreshed["texts_encoded"] == 25
    assert list(refreshed["stages"]) == ["data", "encode tuned", "index", "evaluate tuned", "promote"]
    assert 1480 <= Store(tmp_path / "store").finished("index")[0].meta["taken_over"] < 1495  # some edits lie beyond max_tokens
    assert refreshed["released"]["champion"], refreshed["released"]["why"]
    before, now = full["released"]["version"], refreshed["released"]["version"]
    assert bench.found(now, change.deleted, before) == {"sought": 5, "held": 0, "found_first": 0}
    assert bench.found(before, change.deleted, before) == {"sought": 5, "held": 5, "found_first": 5}
    assert bench.found(now, change.added, now) == {"sought": 10, "held": 10, "found_first": 10}
    assert bench.found(now, change.edited, now) == {"sought": 15, "held": 15, "found_first": 15}
    again = bench.run("refresh")
    assert "nothing new" in again["nothing_new"]
    assert again["seconds"] < 20
