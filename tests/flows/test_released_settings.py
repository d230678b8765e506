"""The shipped settings of ULLME: what they say, how they differ, and that each of them plans and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import _ullme_app, dispatch
from flows.config import RunConfig, load
from flows.stage import STAGES
from ullme.artifacts import Store

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STRATEGIES = ("grl", "cl", "sft", "dpo")
BACKBONES = {
    "phi-1_5": ("microsoft/phi-1_5", 1e-4, "tiny:phi"),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", 2e-4, "tiny:mistral"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 2e-4, "tiny:llama"),
}
NAMES = [f"{strategy}-{backbone}" for strategy in STRATEGIES for backbone in BACKBONES]
TERMS = {
    "grl": {"contrastive", "preference", "kl"},
    "cl": {"contrastive"},
    "sft": {"contrastive", "sft"},
    "dpo": {"contrastive", "preference"},
}


def settings(name: str, *changes: str) -> RunConfig:
    return load(CONFIGS / f"{name}.yaml", changes)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the one that the files name: Parquet with query, positive and negative."""
    folder = tmp_path_factory.mktemp("triplet")
    words = [f"{first}{second}" for first in ("ka", "lo", "mi", "ne", "pu") for second in ("ra", "so", "ti", "va", "zu", "be")]
    passages = [f"the {word} is what number {place} asks about" for place, word in enumerate(words)]
    columns = {"query": [f"what is {word}" for word in words], "positive": passages, "negative": passages[7:] + passages[:7]}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
    return folder


# What they say


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_released_ones(name: str) -> None:
    config, (model, learning_rate, _) = settings(name), BACKBONES[name.partition("-")[2]]
    (phase,) = config.training.phases
    adapter = config.training.adapter
    assert adapter is not None
    assert (config.backbone.model, phase.learning_rate) == (model, learning_rate)
    assert (phase.batch_size, phase.steps, phase.schedule, phase.warmup_share) == (512, 500, "cosine", 0.1)
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (16, 32, 0.1, "all-linear")
    backbone = config.backbone
    assert (backbone.attention, backbone.pooling, backbone.pool_prompt, backbone.max_tokens) == (
        "bidirectional",
        "mean",
        False,
        512,
    )
    assert phase.generation.score == "passage_given_query"
    assert backbone.revision is None  # for the user to name
    objective: Any = phase.objective
    if name.startswith("grl"):
        assert (objective.contrastive_weight, objective.preference_weight, objective.kl_weight) == (1.0, 0.5, 1.0)
    elif name.startswith("cl"):
        assert objective.kind == "contrastive"
    else:
        kinds = [(part.objective.kind, part.weight) for part in objective.parts]
        assert kinds == [("contrastive", 1.0), ("sft" if name.startswith("sft") else "preference", 0.5)]


def without(config: RunConfig, *places: str) -> dict[str, Any]:
    """The plain form, less what stands at these places."""
    plain = config.as_json()
    for place in places:
        *path, last = place.split(".")
        here: Any = plain
        for part in path:
            here = here[int(part)] if part.isdigit() else here[part]
        del here[last]
    return plain


@pytest.mark.parametrize("name", NAMES)
def test_files_differ_in_their_strategy_or_their_backbone_and_in_nothing_else(name: str) -> None:
    strategy, _, backbone = name.partition("-")
    objective = ("training.phases.0.objective", "training.phases.0.generation", "tracking.model_name")
    llm = ("backbone.model", "training.phases.0.learning_rate", "tracking.model_name")
    assert settings(name).tracking.model_name == name
    assert without(settings(name), *objective) == without(settings(f"grl-{backbone}"), *objective)
    assert without(settings(name), *llm) == without(settings(f"{strategy}-phi-1_5"), *llm)


# What they do


def dry_run(name: str, *changes: str) -> int:
    command = ["run", "train-and-index", "--config", str(CONFIGS / f"{name}.yaml"), "--dry-run"]
    return dispatch(_ullme_app(), [*command, *(word for change in changes for word in ("--set", change))])


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_needs_the_data_and_no_hub(
    name: str, triplets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert dry_run(name, f"data.source.path={triplets}", f"store={tmp_path}/store") == 0
    said = capsys.readouterr().out
    assert f"model: {BACKBONES[name.partition('-')[2]][0]}" in said
    assert "# train" in said
    assert not (tmp_path / "store").exists()


def test_without_the_data_there_is_one_line_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dry_run("grl-phi-1_5") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("data/msmarco/triplet: expected a Parquet file, found nothing there; check the path in data.source\n")


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_on_a_tiny_model_of_the_architecture(name: str, triplets: Path, tmp_path: Path) -> None:
    strategy, _, backbone = name.partition("-")
    config = settings(
        name,
        f"data.source.path={triplets}",
        f"backbone.model={BACKBONES[backbone][2]}",
        "backbone.dtype=float32",
        "backbone.max_tokens=64",
        "mining.miner.num_negatives=2",
        "mining.miner.skip_top=1",
        "mining.miner.depth=8",
        "training.phases.0.steps=2",
        "training.phases.0.batch_size=4",
        "training.phases.0.num_negatives=2",
        "training.phases.0.generation.passage_tokens=16",
        "training.runtime.chunk_tokens=256",
    ).resolved()
    store = Store(tmp_path / "store")
    data = store.produce(STAGES["data"].stage, config.data, {}, seed=0)
    model = store.produce(STAGES["backbone"].stage, config.backbone, {}, seed=0)
    negatives = store.produce(STAGES["mine"].stage, config.mining, {"data": data}, seed=0)
    trained = store.produce(STAGES["train"].stage, config.training, {"data": data, "model": model, "negatives": negatives}, seed=0)
    rows = [json.loads(line) for line in (trained.path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert {key.partition("/")[2] for key in row if key.startswith("loss/")} == TERMS[strategy]
    adapter = json.loads((trained.path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.1)
