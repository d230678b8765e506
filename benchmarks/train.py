"""What a training step costs: against sentence-transformers' cached contrastive loss, and what each term of GRL adds.

    python benchmarks/train.py --json train.json          SmolLM2-135M, LoRA: some 50 minutes on two cores
    python benchmarks/train.py --quick                    smaller batches and fewer repetitions, under 5 minutes
    python benchmarks/train.py --device cuda              random weights of a Llama-3-8B shape on a GPU

Functions of the standard library as passages, their summaries as queries; passages of at most 128 tokens, the same LoRA (rank 16,
float32, all linear layers), the same dtype (bfloat16 where the machine multiplies it natively, else float32) and the same token
rows on both sides, sorted by length. Each side at its best attention and tokens per pass. A step is forward and backward passes,
without the optimizer, in processes that keep their memory as those of a run do (`ullme.heap`). Runs alternate, the median counts;
peak memory is that of a process of its own, above what it holds when the
model is loaded.

    ratio_speed           tokens/s of our contrastive step over CachedMultipleNegativesRankingLoss at its best
                          mini_batch_num_tokens and attention
    ratio_memory          our peak memory over theirs
    ratio_grl_over_cl     seconds of a GRL step (live log p(passage | query), reference included, 4 candidates) over those of a
                          contrastive step on the same rows with the same tokens per pass, fewer than the batch has, so that
                          representations are cached on both sides
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
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

from ullme.backbone import native_attention, native_dtype
from ullme.batches import TokenRow
from ullme.encoder import Encoder, EncoderConfig
from ullme.gradcache import TrainBatch, step
from ullme.heap import HEAP
from ullme.objectives import Objective
from ullme.objectives.contrastive import Contrastive
from ullme.objectives.grl import Grl
from ullme.scoring import GenerationScore
from ullme.training import LoraConfig

PASSAGE_TOKENS = 128
DTYPE = getattr(torch, native_dtype())
ATTENTIONS = ("eager", "sdpa")
LORA = LoraConfig(rank=16, alpha=32)
CL = Contrastive(kind="contrastive")
GRL = Grl(kind="grl")
SCORES: tuple[GenerationScore, ...] = ("pmi", "query_given_passage", "sum")


@dataclass(frozen=True)
class Effort:
    """How much is measured. pairs: queries of the contrastive step; queries: of the GRL step; budgets: tokens per pass tried."""

    pairs: int = 24
    queries: int = 3
    candidates: int = 4
    budget: int = 512
    budgets: tuple[int, ...] = (1024, 2048, 4096)
    repetitions: int = 5
    every_variant: bool = True


QUICK = Effort(4, 1, 4, 256, (512,), 2, every_variant=False)


@dataclass(frozen=True)
class Passes:
    """How a side goes through its rows. budget: tokens per pass."""

    attention: str
    budget: int

    def __str__(self) -> str:
        return f"{self.attention}, {self.budget} tokens"


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
    """Every query with its passage and passages of others as negatives; scored by the language model.

    The queries come by the length of their passages, so that the peer, which does not sort its rows, pads as little as it can.
    """
    pairs = texts(queries * candidates)
    pairs[:queries] = sorted(pairs[:queries], key=lambda pair: len(pair[1]))
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


def ours(encoder: Encoder, objective: Objective, batch: TrainBatch, passes: Passes) -> Callable[[], None]:
    """A step of ours."""

    def run() -> None:
        encoder.model.set_attn_implementation(passes.attention)
        encoder.model.train()
        step(encoder, objective, batch, chunk_tokens=passes.budget)
        encoder.model.zero_grad(set_to_none=True)

    return run


def theirs(folder: Path, batch: TrainBatch, passes: Passes) -> Callable[[], None]:
    """A step of sentence-transformers: the first candidate is the positive, the others are negatives."""
    from peft import LoraConfig as PeftLora
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": DTYPE, "attn_implementation": passes.attention})
    settings: Any = PeftLora(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model.add_adapter(settings)
    columns = [batch.queries, *[[batch.documents[place] for place in column] for column in batch.candidates.T]]
    features = [_features(rows, model) for rows in columns]
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=passes.budget)

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


def peak(folder: Path, what: str, effort: Effort, passes: Passes) -> int:
    """Bytes above the loaded model that a step takes at its peak."""
    command = [sys.executable, __file__, "--child", what, "--work", str(folder)]
    given = {"attention": passes.attention, "budget": passes.budget, **vars(effort)}
    for name in ("attention", "budget", "pairs", "queries", "candidates"):
        command += [f"--{name}", str(given[name])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(arguments: argparse.Namespace) -> int:
    """Peak memory of one step in this process, in bytes."""
    encoder = loaded(arguments.work)
    passes = Passes(arguments.attention, arguments.budget)
    contrastive = arguments.child in ("ours", "theirs")
    batch = batch_of(encoder, arguments.pairs, 1) if contrastive else batch_of(encoder, arguments.queries, arguments.candidates)
    run = {
        "ours": lambda: ours(encoder, CL, batch, passes),
        "theirs": lambda: theirs(arguments.work, batch, passes),
        "cl": lambda: ours(encoder, CL, batch, passes),
        "grl": lambda: ours(encoder, GRL, batch, passes),
        "naive": lambda: naive(encoder, batch),
    }[arguments.child]()
    if arguments.child == "theirs":
        del encoder
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    run()
    return memory("VmHWM") - before


def memory(line: str) -> int:
    """This process's, in bytes, as Linux names it."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) * 1024 for row in status if row.startswith(line))


