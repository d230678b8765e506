"""Checkpoints of a training run: complete or not there, whatever happens while one is written; and the space they take.

    checkpoint-25/state.safetensors   trainable weights and optimizer state
    checkpoint-25/position.json       written last: steps done, identity of the settings, loss, sha256 of the state
    checkpoint.partial/               one that is being written; it gets its name when both files would survive a power cut

Those before the last `keep` are deleted only then, so one more lies beside them for a moment.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ullme.artifacts import Inputs, sha256_file, sync, write_atomic
from ullme.backbone import StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch

    from ullme.training import LoraConfig, PhaseConfig, TrainConfig

__all__ = ["Checkpoint", "Checkpoints", "training_space", "write_tensors"]

logger = logging.getLogger(__name__)

STATE, POSITION = "state.safetensors", "position.json"
ADAM_COPIES = 3  # a weight, and two running means as large as it
HEADER_BYTES = 512  # per trained tensor: names, types and places of it and its optimizer state
METRICS_ROW_BYTES = 1_000
PAIR_BYTES = 100  # a query's id, a candidate's and a number
SETTINGS_BYTES = 16_000  # adapter and pooling settings, scores before and after
EMBEDDINGS_AND_HEAD = re.compile(r"embed|wte|wpe|lm_head|output_layer")


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read back. done: steps. loss: of the last of them."""

    done: int
    loss: float
    tensors: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints in `folder` of a run whose settings have this `identity`."""

    def __init__(self, folder: Path, identity: str, *, keep: int = 1) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one, then delete those before the last `keep`.

        Raises:
            OSError: it cannot be written; those before it are still there.
        """
        partial, final = self.folder / "checkpoint.partial", self.folder / f"checkpoint-{checkpoint.done}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_tensors(partial / STATE, checkpoint.tensors)
        position = {"done": checkpoint.done, "identity": self.identity, "loss": checkpoint.loss}
        write_atomic(partial / POSITION, json.dumps({**position, "sha256": sha256_file(partial / STATE)}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self.folder)
        before = sorted((folder for folder in self.folder.glob("checkpoint-*") if folder != final), key=_steps)
        kept = [folder for folder in before if _steps(folder) < checkpoint.done][::-1][: self.keep - 1]
        for folder in before:
            if folder not in kept:
                shutil.rmtree(folder)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole and of these settings, or None. One that is not whole is passed over, with a warning."""
        from safetensors.torch import load_file

        found = sorted(self.folder.glob(f"checkpoint-*/{POSITION}"), key=lambda file: -_steps(file.parent))
        for file in found:
            position = json.loads(file.read_text(encoding="utf-8"))
            state = file.with_name(STATE)
            if position["identity"] != self.identity:
                logger.warning("passing over %s: it is of other settings", file.parent)
            elif not state.is_file() or sha256_file(state) != position["sha256"]:
                logger.warning("passing over %s: its %s is damaged or missing", file.parent, STATE)
            else:
                return Checkpoint(position["done"], position["loss"], load_file(state))
        return None


def _steps(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file that is there whole, also after a power cut, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f"{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(partial)) from error  # it does not say which file
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def training_space(section: TrainConfig, inputs: Inputs) -> int | None:
    """Bytes that a training writes at most: those checkpoints that it keeps and the one that is written, or the model beside them.

    None with a guide, whose vectors are kept as well: their length is not known before it is loaded.
    """
    if any(phase.guide is not None for phase in section.phases):
        return None
    copies = ADAM_COPIES + bool(section.average_last or section.development)
    sizes = inputs.sizes("model")
    tensors = stored_tensors(inputs.ref("model").path)
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name)
    if section.frozen_trunk:
        pooling = [size for name, size in sizes.items() if name.endswith(".safetensors") and "/" in name]
        adapter, trained, checkpoint = 0, len(pooling), copies * sum(pooling)
    elif section.adapter is None:
        adapter, trained = 0, len(tensors)
        checkpoint = copies * weights
    else:
        adapted = [tensor for tensor in tensors if is_adapted(tensor, section.adapter)]
        adapter, trained = 4 * sum(_added(tensor, section.adapter) for tensor in adapted), 2 * len(adapted)
        checkpoint = copies * adapter
    headers = HEADER_BYTES * (trained + sum(len(phase.objective.learned) for phase in section.phases))
    rest = sum(sizes.values()) - weights + SETTINGS_BYTES
    steps = sum(phase.steps for phase in section.phases)
    metrics = METRICS_ROW_BYTES * steps + len(section.phases[1:]) * adapter  # what a phase began with
    metrics += sum(PAIR_BYTES * _stored_pairs(phase) for phase in section.phases)
    written = -(-steps // section.runtime.checkpoint_every)
    kept = min(section.runtime.keep_checkpoints, written)
    beside = min(kept + 1, written)
    return max(beside * (checkpoint + headers) + metrics, kept * checkpoint + weights + adapter + 2 * (headers + metrics) + rest)


def _stored_pairs(phase: PhaseConfig) -> int:
    """Numbers that a phase stores of its queries' candidates, at most."""
    kinds = (phase.generation.teacher == "frozen") + (phase.generation.reference == "stored")
    return kinds * phase.steps * (phase.generation.queries or phase.batch_size) * (1 + phase.num_negatives)


def is_adapted(tensor: StoredTensor, config: LoraConfig) -> bool:
    """Whether the adapter has a layer beside this weight."""
    name = tensor.name.removesuffix(".weight")
    if len(tensor.shape) != 2 or name == tensor.name:
        return False
    if config.targets == "all-linear":
        return EMBEDDINGS_AND_HEAD.search(name) is None
    if isinstance(config.targets, str):
        return re.fullmatch(config.targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in config.targets)


def _added(tensor: StoredTensor, config: LoraConfig) -> int:
    """Weights that the adapter adds beside one of the model's."""
    return config.rank * sum(tensor.shape) + (tensor.shape[0] if config.use_dora else 0)
