"""`ullme encode`: help, its mistakes, and a folder that several commands fill together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flows.cli import _ullme_app, dispatch
from ullme.artifacts import Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.encoding import EncodeJob, EncodeRuntime, encode_part, open_embeddings
from ullme.errors import ArtifactError
from ullme.publishing import model_fingerprint
from ullme.text_file import TextFile

ULLME = str(Path(sys.executable).parent / "ullme")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("store"))
    return store.produce(BACKBONE, BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=24), {}, seed=0).path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": f"t{n}", "text": f"text {n}" + " and more" * (n % 4)}) + "\n" for n in range(50)))
    return file


def encode(model: Path, texts: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [ULLME, "encode", "--model", str(model), "--input", str(texts), "--output", str(out), "--shard-rows", "8", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_machines_that_share_a_folder_make_what_one_process_makes(model: Path, texts: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    first = encode(model, texts, parts, "--shard", "1/2", "--processes", "2")
    assert first.returncode == 0, first.stderr
    assert "still to come: --shard 2/2" in first.stdout
    with pytest.raises(ArtifactError, match=r"3 of 7 shards missing \(number 1, 3, 5\).*run every --shard"):
        open_embeddings(parts)
    second = encode(model, texts, parts, "--shard", "2/2")
    assert second.stdout.startswith(f"{parts}: 24 texts in 3 of 7 shards, 24 encoded now; ")
    assert second.stdout.count("\n") == 1
    assert "24 texts in 3 of 7 shards, 0 encoded now; " in encode(model, texts, parts, "--shard", "2/2").stdout

    file = TextFile.open(texts)
    whole = EncodeJob(
        model=model,
        fingerprint=model_fingerprint(model),
        corpus=texts,
        count=file.count,
        input=file.digest,
        out=tmp_path / "whole",
        runtime=EncodeRuntime(shard_rows=8),
    )
    whole.out.mkdir()
    encode_part(whole, lambda count: None)
    vectors = [open_embeddings(folder).vectors() for folder in (parts, whole.out)]
    assert np.abs(vectors[0] - vectors[1]).max() <= 1e-3
    assert open_embeddings(parts).sidecars[6] | {"sha256": ""} == open_embeddings(whole.out).sidecars[6] | {"sha256": ""}
    assert open_embeddings(parts).ids == [f"t{n}" for n in range(50)]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(_ullme_app(), ["encode", "--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--model", "--input", "--output", "--shard", "--prompt", "--batch-tokens", "Examples:", "open_embeddings"):
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--shard", "3/2"], 2, "--shard: expected i/N with i from 1 to N"),
        (["--shard", "0/2"], 2, "--shard: expected i/N"),
        (["--processes", "0"], 2, "--processes: expected auto or a number"),
        (["--input", "nowhere.txt"], 2, "nowhere.txt: cannot be read"),
        (["--model", "nowhere"], 1, "nowhere: expected a model folder with *.safetensors"),
        (["--batch-tokens", "0"], 2, ""),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], code: int, words: str, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--model": str(model), "--input": str(texts), "--output": str(tmp_path / "out")} | {arguments[0]: arguments[1]}
    assert dispatch(_ullme_app(), ["encode", *(word for pair in given.items() for word in pair)]) == code
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "words"), [("fingerprint", "another model"), ("input", "another input file")])
def test_vectors_of_something_else_are_not_written_over(
    key: str, words: str, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sidecar = {"fingerprint": model_fingerprint(model), "input": "", key: "another"}
    (out / "shard-00000.json").write_text(json.dumps(sidecar))
    assert dispatch(_ullme_app(), ["encode", "--model", str(model), "--input", str(texts), "--output", str(out)]) == 1
    assert words in capsys.readouterr().err


def test_the_fingerprint_follows_weights_and_settings(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(model), str(copy)], check=True)
    assert model_fingerprint(copy) == model_fingerprint(model)
    (copy / "README.md").write_text("a card")
    assert model_fingerprint(copy) == model_fingerprint(model)
    for name in ("ullme.json", "model.safetensors"):
        with (copy / name).open("ab") as handle:
            handle.write(b" ")
        assert model_fingerprint(copy) != model_fingerprint(model)
        (copy / name).write_bytes((model / name).read_bytes())
