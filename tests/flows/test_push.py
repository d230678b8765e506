"""`ullme push`: what arrives at a hub is the model, with its card and nothing of this machine; every mishap is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from conftest import BASE, BETTER, GOOD, Scene
from local_hub import Hub, local_hub

from flows.cli import _ullme_app, dispatch
from ullme.artifacts import ArtifactRef
from ullme.encoder import Encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TEXTS = ["the sum of all values", "def median(values): return sorted(values)", "x"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own, whose token this process has."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with local_hub() as hub, huggingface_hub.utils.disable_progress_bars():
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture(scope="module")
def released(
    tmp_path_factory: pytest.TempPathFactory,
    artifacts: Mapping[str, ArtifactRef],
    plain_config: Mapping[str, Any],
    empty_database: Path,
) -> Iterator[Scene]:
    """Version 1 is the champion; version 2, of another model, waits. Publishing changes nothing here, so all tests share it."""
    folder = tmp_path_factory.mktemp("released") / "store"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        scene = Scene(folder, artifacts, plain_config)
        scene.promote(scene.release(), tuned=GOOD, base=BASE, bm25=BETTER)
        scene.promote(scene.release("other", "other_index"), tuned=BASE, base=BASE, champion=GOOD)
        yield scene


def push(scene: Scene, *words: str) -> int:
    return dispatch(_ullme_app(), ["push", *words, "--config", str(scene.config)])


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_arrives_loads_in_ullme_and_in_sentence_transformers_with_the_same_vectors(
    released: Scene, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(released, "test@champion", "--to", "me/finder", "--endpoint", hub.url) == 0
    repository = hub.repositories["me/finder"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"pushed: test version 1 to {hub.url}/me/finder, ")
    assert said.endswith(f"commit {repository.at('main')[:12]}")
    assert len(repository.commits) == 2  # the hub's own first one, and everything in one
    folder = unpacked(repository.files(), tmp_path / "received")
    before = Encoder.load(released.artifacts["model"].path)
    assert np.array_equal(Encoder.load(folder).encode(TEXTS), before.encode(TEXTS))
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(folder), device="cpu")
    for prompt in ("query", "document"):
        expected = before.encode(TEXTS, prompt=prompt)
        got = plain.encode(TEXTS, prompt_name=prompt, show_progress_bar=False)
        assert (expected * got).sum(1).min() >= 0.99999


def test_the_hub_code_of_the_loaders_gets_it_back(released: Scene, hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, which knows of nothing but the hub's address."""
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 0
    script = (
        "import json, sys; from ullme.encoder import Encoder; from ullme.backbone import BackboneConfig, load_causal_lm;"
        "from sentence_transformers import SentenceTransformer; texts = json.loads(sys.argv[1]);"
        "ours = Encoder.load('me/finder').encode(texts);"
        "plain = SentenceTransformer('me/finder', device='cpu').encode(texts, prompt_name='query', show_progress_bar=False);"
        "model, tokenizer = load_causal_lm(BackboneConfig(model='me/finder', dtype='float32'));"
        "print(json.dumps([ours.tolist(), plain.tolist(), sum(p.numel() for p in model.parameters())]))"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(TEXTS)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    ours, plain, parameters = json.loads(done.stdout.splitlines()[-1])
    before = Encoder.load(released.artifacts["model"].path)
    assert np.array_equal(np.array(ours, dtype=np.float32), before.encode(TEXTS))
    assert (np.array(ours) * np.array(plain)).sum(1).min() >= 0.99999
    assert parameters == sum(parameter.numel() for parameter in before.model.parameters())
    assert any(asked.startswith("GET /me/finder/resolve/") for asked in hub.asked)


def rows_of(text: str, *starts: str) -> list[str]:
    """The first line that begins with each of these."""
    return [next(line for line in text.splitlines() if line.startswith(start)) for start in starts]


def test_the_card_says_what_it_scored_and_where_it_comes_from(released: Scene, hub: Hub) -> None:
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 0
    card = huggingface_hub.ModelCard(hub.repositories["me/finder"].files()["README.md"].decode())
    (tuned,) = [result for result in card.data.eval_results or [] if result.metric_type == "ndcg_at_10"]
    assert (tuned.metric_value, tuned.dataset_name) == (pytest.approx(GOOD.mean()), "retrieval")
    titles, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in rows_of(card.text, "| task ", "| retrieval "))
    cells = dict(zip(titles, row, strict=True))
    assert list(cells)[2:] == ["base", "base (index)", "tuned", "tuned (index)", "bm25", "bm25 (index)"]
    assert cells["tuned"] == f"{GOOD.mean():.3f} [{GOOD.mean() - 0.05:.3f}, {GOOD.mean() + 0.05:.3f}]"
    assert cells["base"].startswith(f"{BASE.mean():.3f}")
    assert cells["bm25"].startswith(f"{BETTER.mean():.3f}")
    for name in ("model", "data", "index"):
        assert released.artifacts[name].digest in card.text
    assert "test version 1" in card.text
    sections = yaml.safe_load(card.text.split("```yaml\n")[-1].split("\n```")[0])
    assert sections["backbone"]["model"] == "tiny:llama"
    assert sections["data"]["max_documents"] == 60
    assert list(sections) == ["data", "backbone", "index"]
    assert f"| {released.artifacts['model']} (this model) |" in card.text


