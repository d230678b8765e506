from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import tiny_encoder

from ullme.data import Example
from ullme.encoder import Encoder
from ullme.errors import ConfigError
from ullme.guide import GuideConfig, guides
from ullme.prompts import PromptConfig
from ullme.training import PhaseConfig

EXAMPLES = [
    Example("q0", "alpha", ("a", "b"), ("one", "two"), ("c",), ("three",)),
    Example("q1", "beta", ("b",), ("two",), ("a", "c"), ("one", "three")),
    Example("q2", "alpha", ("d",), ("four",), instruction="Find it."),
    Example("q3", "alpha", ("d",), ("four",)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guide")
    tiny_encoder(prompts=PromptConfig(query="{instruction}\nq: {text}", document="d: ")).save(path)
    return path


def phase(folder: Path, **objective: Any) -> PhaseConfig:
    spec = {"kind": "distill", **objective}
    return PhaseConfig.model_validate({"objective": spec, "steps": 1, "guide": {"model": str(folder)}})


def test_every_text_is_encoded_once_in_its_role_and_phases_share_the_vectors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    plain = Encoder.encode

    def watched(self: Encoder, texts: Any, *, prompt: Any = "query", **settings: Any) -> np.ndarray:
        seen.extend((prompt, text) for text in texts)
        return plain(self, texts, prompt=prompt, **settings)

    monkeypatch.setattr(Encoder, "encode", watched)
    plainest = PhaseConfig.model_validate({"objective": "contrastive", "steps": 1})
    found = guides([phase(folder), plainest, phase(folder)], EXAMPLES, folder=tmp_path, dim=7, batch_tokens=500)
    assert found.keys() == {0, 2}
    asked = [("query", text) for text in ("alpha", "beta", "alpha")]  # one of them with its own instruction
    assert seen == [*asked, *[("document", text) for text in ("one", "two", "three", "four")]]
    encoder = Encoder.load(folder)
    queries = plain(encoder, ["alpha", "beta"], prompt="query")
    told = plain(encoder, ["alpha"], prompt="query", instructions=["Find it."])
    for guide in found.values():
        assert guide.queries(EXAMPLES[:1]).shape == (1, 64)
        got = guide.queries([EXAMPLES[1], EXAMPLES[2], EXAMPLES[3], EXAMPLES[0]])
        assert np.allclose(got, [queries[1], told[0], queries[0], queries[0]], atol=1e-6)
        assert np.allclose(guide.documents(["four", "one"]), plain(encoder, ["four", "one"], prompt="document"), atol=1e-6)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_a_length_that_cannot_be_copied_is_refused_before_anything_is_encoded(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time with the vectors that `scores` left
        with pytest.raises(ConfigError, match=r"the trained model's length 7, got 64; use target: scores"):
            guides([phase(folder, target="embeddings")], EXAMPLES, folder=tmp_path, dim=7, batch_tokens=500)
        assert len(list(tmp_path.iterdir())) == _
        guides([phase(folder)], EXAMPLES, folder=tmp_path, dim=7, batch_tokens=500)


def test_the_digest_follows_every_file_of_the_model_and_can_be_pinned(tmp_path: Path) -> None:
    tiny_encoder().save(tmp_path)
    once = GuideConfig(model=str(tmp_path)).resolved()
    assert once.source_digest
    assert once.resolved() == once
    (tmp_path / "README.md").write_text("not part of the model")
    assert once.resolved() == once
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert GuideConfig(model=str(tmp_path)).resolved().source_digest != once.source_digest
    with pytest.raises(ConfigError, match=r"expected contents .* bring the old files back, or remove guide\.source_digest"):
        once.resolved()


def test_a_folder_that_is_no_model_is_one_clear_line(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="expected a folder of an embedding model, got"):
            GuideConfig(model=str(place)).resolved()
