"""`ullme merge`: help that teaches, a model from two, and its mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from flows.cli import _ullme_app, dispatch
from ullme.encoder import Encoder, EncoderConfig
from ullme.tiny import tiny_causal_lm


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of one architecture."""
    root = tmp_path_factory.mktemp("parents")
    for seed in range(2):
        Encoder(*tiny_causal_lm("llama", seed=seed), EncoderConfig(max_tokens=48, base="tiny:llama")).save(root / f"seed-{seed}")
    return [str(root / f"seed-{seed}") for seed in range(2)]


def call(*words: str) -> int:
    return dispatch(_ullme_app(), ["merge", *words])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    said = capsys.readouterr().out
    for word in (
        "--out",
        "--method",
        "--weights",
        "--t",
        "average",
        "slerp",
        "2203.05482",
        "ullme merge seed-0 seed-1 seed-2 --out soup",
    ):
        assert word in said


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ([], (0.5, 0.5)),
        (["--weights", "1,3"], (0.25, 0.75)),
        (["--method", "slerp", "--t", "0"], (1, 0)),
        (["--method", "slerp", "--t", "1"], (0, 1)),
    ],
)
def test_two_models_become_one(
    options: list[str], shares: tuple[float, float], parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(*parents, "--out", str(out), *options) == 0
    assert f"models, weights {shares[0]:g}, {shares[1]:g}, to {out}: " in capsys.readouterr().out
    first, second, got = (load_file(Path(folder) / "model.safetensors") for folder in (*parents, out))
    for name, tensor in got.items():
        assert ((shares[0] * first[name] + shares[1] * second[name]) - tensor).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "1"], "--weights: expected 2 numbers, one per folder, such as 1,1; got '1'"),
        (["--weights", "a,b"], "--weights: expected 2 numbers"),
        (["--weights", "1,-1"], "weights: expected two or more numbers from 0"),
        (["--t", ".5"], "--t: expected --method slerp and two folders, got average of 2; use --weights"),
        (["--method", "slerp", "--t", "2"], "--t: expected a number from 0 (the first folder) to 1 (the second), got 2"),
        (["--method", "slerp", "--t", ".5", "--weights", "1,1"], "--t: expected either --t or --weights, got both"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], words: str, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*parents, "--out", str(tmp_path / "out"), *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)
    assert not (tmp_path / "out").exists()


def test_one_folder_is_none_to_merge(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(parents[0], "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith("merge: expected at least two model folders, got 1")
    assert call(parents[0], "nowhere", "--out", str(tmp_path / "out")) == 1
    assert capsys.readouterr().err.startswith("nowhere: expected a model folder with ullme.json")
    assert call(*parents) == 2  # no --out
