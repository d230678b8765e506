"""What a training step costs: against sentence-transformers' cached contrastive loss, and what each term of GRL adds.

    python benchmarks/train.py --json train.json          SmolLM2-135M, LoRA, bfloat16: some 60 minutes on two cores
    python benchmarks/train.py --quick                    smaller batches and fewer repetitions, under 5 minutes
    python benchmarks/train.py --device cuda              random weights of a Llama-3-8B shape on a GPU

Functions of the standard library as passages, their summaries as queries; passages of at most 128 tokens, the same LoRA (rank 16,
float32, all linear layers) and the same token rows on both sides. A step is forward and backward passes, without the optimizer.
Runs alternate, the median counts; peak memory is that of a process of its own, above what it holds when the model is loaded.

    ratio_speed           tokens/s of our contrastive step over CachedMultipleNegativesRankingLoss at its best
                          mini_batch_num_tokens
    ratio_memory          our peak memory over theirs
    ratio_grl_over_cl     seconds of a GRL step (live log p(passage | query), reference included, 4 candidates) over those of a
                          contrastive step on the same rows with the same budget
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import NOT_RUN, SHAPE, SHAPES, SMOLLM2, alternate, machine, matrix_rate, random_texts, timed
from torch import Tensor, nn

from ullme.batches import TokenRow
from ullme.encoder import Encoder, EncoderConfig
from ullme.gradcache import TrainBatch, step
from ullme.objectives import Objective
from ullme.objectives.contrastive import Contrastive
from ullme.objectives.grl import Grl
from ullme.sampling import GenerationScore
from ullme.training import LoraConfig

PASSAGE_TOKENS = 128
LORA = LoraConfig(rank=16, alpha=32)
CL = Contrastive(kind="contrastive")
GRL = Grl(kind="grl")
SCORES: tuple[GenerationScore, ...] = ("pmi", "query_given_passage", "sum")


@dataclass(frozen=True)
class Effort:
    """How much is measured. pairs: queries of the contrastive step; queries: of the GRL step; budgets: tokens per pass tried."""

    pairs: int = 64
    queries: int = 16
    candidates: int = 4
    budget: int = 4096
    budgets: tuple[int, ...] = (1024, 2048, 4096, 8192)
    repetitions: int = 5


QUICK = Effort(12, 4, 4, 2048, (1024, 4096), 2)


# The rows


def texts(count: int) -> list[tuple[str, str]]:
    """(query, passage)."""
    from ullme.records import Problems
    from ullme.sources.pydocs import PyDocs

    found = PyDocs().read(Problems())
    documents = {document.id: document.content for document in found.documents}
    pairs = [(query.text, documents[next(iter(query.positives))]) for query in found.queries if query.positives]
    return pairs[:: max(1, len(pairs) // count)][:count]


def batch_of(encoder: Encoder, queries: int, candidates: int, *, score: GenerationScore = "passage_given_query") -> TrainBatch:
    """Every query with its passage and passages of others as negatives; scored by the language model."""
    pairs = texts(queries * candidates)
    asked = [query for query, _ in pairs[:queries]]
    passages = [passage for _, passage in pairs]
    order = [place + queries * column for place in range(queries) for column in range(candidates)]
    tokenised: Any = encoder.tokenizer(passages, add_special_tokens=False)["input_ids"]
    bodies = [ids[:PASSAGE_TOKENS] for ids in tokenised]
    prompts: Any = encoder.tokenizer([f"{query}\n" for query in asked])["input_ids"]
    places = np.array(order).reshape(queries, candidates)
    start: Any = [encoder.tokenizer.eos_token_id]
    return TrainBatch(
        query_ids=[str(number) for number in range(queries)],
        queries=encoder.tokenise(asked, "query"),
        documents=[TokenRow(body) for body in bodies],
        candidates=places,
        known=np.zeros((queries, len(passages)), dtype=bool),
        scored=list(range(queries)),
        prompts=prompts,
        passages=[[bodies[place] for place in row] for row in places],
        score=score,
        alone=[[TokenRow([*start, *bodies[place]], 1) for place in row] for row in places],
        questions=[
            [TokenRow([*bodies[place], *prompts[number]], len(bodies[place])) for place in row] for number, row in enumerate(places)
        ],
    )


def tokens_of(batch: TrainBatch) -> int:
    """Of the texts that are embedded."""
    return sum(map(len, [*batch.queries, *batch.documents]))


# What is timed


def ours(encoder: Encoder, objective: Objective, batch: TrainBatch, budget: int) -> Callable[[], None]:
    """A step of ours."""

    def run() -> None:
        encoder.model.train()
        step(encoder, objective, batch, chunk_tokens=budget)
        encoder.model.zero_grad(set_to_none=True)

    return run


def theirs(folder: Path, batch: TrainBatch, budget: int) -> Callable[[], None]:
    """A step of sentence-transformers: the first candidate is the positive, the others are negatives."""
    from peft import LoraConfig as PeftLora
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    settings: Any = PeftLora(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model.add_adapter(settings)
    columns = [batch.queries, *[[batch.documents[place] for place in column] for column in batch.candidates.T]]
    features = [_features(rows, model) for rows in columns]
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=budget)

    def run() -> None:
        model.train()
        value = loss([dict(column) for column in features], torch.zeros(len(batch.queries)))
        value.backward()
        model.zero_grad(set_to_none=True)

    return run


def _features(rows: Sequence[TokenRow], model: Any) -> dict[str, Tensor]:
    width = max(map(len, rows))
    pad = model.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row.ids, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def naive(encoder: Encoder, batch: TrainBatch) -> Callable[[], None]:
    """GRL as one writes it down first: every text embedded at once with gradient, every candidate's logits in full."""

    def run() -> None:
        encoder.model.train()
        rows = [*batch.queries, *batch.documents]
        vectors = encoder.embed(encoder.collate(rows))
        similarity = vectors[: len(batch.queries)] @ vectors[len(batch.queries) :].T
        target = torch.as_tensor(batch.candidates[:, 0])
        loss = nn.functional.cross_entropy(similarity / GRL.temperature, target)
        for number, (prompt, group) in enumerate(zip(batch.prompts, batch.passages, strict=True)):
            tokens = encoder.collate([TokenRow([*prompt, *passage], len(prompt)) for passage in group])
            with torch.no_grad(), encoder.adapters_off():
                reference, _ = logprobs_in_full(encoder, tokens)
            policy, lengths = logprobs_in_full(encoder, tokens)
            gain = policy - reference
            preference = -nn.functional.logsigmoid(GRL.beta * (gain[:1] - gain[1:])).mean()
            scores = similarity[number, batch.candidates[number].tolist()] / GRL.temperature
            teacher = (policy.detach() / lengths / GRL.generation_temperature).log_softmax(0)
            kl = (teacher.exp() * (teacher - scores.log_softmax(0))).sum()
            loss = loss + (GRL.preference_weight * preference + GRL.kl_weight * kl) / len(batch.prompts)
        loss.backward()
        encoder.model.zero_grad(set_to_none=True)

    return run