# Measurements


def best_of(make: Callable[[Passes], Callable[[], None]], effort: Effort) -> tuple[Passes, dict[str, float]]:
    """The fastest attention, and with it the fastest tokens per pass; and the seconds of all that was tried."""
    tried: dict[Passes, float] = {}

    def seconds(passes: Passes) -> float:
        if passes not in tried:
            tried[passes] = timed(make(passes))
        return tried[passes]

    middle = effort.budgets[len(effort.budgets) // 2]
    make(Passes(ATTENTIONS[0], middle))()
    attention = min(ATTENTIONS, key=lambda attention: seconds(Passes(attention, middle)))
    best = min((Passes(attention, budget) for budget in effort.budgets), key=seconds)
    return best, {str(passes): round(value, 2) for passes, value in tried.items()}


def contrastive(folder: Path, effort: Effort) -> dict[str, Any]:
    """Our contrastive step against the peer's."""
    encoder = loaded(folder)
    batch = batch_of(encoder, effort.pairs, 1)
    make: dict[str, Callable[[Passes], Callable[[], None]]] = {
        "ours": lambda passes: ours(encoder, CL, batch, passes),
        "theirs": lambda passes: theirs(folder, batch, passes),
    }
    found = {name: best_of(made, effort) for name, made in make.items()}
    runs = {name: make[name](best) for name, (best, _) in found.items()}
    for run in runs.values():
        run()
    seconds = alternate(runs, effort.repetitions)
    memory = {name: peak(folder, name, effort, best) for name, (best, _) in found.items()}
    tokens = tokens_of(batch)
    return {
        "ratio_speed": round(seconds["theirs"] / seconds["ours"], 3),
        "ratio_memory": round(memory["ours"] / memory["theirs"], 3),
        "pairs": effort.pairs,
        "tokens": tokens,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tokens_per_s": {name: round(tokens / value) for name, value in seconds.items()},
        "peak_memory_mb": {name: round(value / 2**20) for name, value in memory.items()},
        "best": {name: str(best) for name, (best, _) in found.items()},
        "tried_seconds": {name: tried for name, (_, tried) in found.items()},
    }


def joint(folder: Path, effort: Effort) -> dict[str, Any]:
    """GRL against contrastive learning on the same rows, its terms, its other scores, and the naive step."""
    encoder = loaded(folder)
    batch = batch_of(encoder, effort.queries, effort.candidates)
    passes = Passes(native_attention(), effort.budget)
    variants: dict[str, tuple[Objective, TrainBatch]] = {"contrastive": (CL, batch), "grl": (GRL, batch)}
    if effort.every_variant:
        variants["grl without kl"] = (GRL.model_copy(update={"kl_weight": 0.0}), batch)
        variants["grl without preference"] = (GRL.model_copy(update={"preference_weight": 0.0}), batch)
        variants.update({f"grl, {score}": (GRL, replace(batch, score=score)) for score in SCORES})
    runs = {name: ours(encoder, objective, rows, passes) for name, (objective, rows) in variants.items()}
    runs["naive grl"] = naive(encoder, batch)
    for run in runs.values():
        run()
    seconds = alternate(runs, effort.repetitions)
    memory = {name: peak(folder, name, effort, passes) for name in ("cl", "grl", "naive")}
    grl = seconds["grl"]
    found = {
        "ratio_grl_over_cl": round(grl / seconds["contrastive"], 3),
        "ratio_grl_over_naive": round(grl / seconds["naive grl"], 3),
        "queries": effort.queries,
        "candidates": effort.candidates,
        "passes": str(passes),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_mb": {name: round(value / 2**20) for name, value in memory.items()},
    }
    if effort.every_variant:
        found["share"] = {
            "contrastive": round(seconds["contrastive"] / grl, 3),
            "kl": round((grl - seconds["grl without kl"]) / grl, 3),
            "preference": round((grl - seconds["grl without preference"]) / grl, 3),
        }
        found["extra_cost_of_score"] = {score: round(seconds[f"grl, {score}"] / grl - 1, 3) for score in SCORES}
    return found


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
    run = ours(encoder, CL, batch, Passes(native_attention(), 16_384))
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
    parser.add_argument("--only", choices=["contrastive", "grl"], help="measure this part and keep the other of --json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default=SMOLLM2, help="the LLM on a CPU, as `backbone.model` takes it")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--attention", help=argparse.SUPPRESS)
    for name in ("budget", "pairs", "queries", "candidates"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(child(arguments))
        return
    if HEAP.items() - os.environ.items():
        sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **HEAP}, check=False).returncode)
    effort = QUICK if arguments.quick else Effort()
    result: dict[str, Any] = {"contrastive": NOT_RUN, "grl": NOT_RUN, "gpu": NOT_RUN}
    if arguments.only and arguments.json and arguments.json.is_file():
        result |= {part: of for part, of in json.loads(arguments.json.read_text(encoding="utf-8")).items() if part in result}
    started = time.monotonic()

    def say() -> None:
        text = json.dumps({**result, "quick": arguments.quick, "dtype": native_dtype(), "machine": machine()}, indent=1)
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
        config = EncoderConfig(max_tokens=PASSAGE_TOKENS, dtype=native_dtype(), base=arguments.model)
        Encoder(weights.to(DTYPE), tokenizer, config).save(scratch)
        del weights, model
        for name, measure in (("contrastive", contrastive), ("grl", joint)):
            if arguments.only not in (None, name):
                continue
            result[name] = measure(Path(scratch), effort)
            say()


if __name__ == "__main__":
    main()
