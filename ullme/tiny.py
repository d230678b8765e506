"""A tiny random LLM with a byte-level tokenizer, made on the spot: trials and tests without weights or network."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ullme.errors import ConfigError

__all__ = ["tiny_causal_lm"]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_causal_lm(family: str, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A two-layer random model of a transformers architecture (`llama`, `qwen2`, ...), float32, and a byte tokenizer.

    Raises:
        ConfigError: transformers has no such model type.
    """
    import torch

    tokenizer = byte_tokenizer()
    try:
        config = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True, **SIZES
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
