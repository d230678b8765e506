"""A tiny random LLM with a byte-level tokenizer, made on the spot: trials and tests without weights or network."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ullme.errors import ConfigError

__all__ = ["tiny_causal_lm", "tiny_encoder"]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WHERE_KNOWN = {
    "head_dim": 16,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
"""Given to the families whose configuration has these fields: short windows and few experts."""

WINDOWED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LAST_TWO_WINDOWED = {"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": WINDOWED,
    "exaone4": WINDOWED,
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "gemma4_text": WINDOWED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 258, "global_head_dim": 16},
    "gpt_oss": WINDOWED,
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"num_hidden_layers": 4, "layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 8},
    "mamba": {"num_hidden_layers": 2, "state_size": 8},
    "ministral": WINDOWED,
    "olmo3": WINDOWED,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2": LAST_TWO_WINDOWED,
    "qwen3": LAST_TWO_WINDOWED,
    "qwen3_next": LINEAR
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    | {"linear_value_head_dim": 16, "decoder_sparse_step": 1},
    "smollm3": {"num_hidden_layers": 4, "use_sliding_window": True, "layer_types": WINDOWED["layer_types"]},
}
"""What a family needs beyond the sizes: at least two layers of each kind that it has."""

ENCODERS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 64},
    "modernbert": {"num_hidden_layers": 4, "layer_types": WINDOWED["layer_types"], "local_attention": 16},
}


def tiny_causal_lm(family: str, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of a transformers architecture (`llama`, `qwen2`, ...), float32, and a byte tokenizer.

    Two layers, or four where there are layers of two kinds; sliding windows of 8 tokens.

    Raises:
        ConfigError: transformers has no such model type.
    """
    return _tiny(AutoModelForCausalLM, family, seed, FAMILIES.get(family, {}) | {"tie_word_embeddings": True})


def tiny_encoder(family: str, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random encoder model (`bert`, `roberta`, `modernbert`, ...) without a head, float32, and a byte tokenizer.

    Raises:
        ConfigError: transformers has no such model type.
    """
    return _tiny(AutoModel, family, seed, ENCODERS.get(family, {}))


def _tiny(kind: Any, family: str, seed: int, extra: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    tokenizer = byte_tokenizer()
    try:
        known = {field.name for field in fields(CONFIG_MAPPING[family])} if family in CONFIG_MAPPING else set()
        small = {name: value for name, value in WHERE_KNOWN.items() if name in known}
        config = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **{"bos_token_id": None} | SIZES | small | extra
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = kind.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ConfigError(f"backbone.model: tiny:{family}: transformers has no causal LM of that type") from error
    return model, tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes, <pad> = 0 and <eos> = 1; every text has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="right")
