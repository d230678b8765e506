"""What the README shows must be true: its YAML loads, its tree names real files, its numbers are those of the kept run."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.config import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_yaml_for_your_own_corpus_is_a_valid_configuration(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(block, encoding="utf-8")
    assert load(file).data.source.kind == "beir"


@pytest.mark.parametrize("name", ["quickstart", "smoke", "reference"])
def test_every_shipped_configuration_loads(name: str) -> None:
    assert load(ROOT / "configs" / f"{name}.yaml").training.phases


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ullme import Encoder

    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Encoder.load("tiny:llama", device="cpu").shortened(64).save("my-model")
    names: dict[str, Any] = {}
    exec(block, names)
    assert capsys.readouterr().out.startswith("[[")
    assert (names["documents"].shape, names["codes"].shape, names["codes"].dtype) == ((2, 64), (2, 64), np.dtype("int8"))
    assert np.array_equal(Encoder.load("my-embedder").encode(["parse JSON"]), names["queries"])


def test_every_file_of_the_tree_exists() -> None:
    tree = README.rpartition("```\n\nLicence")[0].rpartition("```\n")[2]
    folder, missing = "", []
    for line in tree.splitlines():
        names = line[:34].split() if len(line) > 34 else line.split()
        if names and not line.startswith(" ") and names[0].endswith("/"):
            folder = names[0]
            missing += [] if (ROOT / folder).is_dir() else [folder]
        for name in names:
            place = ROOT / folder / name if line.startswith(" ") else ROOT / name
            if not place.exists():
                missing.append(str(place.relative_to(ROOT)))
    assert not missing


def test_the_speeds_shown_are_those_that_were_kept() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    kept = json.loads((results / "encode.json").read_text(encoding="utf-8"))
    assert not kept["quick"]
    for corpus in ("pydocs", "scifact"):
        assert f"{kept[corpus]['ratio_defaults']:.2f} times" in page
        for dtype in ("bfloat16", "float32"):
            cell = kept[corpus][dtype]
            speed = cell["tokens_per_s"]
            ratios = f"{cell['ratio_equal_dtype']:.2f} | {cell['ratio_bare_trunk']:.2f}"
            batches = f"(batches of {cell['peer_batch_size']})"
            assert f"| {corpus}, {dtype} | {speed['ours']:,} | {speed['peer']:,} {batches} | {ratios} |" in page
        for who in ("ours-bfloat16", "peer-bfloat16"):
            error = kept[corpus]["error"][who]
            assert f"| {error['median']:.1e} | {error['percentile_1']:.1e} |" in page
    assert f"takes {kept['pydocs']['ratio_equal_dtype']:.1f} times" in README
    assert f"{kept['scifact']['ratio_equal_dtype']:.1f} times (abstracts)" in README
    memory = json.loads((results / "encode_memory.json").read_text(encoding="utf-8"))
    assert f"{memory['bytes_per_document']:.0f} bytes of resident memory" in page
    assert f"{memory['documents_per_s']:,} documents per second" in page


def test_the_speed_of_mining_shown_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "benchmarks" / "results" / "mine.json").read_text(encoding="utf-8"))
    assert f"({kept['queries']:,} queries, {kept['documents']:,} commands)" in page
    scratch, cached = kept["seconds_scratch"], kept["seconds_cached"]
    assert f"| from texts | {scratch['ours']} | {scratch['theirs']} | {kept['ratio_scratch']:.2f} |" in page
    best = min(cached["theirs"], cached["theirs, faiss"])
    assert f"| vectors there | {cached['ours']} | {best} | {kept['ratio_cached']:.2f} |" in page
    assert f"({kept['agreement']['float32']['same']:.1%})" in page
    assert f"those of {kept['agreement']['float16']['same']:.1%}" in page


def test_the_indexes_shown_are_those_that_were_measured() -> None:
    page = (ROOT / "docs" / "indexes.md").read_text(encoding="utf-8")
    for name in ("index", "index_large"):
        kept = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert f"{kept['vectors']:,} vectors" in page
        assert not kept.get("beaten_by")
        for kind, row in kept["rows"].items():
            cells = (f"{row['recall_at_10']:.3f}", f"{row['recall_at_100']:.3f}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}",
                     f"{row['p50_ms_of_32']:.1f}", f"{row['bytes_per_vector']:,.0f}", f"{row['build_seconds']:.0f}")  # fmt: skip
            assert f"| {kind} | {' | '.join(cells)} |" in page


EXPERIMENTS = [
    ("results", "strategies"),
    ("papers", "papers"),
    ("unsupervised", "unsupervised"),
    ("false_negatives", "false_negatives"),
]


@pytest.mark.parametrize(("script", "file"), EXPERIMENTS)
def test_the_tables_of_experiments_are_those_of_the_kept_runs(script: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program, runs = importlib.import_module(script), importlib.import_module("runs")
    kept = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))
    before, behind = runs.around_tables(ROOT / "docs" / "results.md", script)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == before + runs.page_text(kept, program.tables) + behind


def test_the_quickstart_trains_as_the_best_grl_and_says_what_contrastive_learning_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("results")
    kept = json.loads((ROOT / "benchmarks" / "results" / "strategies.json").read_text(encoding="utf-8"))
    best = kept["screen"]["best_grl"]
    strategy = next(one for one in program.SCREEN if one.name == best)
    config = load(ROOT / "configs" / "quickstart.yaml")
    phase = config.training.phases[1]
    assert strategy.objective.items() <= phase.objective.model_dump().items()
    assert strategy.generation.items() <= phase.generation.model_dump().items()
    for collection, part in kept["confirmation"].items():
        row, plain = part["rows"][best], part["rows"][program.CL.name]
        said = f"{row['mean']:.3f} on {collection}, contrastive learning alone {plain['mean']:.3f} "
        assert said + f"({row['over_cl']:+.3f}, p {row['p']:.3f})" in config.tracking.description


def test_the_memory_of_mining_shown_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "benchmarks" / "results" / "mine_memory.json").read_text(encoding="utf-8"))
    assert [row["documents"] for row in kept["cached"]["runs"]] == [10_000, 100_000, 300_000]
    assert f"grows by {kept['cached']['bytes_per_document']:.0f} bytes a document" in page
    assert f"by {kept['scratch']['bytes_per_document']:.0f} where they are encoded" in page
    assert max(kept[way]["share_of_vectors"] for way in ("cached", "scratch")) <= 0.1


def test_the_scores_shown_are_those_of_the_kept_run() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    for system in ("base", "tuned", "bm25"):
        for value in kept["scores"][system]["retrieval"].values():
            assert f"{value:.3f}" in README
    assert f"{kept['seconds']:.0f} s in all" in README


def test_the_costs_of_a_training_step_shown_are_those_that_were_kept() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text(encoding="utf-8"))
    assert not kept["quick"]
    step = kept["contrastive"]
    for who in ("ours", "theirs"):
        cells = (step["tokens_per_s"][who], step["seconds"][who], f"{step['peak_memory_mb'][who]:,} MiB", step["best"][who])
        assert f"| {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} a pass |" in page
    before = json.loads((ROOT / "benchmarks" / "results" / "train_float32.json").read_text(encoding="utf-8"))
    for contrastive in (step, before["contrastive"]):
        assert f"{contrastive['ratio_speed']:.2f} times the speed, {contrastive['ratio_memory']:.2f} of the memory" in page
    assert f"it was {before['grl']['ratio_grl_over_cl']:.2f}" in page
    seconds = kept["grl"]["seconds"]
    for name, value in seconds.items():
        assert f"| {name} | {value} | {value / seconds['contrastive']:.2f} |" in page
