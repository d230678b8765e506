"""A model on disk: a sentence-transformers folder with `ullme.json` beside it, and the reading of other people's folders.

    modules.json         the chain: transformer, pooling, (a cut to `dim`,) unit length
    ullme.json           EncoderConfig: everything that `Encoder` needs beyond the weights
    adapters/NAME/       adapters that were not merged, as peft writes them

What `SentenceTransformer(folder)` loads plainly: every pooling but latent attention, prompts, a suffix, a shorter `dim`; and one
special token without a head. What needs `trust_remote_code=True`, because it runs a Python file that lies in the folder: latent
attention, several special tokens or a head above them, adapters not merged.

Special tokens stand below the vocabulary in the embedding table that is written, for other readers; `read` takes them off again.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.latent import LatentAttention
from ullme.prompts import PromptConfig, end_texts_with
from ullme.special import SpecialTokens

if TYPE_CHECKING:
    from ullme.encoder import Encoder, EncoderConfig

__all__ = ["ForeignPooling", "auto_class", "is_sentence_folder", "read", "read_foreign", "ready_settings", "write"]

logger = logging.getLogger(__name__)

SETTINGS, MODULES, ADAPTERS = "ullme.json", "modules.json", "adapters"
PACKAGE = "sentence_transformers"
POOLING_MODES = {"mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "first": "cls", "max": "max"}
LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, ValidationError, SafetensorError)


class ForeignPooling(nn.Module):
    """Whatever follows the transformer in somebody else's folder (Dense layers, several poolings), run as it is."""

    def __init__(self, modules: Sequence[Any], dim: int) -> None:
        super().__init__()
        self.chain, self.dim = nn.ModuleList(modules), dim

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: Float[B S D]; mask: Bool[B S], the tokens attended to -> Float32[B dim]."""
        features: dict[str, Any] = {"token_embeddings": hidden.float(), "attention_mask": mask.long()}
        for module in self.chain:
            features = module(features)
        return features["sentence_embedding"]


def is_sentence_folder(folder: Path) -> bool:
    """True for a folder of sentence-transformers, ours or another's."""
    return (folder / MODULES).is_file()


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM for a decoder that has its head, else AutoModel (encoders, trunks saved alone)."""
    text = config.get_text_config()
    names = config.architectures or []
    encoder = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not any(name.endswith("ForCausalLM") for name in names)
    headless = bool(names) and all(name.endswith("Model") for name in names) and not config.tie_word_embeddings
    causal = text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal and not encoder and not headless else AutoModel


# Writing


def write(encoder: Encoder, path: Path) -> None:
    """Write the encoder as it is: merged weights load anywhere, attached adapters are kept apart beside the base's weights.

    Raises:
        ContractError: the modules of another's folder, which only sentence-transformers can write.
    """
    if isinstance(encoder.pooler, ForeignPooling):
        raise ContractError(
            "save: this model came from a folder with modules of its own (Dense or several poolings), which are read but never "
            "written; use the folder itself"
        )
    path.mkdir(parents=True, exist_ok=True)
    config, settings = encoder.model.config, encoder.config
    config.is_causal = settings.attention == "causal"  # what sentence-transformers and other readers go by
    config.use_cache = True
    with _their_window(encoder), _their_vocabulary(encoder) as weights:
        base = encoder.model.get_base_model() if encoder.has_adapter else encoder.model
        base.save_pretrained(path, state_dict=weights)
    for name in encoder.adapters:
        encoder.save_adapter(path / ADAPTERS / name, name)
    if encoder.has_adapter:
        from ullme.adapted import AdaptedTransformer

        _carry(AdaptedTransformer, path)
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.max_tokens
    if encoder.prompts.suffix or encoder.special_ids:
        end_texts_with(tokenizer, encoder.prompts.begin, encoder.prompts.ending)
    tokenizer.save_pretrained(path)
    for name, content in _described(encoder).items():
        file = path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(encoder.pooler, LatentAttention | SpecialTokens):
        encoder.pooler.save(str(path / f"1_{type(encoder.pooler).__name__}"))
        if not (isinstance(encoder.pooler, SpecialTokens) and encoder.pooler.is_last_token):
            _carry(type(encoder.pooler), path)
    if _reads_several(encoder):
        from ullme.masked import MaskedTransformer

        _carry(MaskedTransformer, path)
    if settings.dim is not None:
        rows = torch.eye(settings.dim, encoder.width)
        save_file({"linear.weight": rows}, path / "2_Dense" / "model.safetensors")


@contextmanager
def _their_window(encoder: Encoder) -> Iterator[None]:
    """The configuration with the window that makes other readers see what `hidden_states` shows (its reason: `attention._mode`)."""
    config = encoder.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not window or encoder.config.attention == "causal":
        yield
        return
    config.ullme_sliding_window = window  # what `read` goes by
    config.sliding_window = window - 1 if encoder.config.sliding_window == "symmetric" else max(window, encoder.max_tokens + 1)
    try:
        yield
    finally:
        config.sliding_window = window
        delattr(config, "ullme_sliding_window")


@contextmanager
def _their_vocabulary(encoder: Encoder) -> Iterator[dict[str, Tensor] | None]:
    """The weights to write, None for the model's own; with special tokens, the configuration says how many rows there are."""
    from ullme.lora import plain_weights

    weights = plain_weights(encoder.model) if encoder.has_adapter else None
    if not isinstance(encoder.pooler, SpecialTokens):
        yield weights
        return
    base = encoder.model.get_base_model() if encoder.has_adapter else encoder.model
    weights, vectors = weights or base.state_dict(), encoder.pooler.vectors.detach()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {module: name for name, module in base.named_modules() if module in (embeddings, head)}
    scale = getattr(embeddings, "embed_scale", 1.0)  # Gemma 3 multiplies what it looks up
    table = torch.cat([embeddings.weight, (vectors / scale).to(embeddings.weight)])
    for module, name in names.items():
        tied = module is embeddings or module.weight is embeddings.weight
        weight = table if tied else torch.cat([module.weight, torch.zeros_like(vectors).to(module.weight)])
        weights[f"{name}.weight"] = weight
        if getattr(module, "bias", None) is not None:
            weights[f"{name}.bias"] = torch.cat([module.bias, module.bias.new_zeros(len(vectors))])
    config = base.config.get_text_config()
    rows = config.vocab_size
    config.vocab_size = len(table)
    try:
        yield weights
    finally:
        config.vocab_size = rows


