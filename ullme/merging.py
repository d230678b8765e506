"""Merging: folders of one LLM that was trained in several ways -> one folder whose weights lie between theirs.

    merge           model folders that `Encoder.save` wrote -> a new one of the same form, with a card that names its parents
    coefficients    how much of each model goes into a tensor, by the recipe and the angles between the models there

Nothing is trained and no model is built. The settings must agree in what changes a vector. Then every tensor of the new folder
is a weighted sum of the same tensor of the others; it is read through the memory map and written piece by piece, so memory stays
at a few pieces whatever the size of the models. Why it helps: the minima that fine-tunings of one model reach lie in one
valley, and a point between them is often better than each (model soups, arXiv 2203.05482).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ullme.card import Card, model_card
from ullme.errors import ArtifactError, ConfigError
from ullme.folder import ADAPTERS, SETTINGS
from ullme.progress import Progress
from ullme.publishing import ORIGINS, contents, model_fingerprint, needs_trust, require_new, write_folder

__all__ = ["Merged", "Method", "Recipe", "coefficients", "merge"]

logger = logging.getLogger(__name__)

Method = Literal["average", "slerp"]
PIECE = 1 << 20
"""Numbers of a tensor that are worked on at a time, in double precision."""
PARALLEL = 0.9995
"""Cosine beyond which two tensors count as parallel: the arc between them is a line, and its sine too small to divide by."""
Place = tuple[str, str]
"""Folder of a tensor's file below the model's own ("" for that itself), and its name."""
REAL = ("F64", "F32", "F16", "BF16")
LEFT_BEHIND = ("adapter/*", "generation_config.json")
"""Of a trained model's folder: the adapter that its weights already hold, and how somebody liked to generate."""
COMPARED = ("*.json", "*.jinja", "*.txt", "*.model")
FREE = {
    *(*ORIGINS, "dtype", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("transformers_version", "__version__", "use_cache", "truncation", "padding", "is_local", "local_files_only", "_commit_hash"),
    *("backend", "tokenizer_class"),
}
"""Keys that say where a model came from, how it is stored or run, and what its tokenizer was last used for or read with."""


@dataclass(frozen=True)
class Recipe:
    """How models are merged. weights: one per model, 0 or more; only their proportions count.

    average     sum_i w_i x_i
    slerp       on the arc from the first model to the second, w_2 / (w_1 + w_2) of the way, tensor by tensor; then from there
                w_3 / (w_1 + w_2 + w_3) of the way to the third, and so on. It keeps lengths that an average would shorten.

    Raises:
        ConfigError: fewer than two weights, a negative one, or all of them 0.
    """

    method: Method
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the weights."""
        total = sum(self.weights)
        if len(self.weights) < 2 or not all(weight >= 0 for weight in self.weights) or not (0 < total < math.inf):
            shown = ",".join(f"{weight:g}" for weight in self.weights) or "none"
            raise ConfigError(f"weights: expected two or more numbers from 0, not all of them 0, such as 1,1 or .7,.3; got {shown}")

    @property
    def shares(self) -> list[float]:
        """The weights, 1 in all."""
        return [weight / sum(self.weights) for weight in self.weights]

    def __str__(self) -> str:
        """`average of 3 models, weights 0.5, 0.25, 0.25`."""
        return f"{self.method} of {len(self.weights)} models, weights {', '.join(f'{share:.4g}' for share in self.shares)}"


@dataclass(frozen=True)
class Merged:
    """What was written. tensors: how many; size: bytes of all files; parents: folder -> sha256 of what its vectors depend on."""

    tensors: int
    size: int
    parents: Mapping[Path, str]


def merge(folders: Sequence[Path], out: Path, recipe: Recipe) -> Merged:
    """Write the merged model to `out`, complete or not at all. Settings, tokenizer and number types are those of the first.

    folders: of models that `Encoder.save` or a training wrote, in the order of `recipe.weights`.

    Raises:
        ConfigError: not as many folders as weights, `out` holds something, or two folders differ in what changes a vector.
        ArtifactError: a folder is no model of ours or is damaged.
    """
    if len(folders) != len(recipe.weights):
        raise ConfigError(f"weights: expected one per folder ({len(folders)}), got {len(recipe.weights)}")
    require_new(out)
    for folder in folders:
        _check(folder)
    for folder in folders[1:]:
        _agree(folders[0], folder)
    with ExitStack() as stack:
        models = [_Weights(folder, stack) for folder in folders]
        for model in models[1:]:
            models[0].agrees(model)
        parents = {folder: model_fingerprint(folder) for folder in folders}
        files = _kept(folders[0])
        files["README.md"] = _card(folders, out, recipe, parents).encode()
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = stack.enter_context(TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent))
        work = Path(scratch) / "model"
        write_folder({name: file for name, file in files.items() if not name.endswith(".safetensors")}, work)
        with Progress(len(models[0].places), "merge", unit="tensor") as progress:
            for name in files:
                if name.endswith(".safetensors"):
                    _write(folders[0] / name, work / name, models, recipe, progress)
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        if out.exists():
            out.rmdir()
        work.rename(out)
    return Merged(len(models[0].places), size, parents)


# How much of each


def coefficients(recipe: Recipe, products: Tensor) -> list[float]:
    """The factor of each model in a tensor's weighted sum.

    products: Float64[M M], the scalar products of the models' tensors with each other, of which only slerp needs any.
    slerp (Shoemake 1985): sin((1-t) a) / sin(a) and sin(t a) / sin(a) at the angle a; the line where there is no arc.
    """
    if recipe.method == "average":
        return recipe.shares
    first, *others = recipe.weights
    found, reached = [1.0, *(0.0 for _ in others)], first
    for place, weight in enumerate(others, start=1):
        reached += weight
        if weight == 0:
            continue
        here = torch.tensor(found, dtype=torch.float64)
        length = math.sqrt(max(0.0, float(here @ products @ here)) * float(products[place, place]))
        cosine = float(here @ products[:, place]) / length if length > 0 else 1.0
        stay, go = _arc(cosine, weight / reached)
        found = [stay * factor for factor in found]
        found[place] = go
    return found


def _arc(cosine: float, way: float) -> tuple[float, float]:
    if not abs(cosine) <= PARALLEL:
        return 1 - way, way
    angle = math.acos(cosine)
    return math.sin((1 - way) * angle) / math.sin(angle), math.sin(way * angle) / math.sin(angle)


# Tensors


class _Weights:
    """The tensors of a folder by their place: files are opened, not read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.places: dict[Place, Any] = {}
        for name in _kept(folder):
            if not name.endswith(".safetensors"):
                continue
            try:
                handle: Any = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{folder / name}: not a safetensors file, or cut short; bring the right one back") from error
            where = name.rpartition("/")[0]
            self.places |= {(where, tensor): handle for tensor in handle.keys()}  # noqa: SIM118 - a handle is no mapping

    def kind(self, place: Place) -> tuple[list[int], str]:
        """Shape and number type of a tensor."""
        piece = self.places[place].get_slice(place[1])
        return list(piece.get_shape()), str(piece.get_dtype())

    def read(self, place: Place) -> Tensor:
        """A tensor as one row, [N]."""
        return self.places[place].get_tensor(place[1]).reshape(-1)

    def agrees(self, other: _Weights) -> None:
        """Raises: ConfigError: the other model has not the same tensors; names the first that differs."""
        for place in [*self.places, *other.places]:
            there = [_described(model.kind(place)) if place in model.places else "none" for model in (self, other)]
            if there[0] != there[1]:
                raise _unlike(self.folder, other.folder, f"tensor {_called(place)}: {there[0]} and {there[1]}")


def _called(place: Place) -> str:
    return "/".join(part for part in place if part)


def _described(kind: tuple[list[int], str]) -> str:
    """Shape, and the number type of what is not averaged."""
    shape, dtype = kind
    return f"{shape}" if dtype in REAL else f"{shape} {dtype}"


def _write(file: Path, target: Path, models: Sequence[_Weights], recipe: Recipe, progress: Progress) -> None:
    """A safetensors file like `file`, of the first model: its header as it is, then the merged tensors in its order."""
    where = file.parent.relative_to(models[0].folder).as_posix().removeprefix(".")
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, target.open("wb") as handle:
        length = source.read(8)
        header = source.read(int.from_bytes(length, "little"))
        handle.write(length + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            for piece in _between((where, name), models, recipe):
                handle.write(piece.view(torch.uint8).numpy().data)
            progress.advance()


def _between(place: Place, models: Sequence[_Weights], recipe: Recipe) -> Iterator[Tensor]:
    """The pieces of a merged tensor, in the number type of the first model's.

    Raises:
        ArtifactError: it is not finite, or of a type that is not averaged and not the same everywhere.
    """
    tensors = [model.read(place) for model in models]
    first = tensors[0]
    if models[0].kind(place)[1] not in REAL:
        if not all(torch.equal(first.view(torch.uint8), other.view(torch.uint8)) for other in tensors[1:]):
            raise _damaged(place, models, f"the same {first.dtype} values everywhere, since such are not averaged, got others")
        yield first
        return
    products = _products(tensors) if recipe.method == "slerp" else torch.empty(0)
    if not products.isfinite().all():
        raise _damaged(place, models, "finite numbers, got some that are not")
    parts = [part for part in zip(coefficients(recipe, products), tensors, strict=True) if part[0]]
    for start in range(0, len(first), PIECE):
        total, *others = (factor * tensor[start : start + PIECE].double() for factor, tensor in parts)
        for other in others:
            total += other
        piece = total.to(first.dtype)
        if not piece.isfinite().all():
            raise _damaged(place, models, "finite numbers, got some that are not")
        yield piece


def _damaged(place: Place, models: Sequence[_Weights], what: str) -> ArtifactError:
    folders = " and ".join(str(model.folder) for model in models)
    return ArtifactError(f"tensor {_called(place)} of {folders}: expected {what}; look at how these models were trained")


def _products(tensors: Sequence[Tensor]) -> Tensor:
    """Float64[M M]: each tensor times each."""
    found = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for start in range(0, len(tensors[0]), PIECE):
        rows = torch.stack([tensor[start : start + PIECE].double() for tensor in tensors])
        found += rows @ rows.T
    return found


# Settings


def _check(folder: Path) -> None:
    if not (folder / SETTINGS).is_file():
        raise ArtifactError(
            f"{folder}: expected a model folder with {SETTINGS}, as training and Encoder.save write it; of another's folder "
            "Encoder.load(FOLDER).save(NEW) makes one"
        )
    apart = sorted(path.name for path in (folder / ADAPTERS).glob("*"))
    if apart:
        raise ConfigError(
            f"{folder}: expected weights that hold their adapters, got some kept apart ({', '.join(apart)}), whose factors cannot "
            "be averaged; encoder = Encoder.load(FOLDER); encoder.merge_adapter(); encoder.save(NEW) folds the embedding's in"
        )


def _kept(folder: Path) -> dict[str, Path | bytes]:
    """Name -> file (or its text without paths of this machine) of what a merged folder takes over or merges."""
    return {name: file for name, file in contents(folder).items() if not any(fnmatch(name, pattern) for pattern in LEFT_BEHIND)}


def _agree(first: Path, other: Path) -> None:
    """Raises: ConfigError: names the first setting that differs and changes a vector. ArtifactError: a file is no JSON."""
    ours, theirs = _settings(first), _settings(other)
    for name in dict.fromkeys([SETTINGS, "config.json", *sorted([*ours, *theirs])]):
        found = _difference(ours.get(name), theirs.get(name), free=FREE)
        if found is not None:
            raise _unlike(first, other, f"{name}{found}")
    bases = [settings[SETTINGS].get("base", "") for settings in (ours, theirs)]
    if bases[0] != bases[1]:
        logger.warning(
            "%s was made from '%s', %s from '%s': merge only models that were trained from the same weights",
            *(first, bases[0], other, bases[1]),
        )


def _settings(folder: Path) -> dict[str, Any]:
    """Name -> content of the files that say how weights are used; of a list of shards only that there is one."""
    found: dict[str, Any] = {}
    for name in _kept(folder):
        if not any(fnmatch(name, pattern) for pattern in COMPARED) or name.endswith(".index.json"):
            continue
        text = (folder / name).read_bytes()
        try:
            found[name] = json.loads(text) if name.endswith(".json") else text
        except ValueError as error:
            raise ArtifactError(f"{folder / name}: expected JSON ({error}); bring the right file back") from error
    return found


def _difference(ours: Any, theirs: Any, *, free: set[str]) -> str | None:
    """Where two values first differ and how, below the name of their file; None: in nothing that counts."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in free:
                inside = free if key != "prompts" else set[str]()  # there the names are the user's own
                found = _difference(ours.get(key), theirs.get(key), free=inside)
                if found is not None:
                    return f": {key}{found}"
        return None
    return None if ours == theirs else f": {_shown(ours)} and {_shown(theirs)}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bytes | dict | list):
        return "none" if value is None else f"{len(value)} {'bytes' if isinstance(value, bytes) else 'entries'}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unlike(first: Path, other: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{other} cannot be merged with {first}: {what}; merge models of one LLM that were saved with the same settings"
    )


def _card(folders: Sequence[Path], out: Path, recipe: Recipe, parents: Mapping[Path, str]) -> str:
    """The text of README.md: how to load the model, and its parents by digest."""
    from transformers import AutoConfig

    settings = json.loads((folders[0] / SETTINGS).read_text(encoding="utf-8"))
    width = int(AutoConfig.from_pretrained(folders[0]).get_text_config().hidden_size)
    card = Card(
        version="merged",
        base=settings["base"],
        settings=settings,
        dim=settings["dim"] or width,
        digests={f"parent {number}, {folder.resolve().name}": parents[folder] for number, folder in enumerate(folders, start=1)},
        facts={"merged": f"{recipe}, without further training (arXiv 2203.05482)"},
        trust=needs_trust(folders[0]),
    )
    return model_card(card, out.resolve().name)
