"""The counting of benchmarks/encode.py; its timing needs a quiet machine and hours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.encode
from benchmarks.encode import (
    NOT_RUN,
    SHAPES,
    Bench,
    alternate,
    best_batch_size,
    corpora,
    distances,
    flops,
    main,
    positions_computed,
    random_texts,
    table,
)
from ullme.attention import trunk
from ullme.encoder import Encoder, EncoderConfig
from ullme.tiny import tiny_causal_lm


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*tiny_causal_lm("llama"), EncoderConfig(max_tokens=64, base="tiny:llama"))


def test_flops_are_those_of_the_linear_layers_and_of_each_text_with_itself(encoder: Encoder) -> None:
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # two layers: q, k and v, o, and the MLP; no head
    assert flops(encoder, [10, 3]) == 2 * weights * 13 + 4 * 2 * 64 * (10**2 + 3**2)


def test_positions_are_counted_at_the_embeddings(encoder: Encoder) -> None:
    inner = trunk(encoder.model)
    with positions_computed(inner) as seen:
        inner.forward(input_ids=torch.zeros(2, 10, dtype=torch.long))
    assert seen == [20]


def test_the_search_for_the_best_batch_size_ends_when_larger_ones_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Peer:
        def encode(self, texts: list[str], batch_size: int) -> None:
            tried.append(batch_size)

    seconds = iter([3.0, 1.0, 1.5, 2.0, 0.1])
    monkeypatch.setattr(benchmarks.encode, "timed", lambda run: run() or next(seconds))
    assert best_batch_size(Peer(), ["a"] * 4, (1, 2, 4, 8, 16)) == 2
    assert tried == [2, 1, 2, 4, 8]


def test_cells_that_were_not_run_say_so(tmp_path: Path) -> None:
    bench = Bench.__new__(Bench)
    bench.folder = tmp_path
    assert bench.summary("pydocs", {}) == {"ratio_equal_dtype": NOT_RUN}
    seconds = {"ours": 2.0, "peer": 3.0, "peer_batches_of_32": 4.0}
    cell = {"ratio_equal_dtype": 1.5, "ratio_bare_trunk": 0.9, "seconds": seconds}
    found = bench.summary("pydocs", {"bfloat16": cell})
    assert (found["ratio_defaults"], found["float32"], found["error"]) == (NOT_RUN, NOT_RUN, NOT_RUN)
    assert found["ratio_defaults_bfloat16_weights"] == 2.0
    for who, value in {"ours-float32": 1.0, "ours-bfloat16": 0.5}.items():
        np.save(tmp_path / f"pydocs-{who}.npy", np.array([[1.0, 1.0 - value]]))
    exact = {**cell, "seconds": {name: 3 * value for name, value in seconds.items()}}
    found = bench.summary("pydocs", {"bfloat16": cell, "float32": exact})
    assert found["ratio_defaults"] == 6.0
    assert list(found["error"]) == ["ours-bfloat16"]


def test_corpora_that_are_not_there_are_none(tmp_path: Path) -> None:
    found = corpora(tmp_path, 5)
    assert found["scifact"] is None
    assert len(found["pydocs"] or []) == 5
    (tmp_path / "scifact").mkdir()
    lines = [json.dumps({"title": "T", "text": str(number)}) for number in range(12)]
    (tmp_path / "scifact" / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert corpora(tmp_path, 4)["scifact"] == ["T 0", "T 3", "T 6", "T 9"]


def test_runs_take_turns() -> None:
    order: list[str] = []
    seconds = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_distances_are_those_of_the_middle_and_the_far_end() -> None:
    reference = np.tile([1.0, 0.0], (201, 1))
    vectors = reference.copy()
    vectors[:3] = [0.0, 2.0]
    far = distances(vectors, reference)
    assert far["median"] == pytest.approx(0)
    assert far["percentile_1"] == pytest.approx(1)


def test_lengths_of_random_texts_are_mixed() -> None:
    lengths = [len(text) for text in random_texts(200)]
    assert min(lengths) < 40 < 400 < max(lengths) <= 512


def test_without_a_gpu_its_lines_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["encode.py", "--device", "cuda", "--json", str(file)])
    main()
    written = json.loads(file.read_text(encoding="utf-8"))
    assert {name: written[name] for name in SHAPES} == dict.fromkeys(SHAPES, NOT_RUN)
    assert table(dict.fromkeys(SHAPES, NOT_RUN)) in capsys.readouterr().out