def _reads_several(encoder: Encoder) -> bool:
    """Whether special tokens have to be kept from seeing each other, so that the transformer needs a mask of ours."""
    return len(encoder.special_ids) > 1


def _described(encoder: Encoder) -> dict[str, Any]:
    """File name -> JSON: the chain of modules and their settings."""
    settings = encoder.config
    kind = f"{PACKAGE}.base.modules.transformer.Transformer"
    kind = "adapted.AdaptedTransformer" if encoder.has_adapter else kind
    chain = [("", "masked.MaskedTransformer" if _reads_several(encoder) else kind)]
    files: dict[str, Any] = {
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {role: encoder.prompts.before(role) for role in ("query", "document")},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        SETTINGS: settings.model_dump(mode="json"),
    }
    special = encoder.pooler if isinstance(encoder.pooler, SpecialTokens) else None
    if isinstance(encoder.pooler, LatentAttention):
        chain.append(("1_LatentAttention", "latent.LatentAttention"))
    elif special is not None and not special.is_last_token:
        chain.append(("1_SpecialTokens", "special.SpecialTokens"))
    else:
        chain.append(("1_Pooling", f"{PACKAGE}.sentence_transformer.modules.pooling.Pooling"))
        files["1_Pooling/config.json"] = {
            "embedding_dimension": encoder.width,
            "pooling_mode": POOLING_MODES["last" if special is not None else settings.pooling],
            "include_prompt": settings.pool_prompt or special is not None,
        }
    if settings.dim is not None:
        chain.append(("2_Dense", f"{PACKAGE}.base.modules.dense.Dense"))
        files["2_Dense/config.json"] = {
            "in_features": encoder.width,
            "out_features": settings.dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    normalise = f"{len(chain)}_Normalize"
    chain.append((normalise, f"{PACKAGE}.base.modules.normalize.Normalize"))
    files[f"{normalise}/config.json"] = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    files[MODULES] = [{"idx": i, "name": str(i), "path": where, "type": kind} for i, (where, kind) in enumerate(chain)]
    return files


def _carry(kind: type, path: Path) -> None:
    """The source file of a module, for sentence-transformers to run."""
    source = Path(inspect.getfile(kind))
    (path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


# Reading


def read(folder: Path, *, device: torch.device | str, base_bits: int | None = None) -> Encoder:
    """The encoder that `write` wrote.

    Raises:
        ArtifactError: damaged. ConfigError: `base_bits` without the package that it needs.
    """
    from ullme.encoder import Encoder, EncoderConfig

    quantised = _quantised(device) if base_bits is not None else None

    try:
        config = EncoderConfig.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = _weights(folder, config, quantised)
        pooler: Any = None
        if config.pooling == "latent_attention":
            pooler = LatentAttention.load(str(folder), "1_LatentAttention")
        elif config.pooling == "special":
            pooler = SpecialTokens.load(str(folder), "1_SpecialTokens")
            model.resize_token_embeddings(pooler.first, mean_resizing=False)
        encoder = Encoder(model if quantised else model.to(device), tokenizer, config, pooler=pooler and pooler.to(device))
        adapters = sorted(path.parent for path in (folder / ADAPTERS).glob("*/adapter_config.json"))
        for path in adapters:
            encoder.read_adapter(path, path.name)
    except DAMAGED as error:
        raise ArtifactError(f"{folder}: the model cannot be read ({_first_line(error)})") from error
    if encoder.prompts.suffix or encoder.special_ids:
        end_texts_with(tokenizer, encoder.prompts.begin, encoder.prompts.end)
    return encoder


def _quantised(device: torch.device | str) -> dict[str, Any]:
    """Options of transformers for weights in 4 bits (NF4 with double quantisation, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("training.adapter.base_bits: 4 needs bitsandbytes, which is not installed: pip install 'ullme[qlora]'")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def _weights(folder: Path, config: EncoderConfig, quantised: dict[str, Any] | None) -> Any:
    architecture = AutoConfig.from_pretrained(folder)
    text = architecture.get_text_config()
    if hasattr(text, "ullme_sliding_window"):
        text.sliding_window = text.ullme_sliding_window
        delattr(text, "ullme_sliding_window")
    options = dict(quantised or {})
    if quantised:
        options["quantization_config"].bnb_4bit_compute_dtype = getattr(torch, config.dtype)
    model = auto_class(architecture).from_pretrained(
        folder,
        config=architecture,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        **options,
    )
    for layer in model.modules() if quantised else ():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # else a CPU repacks them when evaluated, for products without gradient
            layer.support_avx512bf16_for_cpu = False
    return model


def read_foreign(folder: Path, *, device: torch.device | str, dtype: str = "float32") -> Encoder:
    """An encoder from a sentence-transformers folder that somebody else wrote, its vectors brought to unit length.

    Raises:
        ConfigError: something in it that is not a text transformer followed by modules of sentence-transformers.
    """
    from ullme.encoder import Encoder, EncoderConfig

    try:
        chain = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        first = folder / chain[0]["path"]
        if not chain[0]["type"].endswith(".Transformer"):
            raise ValueError(f"its first module is {chain[0]['type']}")
        tokenizer = AutoTokenizer.from_pretrained(first)
        architecture = AutoConfig.from_pretrained(first)
        model = auto_class(architecture).from_pretrained(first, dtype=getattr(torch, dtype))
        pooling, pool_prompt, rest = _their_pooling(folder, chain[1:])
        encoder_only = auto_class(architecture) is AutoModel and not getattr(architecture, "is_decoder", False)
        one_way = getattr(architecture, "is_causal", None)
        config = EncoderConfig(
            attention="causal" if (not encoder_only if one_way is None else one_way) else "bidirectional",
            attn_implementation=str(model.config._attn_implementation),
            pooling=pooling,  # type: ignore[arg-type]
            pool_prompt=pool_prompt,
            max_tokens=_their_length(first, tokenizer, architecture),
            prompts=_their_prompts(folder),
            dtype=dtype,  # type: ignore[arg-type]
            base=folder.name,
        )
    except (*DAMAGED, ImportError) as error:
        raise ConfigError(
            f"{folder}: not a sentence-transformers folder of a text model ({_first_line(error)}); expected a Transformer module "
            "followed by modules that load without code of their own"
        ) from error
    pooler = ForeignPooling(rest, _their_dim(rest)) if rest else None
    return Encoder(model.to(device), tokenizer, config, pooler=pooler.to(device) if pooler else None)


def ready_settings(folder: Path) -> tuple[str, PromptConfig] | None:
    """Pooling and prompts that a sentence-transformers folder says its vectors are made with; None = it is no plain one."""
    try:
        chain = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        pooling, _, rest = _their_pooling(folder, chain[1:])
        return None if rest else (pooling, _their_prompts(folder))
    except (*DAMAGED, ImportError):
        return None


def _their_pooling(folder: Path, chain: Sequence[dict[str, Any]]) -> tuple[str, bool, list[Any]]:
    """Our name of a plain pooling and whether it counts the prompt, or the modules to run where there is more than that."""
    kinds = [entry["type"].rpartition(".")[2] for entry in chain]
    if kinds in (["Pooling"], ["Pooling", "Normalize"]):
        settings = json.loads((folder / chain[0]["path"] / "config.json").read_text(encoding="utf-8"))
        mode = settings.get("pooling_mode") or [name for key, name in LEGACY_MODES.items() if settings.get(key)] or ["mean"]
        modes = [mode] if isinstance(mode, str) else list(mode)
        ours = {theirs: name for name, theirs in POOLING_MODES.items()}
        if len(modes) == 1 and modes[0] in ours and not settings.get("pooling_mode_mean_sqrt_len_tokens"):
            return ours[modes[0]], bool(settings.get("include_prompt", True)), []
    from sentence_transformers.util import import_from_string

    modules = []
    for entry in chain:
        if not entry["type"].startswith(f"{PACKAGE}."):
            raise ValueError(f"module {entry['type']} is code of its own")
        modules.append(import_from_string(entry["type"]).load(str(folder), subfolder=entry["path"]))
    return "mean", True, modules


def _their_dim(modules: Sequence[Any]) -> int:
    for module in reversed(modules):
        for name in ("get_embedding_dimension", "get_sentence_embedding_dimension"):
            if hasattr(module, name):
                return int(getattr(module, name)())
        if hasattr(module, "out_features"):
            return int(module.out_features)
    raise ConfigError("none of the folder's modules says how long its vectors are")


def _their_length(folder: Path, tokenizer: Any, architecture: Any) -> int:
    file = folder / "sentence_bert_config.json"
    told = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length") if file.is_file() else None
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return int(told or min(value for value in (tokenizer.model_max_length, positions, 1 << 20) if value))


def _their_prompts(folder: Path) -> PromptConfig:
    file = folder / "config_sentence_transformers.json"
    prompts = (json.loads(file.read_text(encoding="utf-8")).get("prompts") or {}) if file.is_file() else {}
    document = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    return PromptConfig(query=prompts.get("query") or "", document=document)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
