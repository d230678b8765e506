"""A checkpoint is complete or not there: after a crash, a power cut, damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ullme.backbone import stored_tensors
from ullme.checkpoints import Checkpoint, Checkpoints, is_adapted
from ullme.encoder import Encoder
from ullme.errors import ArtifactError
from ullme.training import LoraConfig


def checkpoint(done: int) -> Checkpoint:
    return Checkpoint(done, loss=1 / done, tensors={"weight/a": torch.full((50,), float(done))})


def flip(folder: Path) -> None:
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(content)


def cut(folder: Path) -> None:
    os.truncate(folder / "state.safetensors", 40)


def lose(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def lose_position(folder: Path) -> None:
    (folder / "position.json").unlink()


def other_settings(folder: Path) -> None:
    file = folder / "position.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "identity": "others"}))


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Both there, as a kill right after the new one got its name leaves it."""
    kept = Checkpoints(tmp_path / "scratch", "settings")
    kept.folder.mkdir()
    kept.save(checkpoint(2))
    shutil.copytree(kept.folder / "checkpoint-2", tmp_path / "before")
    kept.save(checkpoint(10))
    shutil.move(tmp_path / "before", kept.folder / "checkpoint-2")
    return kept


def test_the_newest_is_read_back_and_the_one_before_is_deleted_with_the_next(two: Checkpoints) -> None:
    found = two.newest()
    assert found is not None
    assert (found.done, found.loss, found.tensors["weight/a"].tolist()) == (10, 0.1, [10.0] * 50)
    two.save(checkpoint(12))
    assert [path.name for path in two.folder.iterdir()] == ["checkpoint-12"]


@pytest.mark.parametrize("damage", [flip, cut, lose, lose_position, other_settings])
def test_one_that_is_not_whole_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], two: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    damage(two.folder / "checkpoint-10")
    found = two.newest()
    assert found is not None
    assert found.done == 2
    assert len(caplog.messages) == (0 if damage is lose_position else 1)
    damage(two.folder / "checkpoint-2")
    assert two.newest() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_stay_and_what_lies_beyond_goes(keep: int, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "settings", keep=keep)
    Checkpoints(tmp_path, "others").save(checkpoint(50))
    for done in (2, 4, 10):
        kept.save(checkpoint(done))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(["checkpoint-2", "checkpoint-4", "checkpoint-10"][-keep:])
    flip(tmp_path / "checkpoint-10")
    found = kept.newest()
    assert (found.done if found else None) == (None if keep == 1 else 4)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut after the renaming would find: both files and both folders were waited for, and the old one is there."""
    kept = Checkpoints(tmp_path, "settings")
    kept.save(checkpoint(1))
    synced: set[str] = set()
    seen: list[tuple[set[str], list[str]]] = []
    plain_sync, plain_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        plain_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        seen.append((set(synced), sorted(path.name for path in tmp_path.iterdir())))
        synced.clear()
        return plain_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    kept.save(checkpoint(2))
    ((before, there),) = seen
    assert before == {"state.safetensors.partial", "position.json.partial", "checkpoint.partial"}
    assert there == ["checkpoint-1", "checkpoint.partial"]
    assert synced == {tmp_path.name}  # the folder that holds the name


def test_what_cannot_be_written_names_its_file_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, "settings")
    kept.save(checkpoint(1))
    monkeypatch.setattr("ullme.checkpoints.STATE", "no/such/folder")
    with pytest.raises(OSError, match="folder") as caught:
        kept.save(checkpoint(2))
    assert caught.value.filename == str(tmp_path / "checkpoint.partial" / "no/such/folder.partial")
    monkeypatch.undo()
    found = kept.newest()
    assert found is not None
    assert found.done == 1


# The space they take


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3),
        LoraConfig(rank=2, use_dora=True),
        LoraConfig(rank=2, targets=("q_proj", "down_proj")),
        LoraConfig(rank=2, targets=r".*\.self_attn\.[qkv]_proj"),
    ],
    ids=["every layer", "dora", "by name", "by pattern"],
)
def test_the_adapter_is_foretold_weight_by_weight(config: LoraConfig, tmp_path: Path) -> None:
    from toys import tiny_encoder

    encoder: Encoder = tiny_encoder()
    encoder.save(tmp_path)
    adapted = [tensor for tensor in stored_tensors(tmp_path) if is_adapted(tensor, config)]
    expected = sum(config.rank * sum(tensor.shape) + config.use_dora * tensor.shape[0] for tensor in adapted)
    encoder.add_lora(config)
    assert expected == sum(p.numel() for p in encoder.model.parameters() if p.requires_grad)


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"short", b"\xff" * 400):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"not a safetensors file, or cut short"):
            stored_tensors(tmp_path)
