"""Tiny models and data sets for the tests of the training core."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ullme.artifacts import ArtifactRef, Draft, Inputs, Stage, Store
from ullme.batches import TokenRow, with_some_left_out
from ullme.components import Section
from ullme.encoder import Encoder, EncoderConfig
from ullme.gradcache import TrainBatch
from ullme.objectives import Objective
from ullme.prompts import PromptConfig
from ullme.special import SpecialTokens
from ullme.tiny import tiny_causal_lm
from ullme.training import LoraConfig

torch.set_num_threads(1)

WORDS = ["alpha", "beta", "gamma", "delta", "lambda", "omega", "sigma", "kappa", "theta", "zeta", "iota", "rho"]


def tiny_encoder(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None, **config: Any
) -> Encoder:
    """A random two-layer encoder; with `lora`, an adapter whose B is not zero, so that every weight has a gradient."""
    model, tokenizer = tiny_causal_lm(family)
    encoder = Encoder(model.to(dtype), tokenizer, EncoderConfig(**{"max_tokens": 48, "base": f"tiny:{family}", **config}))
    return encoder if lora is None else adapted(encoder, lora, dtype)


def adapted(encoder: Encoder, lora: LoraConfig, dtype: torch.dtype) -> Encoder:
    """With an adapter whose B is not zero."""
    torch.manual_seed(1)
    encoder.add_lora(lora)
    for name, parameter in encoder.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return encoder


def toy_batch(encoder: Encoder, *, seed: int = 0, scored: Sequence[int] = (0, 1, 3, 4)) -> TrainBatch:
    """Five queries with two candidates beside the target: shared passages, missing negatives, a known positive and a guide."""
    random = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(str(word) for word in random.choice(WORDS, count))

    queries = [words(count) for count in (1, 3, 2, 1, 2)]
    texts = [words(count) for count in (4, 1, 2, 5, 3, 1, 2)]
    candidates = np.array([[0, 1, 2], [3, 0, -1], [4, 5, 1], [0, 6, 3], [5, -1, -1]])  # 0 is a target twice
    known = np.zeros((5, 7), dtype=bool)
    known[0, 3] = known[2, 6] = True
    random = np.random.default_rng([seed, 1])
    guide = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (random.normal(size=(n, 64)) for n in (5, 7))]
    bodies = [list(encoder.tokenizer(text)["input_ids"])[:16] for text in texts]
    return TrainBatch(
        query_ids=[f"q{n}" for n in range(5)],
        queries=encoder.tokenise(queries, "query"),
        documents=encoder.tokenise(texts, "document"),
        candidates=candidates,
        known=known,
        scored=list(scored),
        prompts=[encoder.tokenizer(f"{queries[row]}\n")["input_ids"] for row in scored],
        passages=[[bodies[c] if c >= 0 else [] for c in candidates[row]] for row in scored],
        guide_queries=guide[0],
        guide_documents=guide[1],
    )


def gem_encoder(
    family: str = "llama", count: int = 1, *, lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32, **special: Any
) -> Encoder:
    """A tiny LLM with special tokens; with `lora`, an adapter whose B is not zero."""
    plain = tiny_encoder(family, dtype=dtype)
    embeddings = plain.model.get_input_embeddings()
    pooler = SpecialTokens(plain.width, count, first=len(embeddings.weight), **special)
    pooler.draw(embeddings)
    implementation = str(plain.model.config._attn_implementation)
    settings = EncoderConfig(
        attention="causal", pooling="special", attn_implementation=implementation, max_tokens=48, base=f"tiny:{family}"
    )
    encoder = Encoder(plain.model, plain.tokenizer, settings, pooler=pooler.to(dtype))
    return encoder if lora is None else adapted(encoder, lora, dtype)


def text_batch(encoder: Encoder, objective: Objective, *, seed: int = 0) -> TrainBatch:
    """Seven texts, each its own positive, read as the objective reads them."""
    random = np.random.default_rng(seed)
    texts = [" ".join(str(word) for word in random.choice(WORDS, count)) for count in (4, 1, 2, 5, 3, 6, 2)]
    rows, ending = encoder.tokenise(texts, "document"), len(encoder.prompts.ending)
    return TrainBatch(
        query_ids=[f"t{n}" for n in range(7)],
        queries=rows,
        documents=[with_some_left_out(row, objective.token_dropout, random, ending=ending) for row in rows],
        candidates=np.arange(7)[:, None],
        known=np.zeros((7, 7), dtype=bool),
        predicted=objective.prediction.rows(rows, encoder, random) if objective.prediction else [],
    )


def logprob_by_hand(encoder: Encoder, row: TokenRow) -> torch.Tensor:
    """Sum over the tokens after the prompt of log softmax(all logits)[token], one row without padding, causal."""
    ids = torch.tensor([list(row.ids)])
    logs = encoder.model(input_ids=ids, is_causal=True, use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([logs[place - 1, ids[0, place]] for place in range(row.prompt, len(row.ids))]).sum()


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Gradient of every trainable weight, taken away from the model."""
    found = {}
    for name, parameter in encoder.model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


class ToyData(Section):
    """The data artifact of the tests: queries name a word, their document repeats it."""

    documents: int = 24
    train_queries: int = 11
    texts: tuple[str, ...] = ()


def _write_toy(section: ToyData, inputs: Inputs, draft: Draft) -> None:
    random = np.random.default_rng(5)
    words = ["".join(chr(97 + int(c)) for c in random.integers(0, 26, 4)) for _ in range(section.documents)]
    texts = list(section.texts) or [f"the {word} of " + " ".join(random.choice(WORDS, 1 + n % 4)) for n, word in enumerate(words)]
    ids = [f"d{n}" for n in range(len(texts))]
    queries = range(section.train_queries)
    negatives = [(q, d) for q in queries for d in random.choice(len(texts), q % 4, replace=False).tolist() if d != q]
    tables: dict[str, dict[str, list[Any]]] = {
        "documents": {
            "id": ids,
            "text": texts,
            "title": [""] * len(ids),
            "searchable": [True] * len(ids),
            "held_out": [False] * len(ids),
        },
        "queries": {
            "id": [f"q{q}" for q in queries],
            "text": [words[q] for q in queries],
            "split": ["train"] * len(queries),
            "instruction": [""] * len(queries),
        },
        "qrels": {"query_id": [f"q{q}" for q in queries], "doc_id": [f"d{q}" for q in queries], "score": [1] * len(queries)},
        "negatives": {"query_id": [f"q{q}" for q, _ in negatives], "doc_id": [f"d{d}" for _, d in negatives]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), draft.path / f"{name}.parquet")


def toy_data(store: Store, section: ToyData | None = None) -> ArtifactRef:
    """The data artifact of `section` in `store`."""
    return store.produce(Stage("toy", "data", 1, _write_toy), section or ToyData(), {}, seed=0)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROMPTS = PromptConfig(query="Query:\n", document="")