def test_nothing_of_this_machine_is_published(released: Scene, hub: Hub, code: Path) -> None:
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 0
    files = hub.repositories["me/finder"].files()
    places = [str(place).encode() for place in (released.store.root, released.artifacts["model"].path.parent, code, Path.home())]
    assert b"roots:\n" in files["README.md"]  # the corpus was named by its path
    assert code.name.encode() in files["README.md"]
    assert [name for name, content in files.items() for place in places if place in content] == []
    assert not {"manifest.json"} & files.keys()
    assert not [name for name in files if name.startswith("logs/")]


def test_the_next_version_replaces_the_model_and_leaves_other_files_alone(released: Scene, hub: Hub) -> None:
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 0
    repository = hub.repositories["me/finder"]
    mine = {"LICENSE": b"free", "model-00002-of-00002.safetensors": b"old", "picture.png": b"png"}
    repository.commit("main", {**repository.files(), **mine})
    assert push(released, "test/2", "--to", "me/finder", "--endpoint", hub.url) == 0
    files = repository.files()
    assert {"LICENSE", "picture.png", ".gitattributes"} <= files.keys()
    assert "model-00002-of-00002.safetensors" not in files
    assert json.loads(files["1_Pooling/config.json"])["pooling_mode"] == "lasttoken"
    assert b"test version 2" in files["README.md"]


def test_a_branch_is_made_and_the_main_one_left_alone(released: Scene, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(released, "@challenger", "--to", "me/finder", "--endpoint", hub.url, "--revision", "next", "--private") == 0
    repository = hub.repositories["me/finder"]
    assert repository.private
    assert f"{hub.url}/me/finder/tree/next" in capsys.readouterr().out
    assert "model.safetensors" in repository.files("next")
    assert b'revision="next"' in repository.files("next")["README.md"]
    assert "model.safetensors" not in repository.files("main")
    assert push(released, "--to", "me/finder", "--endpoint", hub.url, "--revision", "next") == 0


def test_a_dry_run_prints_card_and_files_and_asks_no_hub(released: Scene, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(released, "/1", "--to", "me/finder", "--endpoint", hub.url, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.startswith("---\n")
    assert "pipeline_tag: sentence-similarity" in said
    assert "test version 1 would go to me/finder" in said
    assert any(line.endswith("  model.safetensors") for line in said.splitlines())
    assert hub.asked == []


def test_a_folder_to_hand_on_is_written_without_any_hub(
    released: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "handed on"
    assert push(released, "--to", str(there)) == 0
    assert (there / "README.md").read_text().startswith("---\n")
    before = Encoder.load(released.artifacts["model"].path)
    assert np.array_equal(Encoder.load(there).encode(TEXTS), before.encode(TEXTS))
    assert push(released, "--to", str(there)) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


# Mishaps


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.rstrip("\n")
    assert "\n" not in said
    return said


def test_a_hub_that_is_not_there_is_one_line(released: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(released, "--to", "me/finder", "--endpoint", "http://127.0.0.1:9") == 1
    assert one_line(capsys).startswith("http://127.0.0.1:9/me/finder: no connection (")


def test_without_a_token_or_with_a_wrong_one_the_line_says_which(
    released: Scene, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 1
    said = one_line(capsys)
    assert "401, your token may not write to 'me'; `hf auth login`" in said
    assert "hf_wrong" not in said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 1
    assert "401, there is no token" in one_line(capsys)
    assert hub.repositories == {}


def test_a_public_repository_is_not_taken_for_a_private_one(released: Scene, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 0
    before = dict(hub.repositories["me/finder"].branches)
    capsys.readouterr()
    assert push(released, "test/2", "--to", "me/finder", "--endpoint", hub.url, "--private") == 1
    assert "exists and is public, and --private was asked for; nothing was uploaded" in one_line(capsys)
    assert hub.repositories["me/finder"].branches == before


def test_what_a_hub_says_when_it_refuses_is_passed_on(released: Scene, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuse_files = True
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 1
    assert "400, the hub refused (Your push was rejected: the file is not allowed here)" in one_line(capsys)


def test_a_hub_without_xet_storage_is_answered_with_the_setting(
    released: Scene, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    assert push(released, "--to", "me/finder", "--endpoint", hub.url) == 1
    assert "this hub has no xet storage" in one_line(capsys)


def test_a_version_that_is_not_there_is_one_line_that_says_what_is(released: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    for wanted, line in (
        ("test/7", "no version 7 of 'test'; there are: /2 @challenger, /1 @champion"),
        ("test@best", "no version of 'test' is its best; there are: /2 @challenger, /1 @champion"),
        ("tset", "no version of 'tset' is registered; there are: test; did you mean 'test'?"),
    ):
        assert push(released, wanted, "--to", "me/finder") == 1
        assert one_line(capsys) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["test/x", "--to", "me/finder"], "expected NAME, NAME@champion, NAME@challenger or NAME/NUMBER"),
        (["--to", "finder"], "expected OWNER/NAME, a repository of the hub"),
        (["--to", "me/my model"], "expected OWNER/NAME, a repository of the hub"),
        (["--to", "me/finder", "--endpoint", "hub.local"], "endpoint: expected the URL of a hub"),
    ],
)
def test_a_mistake_in_the_words_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(_ullme_app(), ["push", *words]) == 2
    assert line in one_line(capsys)


def test_a_damaged_model_is_not_published(scene: Scene, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = scene.release()
    copy = tmp_path / "model" / release.model.path.name
    shutil.copytree(release.model.path, copy)
    scene.promote(release.model_copy(update={"model": release.model.model_copy(update={"uri": str(copy)})}), tuned=GOOD, base=BASE)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert push(scene, "--to", "me/finder", "--endpoint", hub.url) == 1
    assert "model.safetensors is damaged" in one_line(capsys)
    assert hub.asked == []
