"""What of a model folder is published, and what never is. Uploading itself: tests/flows/test_push.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ullme.errors import ArtifactError, ConfigError
from ullme.publishing import Repository, contents, model_fingerprint, needs_trust, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as the store has it."""
    settings = {"base": "/home/ann/llm@0123", "max_tokens": 64, "prompts": {"query": "/home/ann: ", "document": ""}}
    files = {
        "model.safetensors": "weights",
        "ullme.json": json.dumps(settings),
        "config.json": json.dumps({"model_type": "llama"}),
        "tokenizer.json": json.dumps({"base": "/usr/bin"}),
        "1_Pooling/config.json": "{}",
        "manifest.json": json.dumps({"uri": "/home/ann/.store"}),
        "logs/metrics.jsonl": "{}",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": "/home/ann/llm"}),
        "adapter/README.md": "base_model: /home/ann/llm",
    }
    for name, text in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    return tmp_path / "model"


def test_what_the_store_keeps_beside_a_model_is_not_published(folder: Path) -> None:
    assert sorted(contents(folder)) == [
        "1_Pooling/config.json",
        "adapter/adapter_config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "ullme.json",
    ]


def test_only_fields_that_name_a_place_are_changed(folder: Path, tmp_path: Path) -> None:
    files = contents(folder)
    assert {name for name, file in files.items() if isinstance(file, bytes)} == {"adapter/adapter_config.json", "ullme.json"}
    before = json.loads((folder / "ullme.json").read_text())
    write_folder(files, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "ullme.json").read_text()) == {**before, "base": "llm@0123"}
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "/home" not in (tmp_path / "copy" / "adapter" / "adapter_config.json").read_text()


def test_the_fingerprint_follows_trained_modules_and_adapters_kept_apart(folder: Path) -> None:
    known = {model_fingerprint(folder)}
    for name in ("1_LatentAttention/model.safetensors", "adapters/embedding/adapter_model.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("weights")
        assert model_fingerprint(folder) not in known
        known.add(model_fingerprint(folder))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors in it"):
        contents(folder)


def test_a_folder_with_something_in_it_is_not_written_over(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        write_folder({"a": b"1"}, folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "needed"), [("sentence_transformers.base.modules.normalize.Normalize", False), ("latent.Pool", True)]
)
def test_a_module_of_its_own_needs_trust(kind: str, needed: bool, tmp_path: Path) -> None:
    assert not needs_trust(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    assert needs_trust(tmp_path) == needed


@pytest.mark.parametrize("name", ["finder", "me/find/er", "me/my model", "me/", "", "me/finder.git"])
def test_a_malformed_repository_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected OWNER/NAME"):
        Repository(name)
