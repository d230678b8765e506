"""One LLM, two modes: an embedder (bidirectional or causal attention, pooled, unit norm) and a causal language model.

    encoder = Encoder.load("my-model")              a folder of ours, or of sentence-transformers, or any LLM (hub, .gguf, pkg:)
    vectors = encoder.encode(["how do I ..."], prompt="query")

`Encoder.save` writes a sentence-transformers folder (see `ullme.folder`); `SentenceTransformer(folder)` gives the same vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ullme import folder
from ullme.attention import (
    AttentionReport,
    SlidingWindow,
    check_bidirectional,
    check_bottleneck,
    decoder_layers,
    hidden_states,
    is_encoder,
    trunk,
)
from ullme.backbone import PoolingKind
from ullme.batches import Batch, TokenRow, chunk_by_tokens, collate
from ullme.bottleneck import segments_of
from ullme.components import Section
from ullme.distributed import is_sharded
from ullme.engine import batch_tokens_for, stream
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.fused import is_compiled, ordered_weights
from ullme.heap import kept_memory
from ullme.language_model import chosen, proven_head, summed_logprobs, written
from ullme.latent import LatentAttention
from ullme.lora import activate, add_adapter, read_adapter, switched_off, write_adapter
from ullme.losses import token_logprobs
from ullme.pooling import pool
from ullme.prediction import PredictedRow
from ullme.progress import Progress
from ullme.prompts import PromptConfig, Prompts, Role, chat_parts, places_of
from ullme.shared_prefix import shared_states, shares_prefix
from ullme.special import SpecialTokens
from ullme.varlen import Packing, pack, packed_at_once, proven_packing, unpack

if TYPE_CHECKING:
    from ullme.training import LoraConfig

__all__ = ["Encoder", "EncoderConfig", "Role"]

logger = logging.getLogger(__name__)

AdapterName = Literal["embedding", "generation"]
Pooler = LatentAttention | SpecialTokens | folder.ForeignPooling
SHARED_IN = (torch.float32, torch.bfloat16, torch.float16)
"""Where a prompt is computed once for several rows. In float64 every digit counts, and norms that compute in float32 whatever they
are given round the sum of the rows' gradients, not each of them."""
PACK_FROM = 1024
"""Tokens; below it the proof that a model can be packed would cost more than packing saves."""


class EncoderConfig(Section):
    """How an LLM is used as an embedder; saved beside its weights."""

    attention: Literal["bidirectional", "bidirectional_where_possible", "causal"] = "bidirectional"
    sliding_window: SlidingWindow = "symmetric"
    attn_implementation: str = "sdpa"
    pooling: PoolingKind = "mean"
    pool_prompt: bool = False
    """The prompt's tokens are pooled like the text's."""
    dim: int | None = Field(default=None, ge=1)
    """Length of an embedding: its first `dim` numbers, at unit length again; null: all of them."""
    max_tokens: int = 512
    prompts: PromptConfig = PromptConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    language: Literal["adapter", "base"] = "adapter"
    """What a single adapter that is attached does for the language model: it serves it too, or is switched off."""
    base: str = ""
    """Where the weights came from, for people."""


