"""One LLM, two modes: an embedder (bidirectional or causal attention, pooled, unit norm) and a causal language model.

`Encoder.save` writes a sentence-transformers folder (modules.json, pooling, normalise, prompts) whose weights are those of
the causal LM, plus `ullme.json`; `SentenceTransformer(folder)` loads it plainly and gives the same vectors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ullme.attention import check_bidirectional, expand_mask, trunk
from ullme.backbone import PoolingKind, PromptConfig
from ullme.batches import Batch, TokenRow, chunk_by_tokens, collate
from ullme.components import Section
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.lora import speed_up
from ullme.losses import token_logprobs
from ullme.pooling import pool

if TYPE_CHECKING:
    from ullme.training import LoraConfig

__all__ = ["Encoder", "EncoderConfig", "Role"]

logger = logging.getLogger(__name__)

Role = Literal["query", "document"]
SETTINGS = "ullme.json"


class EncoderConfig(Section):
    """How an LLM is used as an embedder; saved beside its weights."""

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    attn_implementation: str = "sdpa"
    pooling: PoolingKind = "mean"
    max_tokens: int = 512
    prompts: PromptConfig = PromptConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    base: str = ""
    """Where the weights came from, for people."""


class Encoder:
    """A causal LM with its tokenizer, used in two modes. The one stateful noun of this package."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EncoderConfig) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.config = config
        self.model.eval()
        tokenizer.truncation_side = "right"  # some tokenizers cut on the left, which would take the prompt away
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"{config.base}: the tokenizer has neither a padding nor an end-of-text token; set one before loading"
            )
        self._prompt_tokens = {role: self._check_prompt(role) for role in ("query", "document")}

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Encoder:
        """Open a folder that `save` wrote.

        Raises:
            ArtifactError: not such a folder, or damaged.
        """
        folder = Path(path)
        settings = folder / SETTINGS
        if not settings.is_file():
            raise ArtifactError(f"{folder}: no {SETTINGS}; expected a model folder written by this project")
        try:
            config = EncoderConfig.model_validate_json(settings.read_text(encoding="utf-8"))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation
            )
        except (OSError, ValueError, ValidationError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the model cannot be read ({str(error).splitlines()[0]})") from error
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        return cls(model.to(chosen), tokenizer, config)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def max_tokens(self) -> int:
        """Longest text, prompt included."""
        return self.config.max_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def check_attention(self) -> None:
        """Prove the attention switch on these weights (see `ullme.attention`)."""
        if self.config.attention == "bidirectional":
            check_bidirectional(self.model)

    # Texts -> tokens

    def tokenise(self, texts: Sequence[str], role: Role) -> list[TokenRow]:
        """Prompt + text as token rows, the text cut at `max_tokens`; the prompt never is."""
        prompt, prompt_tokens = getattr(self.config.prompts, role), self._prompt_tokens[role]
        if not texts:
            return []
        encoded = self.tokenizer([prompt + text for text in texts], truncation=True, max_length=self.max_tokens)["input_ids"]
        return [TokenRow(ids, prompt_tokens) for ids in encoded]

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Pad token rows into a batch on the model's device."""
        pad_id: Any = self.tokenizer.pad_token_id
        return collate(rows, pad_id=pad_id).to(self.device)

    def _check_prompt(self, role: str) -> int:
        """Number of prompt tokens, after checking that they stay the same whatever text follows."""
        prompt = getattr(self.config.prompts, role)
        if not prompt:
            return 0
        alone = self.tokenizer(prompt)["input_ids"]
        if alone and alone[-1] == self.tokenizer.eos_token_id and self.tokenizer("")["input_ids"]:
            alone = alone[:-1]
        for text in ("parse", "The", "1", "_x", "(a)"):
            if self.tokenizer(prompt + text)["input_ids"][: len(alone)] != alone:
                raise ConfigError(
                    f"backbone.prompts.{role}: the tokenizer merges the end of {prompt!r} with the text that follows, so the "
                    "prompt could not be left out of the pooling; end it with a newline or a colon, not with a space"
                )
        if len(alone) + 4 > self.max_tokens:
            raise ConfigError(f"backbone.max_tokens is {self.max_tokens}, but the {role} prompt alone takes {len(alone)} tokens")
        return len(alone)

    # Embedding mode

    def embed(self, batch: Batch) -> Float[Tensor, "B D"]:
        """Unit-norm embeddings in float32, with gradient if enabled. The LM head is not run."""
        hidden = trunk(self.model)(
            input_ids=batch.input_ids,
            attention_mask=expand_mask(batch.attention_mask),
            is_causal=self.config.attention == "causal",
            use_cache=False,
        ).last_hidden_state
        return pool(self.config.pooling, hidden, batch.pooled_mask, batch.attention_mask)

    def encode(self, texts: Sequence[str], *, prompt: Role = "query", batch_tokens: int = 16_384) -> np.ndarray:
        """Texts -> float32 [N D], unit norm, in the order given."""
        if isinstance(texts, str):
            raise ContractError("encode: expected a list of texts, got one string; write encode([text])")
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for positions, block in self.encode_rows(self.tokenise(texts, prompt), batch_tokens=batch_tokens):
            vectors[positions] = block
        return vectors

    def encode_rows(self, rows: Sequence[TokenRow], *, batch_tokens: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """(positions, float32 vectors) per batch: sorted by length, cut by token budget."""
        was_training = self.model.training
        self.model.eval()
        try:
            for positions in chunk_by_tokens([len(row) for row in rows], batch_tokens):
                with torch.inference_mode():  # not around the yield: the caller's own work is not part of it
                    vectors = self.embed(self.collate([rows[position] for position in positions]))
                yield positions, vectors.cpu().numpy()
        finally:
            self.model.train(was_training)

    # Language-model mode

    def sequence_logprobs(self, batch: Batch) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """Summed log-probability, and number, of the tokens that are not prompt, given all tokens before them (causal).

        `batch.prompt_mask` marks the condition (question and template); its tokens are never scored. Only scored
        positions reach the LM head.
        """
        hidden = trunk(self.model)(
            input_ids=batch.input_ids, attention_mask=expand_mask(batch.attention_mask), is_causal=True, use_cache=False
        ).last_hidden_state
        scored = batch.pooled_mask[:, 1:]
        rows = scored.nonzero()[:, 0]
        logprobs = token_logprobs(hidden[:, :-1][scored], self.head, batch.input_ids[:, 1:][scored])
        sums = torch.zeros(len(scored), dtype=logprobs.dtype, device=logprobs.device).index_add(0, rows, logprobs)
        return sums, scored.sum(1)

    @property
    def head(self) -> nn.Module:
        """The LM head: hidden state -> vocabulary, with the model's own soft-cap or scale."""
        config = self.model.config.get_text_config()
        unusual = [name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, name, None)]
        if unusual:
            raise ConfigError(f"{self.config.base}: its logits use {unusual[0]}, which the generation terms do not apply yet")
        return self.model.get_output_embeddings()

    # Adapters

    def add_lora(self, config: LoraConfig) -> None:
        """Start a new LoRA on every linear layer of the decoder (float32 weights, product with the trunk's dtype)."""
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model

        self.model = get_peft_model(
            self.model,
            PeftLora(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
                task_type="CAUSAL_LM",
            ),
        )
        speed_up(self.model)

    @property
    def has_adapter(self) -> bool:
        """True while a LoRA is attached."""
        return hasattr(self.model, "peft_config")

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base model, as long as the block lasts: the reference of preference losses.

        Raises:
            ConfigError: there is no adapter, so the base model no longer exists.
        """
        if not self.has_adapter:
            raise ConfigError(
                "a reference model was asked for, but every weight is trained: use an adapter, or preference weight 0"
            )
        with self.model.disable_adapter():
            yield

    def merge_adapter(self) -> None:
        """Fold the LoRA into the weights for good."""
        if self.has_adapter:
            self.model = self.model.merge_and_unload()

    # Saving

    def save(self, path: Path) -> None:
        """Write a sentence-transformers folder. A LoRA must be merged first."""
        if self.has_adapter:
            raise ContractError("save: merge_adapter() first; the folder holds plain weights")
        path.mkdir(parents=True, exist_ok=True)
        config = self.model.config
        config.is_causal = self.config.attention == "causal"  # what sentence-transformers and other readers go by
        config.use_cache = True
        self.model.save_pretrained(path)
        self.tokenizer.model_max_length = self.max_tokens
        self.tokenizer.save_pretrained(path)
        modes = {"mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "first": "cls", "max": "max"}
        package = "sentence_transformers"
        modules = [
            ("", f"{package}.base.modules.transformer.Transformer"),
            ("1_Pooling", f"{package}.sentence_transformer.modules.pooling.Pooling"),
            ("2_Normalize", f"{package}.base.modules.normalize.Normalize"),
        ]
        described: dict[str, Any] = {
            "modules.json": [{"idx": i, "name": str(i), "path": where, "type": kind} for i, (where, kind) in enumerate(modules)],
            "sentence_bert_config.json": {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
            },
            "1_Pooling/config.json": {
                "embedding_dimension": self.dim,
                "pooling_mode": modes[self.config.pooling],
                "include_prompt": False,
            },
            "2_Normalize/config.json": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
            "config_sentence_transformers.json": {
                "model_type": "SentenceTransformer",
                "prompts": self.config.prompts.model_dump(),
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            SETTINGS: self.config.model_dump(mode="json"),
        }
        for name, content in described.items():
            file = path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