def logprobs_in_full(encoder: Encoder, tokens: Any) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of what is scored, and how many tokens that is, through all logits of all positions."""
    logits = encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False).logits
    logs = logits[:, :-1].float().log_softmax(-1).gather(2, tokens.input_ids[:, 1:, None])[..., 0]
    scored = tokens.pooled_mask[:, 1:]
    return (logs * scored).sum(1), scored.sum(1)


# A process of its own, for memory


def loaded(folder: Path) -> Encoder:
    """The model with its adapter."""
    torch.manual_seed(0)
    encoder = Encoder.load(folder, device="cpu")
    encoder.add_lora(LORA)
    for name, parameter in encoder.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return encoder


def peak(folder: Path, what: str, effort: Effort, budget: int) -> int:
    """Bytes above the loaded model that a step takes at its peak."""
    command = [sys.executable, __file__, "--child", what, "--work", str(folder), "--budget", str(budget)]
    command += ["--pairs", str(effort.pairs), "--queries", str(effort.queries), "--candidates", str(effort.candidates)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(arguments: argparse.Namespace) -> int:
    """Peak memory of one step in this process, in bytes."""
    encoder = loaded(arguments.work)
    contrastive = arguments.child in ("ours", "theirs")
    batch = batch_of(encoder, arguments.pairs, 1) if contrastive else batch_of(encoder, arguments.queries, arguments.candidates)
    run = {
        "ours": lambda: ours(encoder, CL, batch, arguments.budget),
        "theirs": lambda: theirs(arguments.work, batch, arguments.budget),
        "cl": lambda: ours(encoder, CL, batch, arguments.budget),
        "grl": lambda: ours(encoder, GRL, batch, arguments.budget),
        "naive": lambda: naive(encoder, batch),
    }[arguments.child]()
    if arguments.child == "theirs":
        del encoder
        gc.collect()
    file = Path("/proc/self/status")
    before = next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith("VmRSS"))
    run()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


# Measurements


def contrastive(folder: Path, effort: Effort) -> dict[str, Any]:
    """Our contrastive step against the peer's."""
    encoder = loaded(folder)
    batch = batch_of(encoder, effort.pairs, 1)
    tried: dict[str, dict[int, float]] = {"ours": {}, "theirs": {}}
    for budget in effort.budgets:
        for name, made in (("ours", ours(encoder, CL, batch, budget)), ("theirs", theirs(folder, batch, budget))):
            made()
            tried[name][budget] = timed(made)
    best = {name: min(seconds, key=lambda budget, seconds=seconds: seconds[budget]) for name, seconds in tried.items()}
    runs = {"ours": ours(encoder, CL, batch, best["ours"]), "theirs": theirs(folder, batch, best["theirs"])}
    for run in runs.values():
        run()
    seconds = alternate(runs, effort.repetitions)
    memory = {name: peak(folder, name, effort, best[name]) for name in runs}
    tokens = tokens_of(batch)
    return {
        "ratio_speed": round(seconds["theirs"] / seconds["ours"], 3),
        "ratio_memory": round(memory["ours"] / memory["theirs"], 3),
        "pairs": effort.pairs,
        "tokens": tokens,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tokens_per_s": {name: round(tokens / value) for name, value in seconds.items()},
        "peak_memory_mb": {name: round(value / 2**20) for name, value in memory.items()},
        "best_tokens_per_pass": best,
        "tried_seconds": {name: {str(b): round(s, 2) for b, s in found.items()} for name, found in tried.items()},
    }