class Encoder:
    """An LLM with its tokenizer, used in two modes. The one stateful noun of this package.

    pooler: trained or foreign modules that pool; None: the pure function that `config.pooling` names.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EncoderConfig, *, pooler: Pooler | None = None
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.config = config
        self.model.eval()
        if pooler is None and config.pooling in ("latent_attention", "special"):
            raise ContractError(f"pooling: {config.pooling} has weights of its own; expected them as `pooler`")
        self.pooler = pooler
        if isinstance(pooler, SpecialTokens):
            if config.attention != "causal":
                raise ConfigError("backbone.attention: special tokens read a text in one direction; set attention: causal")
            pooler.attach(self.model.get_input_embeddings())
        self._packings: dict[tuple[str, torch.dtype], Packing | None] = {}
        self._head: tuple[Any, nn.Module] | None = None
        self._reference: dict[str, Tensor] | None = None
        if config.dim is not None and config.dim > self.width:
            raise ConfigError(f"backbone.dim: expected at most {self.width}, the model's own length, got {config.dim}")
        tokenizer.truncation_side = "right"  # some tokenizers cut on the left, which would take the prompt away
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"{config.base}: the tokenizer has neither a padding nor an end-of-text token; set one before loading"
            )
        self.prompts = Prompts(config.prompts, tokenizer, config.max_tokens, special=self.special_ids)
        counts_all = config.pool_prompt or config.pooling in ("last", "special")
        if self.prompts.suffix and self.prompts.before("query") and not counts_all:
            raise ConfigError(
                f"backbone.pooling: {config.pooling} with a prompt that is left out and a suffix: sentence-transformers, which "
                "counts the suffix as prompt, would leave out the text's first tokens too; use pooling: last, or pool_prompt: true"
            )

    @classmethod
    def load(cls, where: Path | str, *, device: str = "auto", base_bits: Literal[4] | None = None) -> Encoder:
        """Open a model: a folder that `save` wrote, anybody's sentence-transformers folder, or an LLM.

        where: a folder; or what `backbone.model` takes: a hub id (`owner/name`, `owner/name@commit`), `pkg:NAME/FILE`,
        `tiny:FAMILY`, a .gguf file. A plain LLM gets the defaults of `BackboneConfig`: bidirectional attention, mean pooling.
        base_bits: 4 loads the weights of a folder that `save` wrote in 4-bit NF4, to train an adapter on them (QLoRA).

        Raises:
            ArtifactError: a folder that is no model, or damaged. ConfigError: it cannot be had or used; says what to do.
        """
        from ullme import backbone

        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        name, _, revision = str(where).partition("@")
        path = Path(where) if Path(where).is_dir() else backbone.fetch(name, revision or None)
        if path is None:
            return backbone.embedder(backbone.BackboneConfig(model=name).resolved()).to(chosen)
        if (path / folder.SETTINGS).is_file():
            return folder.read(path, device=chosen, base_bits=base_bits)
        if folder.is_sentence_folder(path):
            return folder.read_foreign(path, device=chosen, dtype=backbone.native_dtype())
        if (path / "config.json").is_file():
            return backbone.embedder(backbone.BackboneConfig(model=str(path)).resolved()).to(chosen)
        raise ArtifactError(
            f"{path}: no {folder.SETTINGS}; expected a model folder written by this project, by sentence-transformers or by "
            "transformers"
        )

    def to(self, device: str | torch.device) -> Encoder:
        """Move the weights; returns itself."""
        self.model.to(device)
        if self.pooler is not None:
            self.pooler.to(device)
        return self

    @property
    def width(self) -> int:
        """Length of what the pooling makes."""
        if isinstance(self.pooler, folder.ForeignPooling | SpecialTokens):
            return self.pooler.dim
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.config.dim or self.width

    @property
    def special_ids(self) -> list[int]:
        """The special tokens behind every text that is embedded, as token ids; none for other ways of pooling."""
        return self.pooler.ids if isinstance(self.pooler, SpecialTokens) else []

    @property
    def max_tokens(self) -> int:
        """Longest text, prompt included."""
        return self.config.max_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def shortened(self, dim: int) -> Encoder:
        """The same weights with embeddings of the first `dim` numbers (Matryoshka, arXiv 2205.13147)."""
        config = self.config.model_copy(update={"dim": dim})
        return Encoder(self.model, self.tokenizer, config, pooler=self.pooler)

    def check_attention(self) -> AttentionReport | None:
        """Prove the attention switch on these weights (see `ullme.attention`); None for causal attention, which needs no proof.

        Raises:
            ConfigError: names the layers that do not do what the configuration says.
        """
        settings = self.config
        if settings.attention == "causal":
            if self.special_ids:
                check_bottleneck(self.model)
            if is_encoder(self.model):
                raise ConfigError(
                    f"backbone.attention: {settings.base} is an encoder and always bidirectional; set attention: bidirectional"
                )
            return None
        report = check_bidirectional(
            self.model,
            where_possible=settings.attention == "bidirectional_where_possible",
            sliding_window=settings.sliding_window,
        )
        if report.causal_layers:
            logger.warning("%s", report)
        return report

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> weight of everything that learns: adapters or the whole LLM, and a pooling that has weights."""
        found = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if isinstance(self.pooler, LatentAttention | SpecialTokens):
            found |= {f"pooler.{name}": weight for name, weight in self.pooler.named_parameters()}
        return found

    # Texts -> tokens

    def tokenise(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        dataset: str | Sequence[str] = "",
        instructions: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[TokenRow]:
        """Prompt + text + suffix as token rows, the text cut at `max_tokens` (see `ullme.prompts`); None: at the usual length."""
        return self.prompts.tokenise(texts, role, dataset=dataset, instructions=instructions, max_tokens=max_tokens)

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Pad token rows into a batch on the model's device."""
        pad_id: Any = self.tokenizer.pad_token_id
        return collate(rows, pad_id=pad_id).to(self.device)

    # Embedding mode

    def embed(self, batch: Batch) -> Float[Tensor, "B D"]:
        """Unit-norm embeddings in float32, with gradient if enabled. The LM head is not run."""
        return self._pooled(self._states(batch, masked=len(self.special_ids) > 1), batch)

    def _states(self, batch: Batch, *, masked: bool) -> Float[Tensor, "B S D"]:
        """The trunk in the attention of embeddings. masked: with the mask of special tokens, which a single one at the end of
        each row does not need.
        """
        if len(self.adapters) > 1:
            activate(self.model, "embedding")
        return hidden_states(
            self.model,
            batch.input_ids,
            batch.attention_mask,
            is_causal=self.config.attention == "causal",
            sliding_window=self.config.sliding_window,
            segments=segments_of(batch.input_ids, self.special_ids[0]) if masked else None,
        )

    def embed_rows(self, rows: Sequence[TokenRow], *, packed: bool = False) -> Float[Tensor, "B D"]:
        """The same for token rows, without gradient: as a padded batch, or packed side by side where `packs` says so."""
        if not packed or len(rows) == 1:
            return self.embed(self.collate(rows))
        if len(self.adapters) > 1:
            activate(self.model, "embedding")
        parts = self._parts(rows)
        hidden = packed_at_once(
            self.model,
            [pack([row.ids for row in part], device=self.device) for part in parts],
            is_causal=self.config.attention == "causal",
            sliding_window=self.config.sliding_window,
            float32_residual=self._packing == "float32_residual",
        )
        batches = [self.collate(part) for part in parts]
        pooled = [self._pooled(unpack(of, batch.attention_mask), batch) for of, batch in zip(hidden, batches, strict=True)]
        return torch.cat(pooled)

    def _parts(self, rows: Sequence[TokenRow]) -> list[Sequence[TokenRow]]:
        """The rows that are computed at once: on a CPU two halves of the tokens, where that is enough for both."""
        ends = np.cumsum([len(row) for row in rows])
        shared = self.device.type == "cpu" and torch.get_num_threads() % 2 == 0 and not torch.is_grad_enabled()
        if not shared or ends[-1] < 2 * PACK_FROM or len(rows) < 2 or is_compiled(trunk(self.model)):
            return [rows]
        half = min(len(rows) - 1, max(1, int(np.searchsorted(ends, ends[-1] / 2)) + 1))
        return [rows[:half], rows[half:]]

    def packs(self, tokens: int) -> bool:
        """Whether rows of so many tokens in all are encoded faster side by side than padded, and come out the same."""
        return tokens >= PACK_FROM and len(self.special_ids) < 2 and self._packing is not None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """On a CPU: memory is kept between passes, and weights lie as the products want them, as long as the block lasts."""
        if self.device.type != "cpu":
            yield
            return
        rows = batch_tokens_for(self.device)
        with kept_memory(), ordered_weights(trunk(self.model), rows=rows) if self._packing else nullcontext():
            yield

    def compile(self) -> None:
        """Compile each layer of the LLM for encoding, at the first batch (torch.compile; on a CPU it needs a C++ compiler)."""
        self.packs(PACK_FROM)  # the proof runs shapes of its own, for which nothing shall be compiled
        for layer in decoder_layers(self.model):
            layer.compile(dynamic=True)

    @property
    def _packing(self) -> Packing | None:
        """How rows are packed on the device where the weights are: proven once, on these weights (see `ullme.varlen`)."""
        weight = next(self.model.parameters())
        place = (weight.device.type, weight.dtype)
        if place not in self._packings:
            causal = self.config.attention == "causal"
            self._packings[place] = proven_packing(self.model, is_causal=causal, sliding_window=self.config.sliding_window)
        return self._packings[place]

    def _pooled(self, hidden: Float[Tensor, "B S H"], batch: Batch) -> Float[Tensor, "B D"]:
        counted = batch.attention_mask if self.config.pool_prompt else batch.pooled_mask
        if isinstance(self.pooler, SpecialTokens):
            pooled = self.pooler.pool(hidden, batch.input_ids >= self.pooler.first)
        elif self.pooler is not None:
            pooled = self.pooler.pool(hidden, counted)
        else:
            pooled = pool(self.config.pooling, hidden, counted, batch.attention_mask)
        return nn.functional.normalize(pooled[:, : self.dim], dim=-1)

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: Role = "query",
        dataset: str | Sequence[str] = "",
        instructions: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Texts -> float32 [N D], unit norm, in the order given. `torch.from_numpy` of it costs nothing.

        dataset: whose templates are taken, where the configuration has several: of all texts, or of each; instructions: one
        per text, empty = the configured one; batch_tokens: tokens per forward pass (None: what suits the device), halved where
        memory does not suffice; progress: show a bar.

        Raises:
            NotFinite: a vector is NaN or infinite; names the texts' places.
        """
        if isinstance(texts, str):
            raise ContractError("encode: expected a list of texts, got one string; write encode([text])")
        items = list(zip(texts, places_of(texts, dataset, instructions), strict=True))

        def tokenise(items: Sequence[tuple[str, tuple[str, str]]]) -> list[TokenRow]:
            own, said = ([place[which] for _, place in items] for which in range(2))
            return self.tokenise([text for text, _ in items], prompt, dataset=own, instructions=said)

        vectors = np.empty((len(items), self.dim), dtype=np.float32)
        with self._evaluating(), Progress(len(items), "encode", unit="text") if progress else nullcontext() as bar:
            for block in stream(self, items, tokenise, batch_tokens=batch_tokens):
                block.check_finite([f"text {position}" for position in block.positions])
                vectors[block.positions] = block.vectors
                if bar is not None:
                    bar.advance(len(block.positions))
        return vectors

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    # Language-model mode

    def sequence_logprobs(self, batch: Batch) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """Summed log-probability, and number, of the tokens that are not prompt, given all tokens before them (causal).

        `batch.prompt_mask` marks the condition (question and template); its tokens are never scored. Only scored
        positions reach the LM head.
        """
        head = self.head
        with self._language():
            hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask, is_causal=True)
        return summed_logprobs(hidden[:, :-1], batch.input_ids[:, 1:], batch.pooled_mask[:, 1:], head)

    def writes(self, batch: Batch) -> Bool[Tensor, " B"]:
        """Per row: whether it would write exactly the tokens that are not prompt, the likeliest token each time (causal)."""
        head = self.head
        with self._language():
            hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask, is_causal=True)
        return chosen(hidden[:, :-1], batch.input_ids[:, 1:], batch.pooled_mask[:, 1:], head)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        chat: bool = False,
        seed: int = 0,
    ) -> list[str]:
        """What the LLM writes after each prompt, without the prompt. All prompts are one batch.

        temperature: 0 is greedy; chat: each prompt is a user's turn of the tokenizer's chat template.

        Raises:
            ConfigError: it has no head to write with, or no chat template.
        """
        if isinstance(prompts, str):
            raise ContractError("generate: expected a list of prompts, got one string; write generate([prompt])")
        _ = self.head  # refuses an encoder model
        before, after = chat_parts(self.tokenizer) if chat else ("", "")
        rows = [TokenRow(self.tokenizer(before + prompt + after)["input_ids"]) for prompt in prompts]
        pad_id: Any = self.tokenizer.pad_token_id
        batch = collate(rows, pad_id=pad_id, padding_side="left").to(self.device)
        with self._evaluating(), self._language():
            return written(
                self.model,
                self.tokenizer,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )

    @contextmanager
    def _language(self) -> Iterator[None]:
        """The adapter of the language model, as long as the block lasts: its own, the only one, or none."""
        if len(self.adapters) > 1:
            activate(self.model, "generation")
        elif self.has_adapter and self.config.language == "base":
            with switched_off(self.model):
                yield
            return
        yield

    def predicted_logprobs(self, rows: Sequence[PredictedRow]) -> Float[Tensor, " T"]:
        """Log-probabilities of the tokens that are predicted, row by row, in the attention of embeddings.

        Each is predicted from the state before it; only these states reach the LM head.
        """
        head = self.head
        batch = self.collate([TokenRow(row.ids) for row in rows])
        hidden = self._states(batch, masked=bool(self.special_ids))
        row = torch.tensor([number for number, of in enumerate(rows) for _ in of.places], dtype=torch.long, device=self.device)
        place = torch.as_tensor(np.concatenate([of.places for of in rows]), device=self.device)
        wanted = torch.as_tensor(np.concatenate([of.targets for of in rows]), device=self.device)
        return token_logprobs(hidden[row, place - 1], head, wanted)

    def candidate_logprobs(self, rows: Sequence[Sequence[TokenRow]]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
        """The same for the rows of several groups, one group after the other; the rows of a group share their prompt.

        The prompt goes through the model once for a group's rows, side by side behind it, where that gives the same.
        """
        flat = [row for group in rows for row in group]
        several = len(flat) > len(rows) and all(row.prompt for row in flat)
        if several and next(self.model.parameters()).dtype in SHARED_IN and shares_prefix(self.model):
            with self._language():
                states, tokens, owners = shared_states(self.model, rows)
            logprobs = token_logprobs(states, self.head, tokens)
            return logprobs.new_zeros(len(flat)).index_add(0, owners, logprobs), owners.bincount(minlength=len(flat))
        places = self._alike(list(map(len, flat)))
        found = [self.sequence_logprobs(self.collate([flat[place] for place in some])) for some in places]
        order = torch.tensor([place for some in places for place in some], device=self.device).argsort()
        return torch.cat([sums for sums, _ in found])[order], torch.cat([counts for _, counts in found])[order]

    def _alike(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of rows that go through the model together, of about one length; all at once where weights are sharded, since
        every process must then run the model equally often.
        """
        if any(map(is_sharded, self.model.parameters())):
            return [list(range(len(lengths)))]
        return list(chunk_by_tokens(lengths, sum(lengths) + max(lengths) * len(lengths)))

    @property
    def head(self) -> nn.Module:
        """The LM head: hidden state -> vocabulary, with the model's own soft-cap or scale (see `ullme.language_model`)."""
        embeddings = self.model.get_output_embeddings()
        if self._head is None or self._head[0] is not embeddings:
            self._head = (embeddings, proven_head(self.model, self.config.base))
        return self._head[1]

    # Adapters

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are attached: `embedding`, and `generation` where language has one of its own."""
        return list(getattr(self.model, "peft_config", {}))

    @property
    def has_adapter(self) -> bool:
        """True while an adapter is attached."""
        return bool(self.adapters)

    def add_lora(self, config: LoraConfig, name: AdapterName = "embedding") -> None:
        """Start a new LoRA on every linear layer of the decoder (float32 weights, product with the trunk's dtype).

        With an adapter for `generation` beside it, the one for `embedding` serves embeddings alone; each mode takes its own.
        """
        self.model = add_adapter(self.model, config, name)

    def save_adapter(self, path: Path, name: AdapterName | str = "embedding") -> None:
        """Write one adapter as peft does, without the place that its base was loaded from."""
        write_adapter(self.model, path, name, base=self.config.base)

    def read_adapter(self, path: Path, name: AdapterName | str = "embedding") -> None:
        """Attach an adapter that `save_adapter` wrote."""
        self.model = read_adapter(self.model, path, name)

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
        with switched_off(self.model):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model that preference losses compare with, as long as the block lasts: the base, or what `keep_reference` took."""
        if self._reference is None:
            with self.adapters_off():
                yield
            return
        named = dict(self.model.named_parameters())
        now = {name: named[name].data for name in self._reference}
        try:
            for name, kept in self._reference.items():
                named[name].data = kept
            yield
        finally:
            for name, data in now.items():
                named[name].data = data

    def keep_reference(self, adapters: Mapping[str, Tensor] | None) -> None:
        """Compare with these weights of the adapters, by name, from now on; None: with the base."""
        self._reference = None if adapters is None else {name: tensor.to(self.device) for name, tensor in adapters.items()}

    def drop_adapters(self) -> None:
        """The base model again, without what the adapters learned."""
        if self.has_adapter:
            self.model = self.model.unload()

    def merge_adapter(self) -> None:
        """Fold the embedding adapter into the weights for good; one for generation is dropped, `save_adapter` keeps it."""
        if self.has_adapter:
            self.model = self.model.merge_and_unload(adapter_names=["embedding"])

    # Saving

    def save(self, path: Path | str) -> None:
        """Write a sentence-transformers folder. Merged weights load anywhere; attached adapters are written apart."""
        folder.write(self, Path(path))