def joint(folder: Path, effort: Effort) -> dict[str, Any]:
    """GRL against contrastive learning on the same rows, its terms, its other scores, and the naive step."""
    encoder = loaded(folder)
    batch = batch_of(encoder, effort.queries, effort.candidates)
    budget = effort.budget
    variants: dict[str, tuple[Objective, TrainBatch]] = {
        "contrastive": (CL, batch),
        "grl": (GRL, batch),
        "grl without kl": (GRL.model_copy(update={"kl_weight": 0.0}), batch),
        "grl without preference": (GRL.model_copy(update={"preference_weight": 0.0}), batch),
        **{f"grl, {score}": (GRL, replace(batch, score=score)) for score in SCORES},
    }
    runs = {name: ours(encoder, objective, rows, budget) for name, (objective, rows) in variants.items()}
    runs["naive grl"] = naive(encoder, batch)
    for run in runs.values():
        run()
    seconds = alternate(runs, effort.repetitions)
    memory = {name: peak(folder, name, effort, budget) for name in ("cl", "grl", "naive")}
    grl = seconds["grl"]
    return {
        "ratio_grl_over_cl": round(grl / seconds["contrastive"], 3),
        "ratio_grl_over_naive": round(grl / seconds["naive grl"], 3),
        "queries": effort.queries,
        "candidates": effort.candidates,
        "tokens_per_pass": budget,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "share": {
            "contrastive": round(seconds["contrastive"] / grl, 3),
            "kl": round((grl - seconds["grl without kl"]) / grl, 3),
            "preference": round((grl - seconds["grl without preference"]) / grl, 3),
        },
        "extra_cost_of_score": {score: round(seconds[f"grl, {score}"] / grl - 1, 3) for score in SCORES},
        "peak_memory_mb": {name: round(value / 2**20) for name, value in memory.items()},
    }


def gpu(effort: Effort) -> dict[str, Any]:
    """Contrastive and GRL steps of the 8B shape with LoRA in bfloat16, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ullme.tiny import tiny_causal_lm

    name = list(SHAPES)[-1]
    _, tokenizer = tiny_causal_lm("llama")
    sizes = dict(zip(SHAPE, SHAPES[name], strict=True))
    config = AutoConfig.for_model("llama", max_position_embeddings=2048, pad_token_id=0, **sizes)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    encoder = Encoder(model, tokenizer, EncoderConfig(max_tokens=512, dtype="bfloat16", base="random"))
    encoder.add_lora(LORA)
    words = random_texts(2 * effort.pairs)
    batch = TrainBatch(
        query_ids=[str(number) for number in range(effort.pairs)],
        queries=encoder.tokenise(words[: effort.pairs], "query"),
        documents=encoder.tokenise(words[effort.pairs :], "document"),
        candidates=np.arange(effort.pairs)[:, None],
        known=np.zeros((effort.pairs, effort.pairs), dtype=bool),
    )
    run = ours(encoder, CL, batch, 16_384)
    run()
    torch.cuda.reset_peak_memory_stats()
    seconds = alternate({"ours": run}, effort.repetitions)["ours"]
    weights = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, nn.Linear))
    tokens = tokens_of(batch)
    work = 6 * weights * tokens  # two forward passes, and a backward pass through weights that have no gradient of their own
    return {
        "shape": name,
        "tokens_per_s": round(tokens / seconds),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "share_of_matrix_rate": round(work / seconds / matrix_rate(torch.bfloat16, "cuda"), 3),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="small batches and few repetitions")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default=SMOLLM2, help="the LLM on a CPU, as `backbone.model` takes it")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name in ("budget", "pairs", "queries", "candidates"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(child(arguments))
        return
    effort = QUICK if arguments.quick else Effort()
    result: dict[str, Any] = {"contrastive": NOT_RUN, "grl": NOT_RUN, "gpu": NOT_RUN}
    started = time.monotonic()

    def say() -> None:
        text = json.dumps({**result, "quick": arguments.quick, "machine": machine()}, indent=1)
        if arguments.json:
            arguments.json.write_text(text + "\n", encoding="utf-8")
        print(f"{time.monotonic() - started:.0f} s\n{text}", flush=True)

    if arguments.device == "cuda":
        if torch.cuda.is_available():
            result["gpu"] = gpu(effort)
        say()
        return
    from ullme.backbone import BackboneConfig, load_causal_lm

    with tempfile.TemporaryDirectory(prefix="ullme-train-") as scratch:
        model, tokenizer = load_causal_lm(BackboneConfig(model=arguments.model, dtype="float32"))
        weights: Any = model
        config = EncoderConfig(max_tokens=PASSAGE_TOKENS, dtype="bfloat16", base=arguments.model)
        Encoder(weights.to(torch.bfloat16), tokenizer, config).save(scratch)
        del weights, model
        for name, measure in (("contrastive", contrastive), ("grl", joint)):
            result[name] = measure(Path(scratch), effort)
            say()


if __name__ == "__main__":
    main()
