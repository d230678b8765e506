"""Smaller vectors: the codes of sentence-transformers exactly, never wrapped around, and still good for searching."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ullme.errors import ArtifactError, ContractError
from ullme.precision import CALIBRATION_FILE, Calibration, dequantise, quantise, truncate

RANDOM = np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def random_vectors(count: int, dim: int) -> np.ndarray:
    return unit(RANDOM.standard_normal((count, dim)))


# Truncation


def test_truncated_vectors_are_the_first_values_at_norm_one() -> None:
    vectors = random_vectors(5, 16)
    short = truncate(vectors, 4)
    np.testing.assert_allclose(short, unit(vectors[:, :4]), atol=1e-7)
    assert short.dtype == np.float32
    assert truncate(vectors, 16) is vectors


def test_a_truncated_tensor_keeps_its_gradient_and_a_zero_vector_stays_zero() -> None:
    vectors = torch.from_numpy(random_vectors(3, 16))
    vectors[2, :4] = 0
    vectors.requires_grad_()
    short = truncate(vectors, 4)
    np.testing.assert_allclose(short[:2].detach().numpy(), truncate(vectors.detach().numpy(), 4)[:2], atol=1e-7)
    assert short[2].tolist() == [0, 0, 0, 0]
    short.sum().backward()
    assert vectors.grad is not None
    assert bool(vectors.grad.isfinite().all())
    assert float(vectors.grad[:, 4:].abs().max()) == 0


@pytest.mark.parametrize("dim", [0, 17])
def test_a_dim_that_the_vectors_do_not_have_is_refused(dim: int) -> None:
    with pytest.raises(ContractError, match=f"expected 1 to 16, the length of the model's vectors, got {dim}"):
        truncate(random_vectors(5, 16), dim)


# Codes


@pytest.fixture(scope="module")
def peer() -> Any:
    """Takes seconds to import, so once."""
    return pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings


@pytest.mark.parametrize("dim", [64, 13])
@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_codes_equal_those_of_sentence_transformers(precision: Any, dim: int, peer: Any) -> None:
    vectors = random_vectors(400, dim)
    vectors[:, 3] = 0.25  # a dimension that never changes
    calibration = Calibration.learn(vectors[:150])
    expected = peer(vectors, precision, ranges=calibration.ranges)
    got = quantise(vectors, precision, calibration)
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)
    assert np.array_equal(quantise(torch.from_numpy(vectors), precision, calibration), expected)
    assert np.array_equal(quantise(vectors[:0], precision, calibration), expected[:0])


@pytest.mark.parametrize(("precision", "lowest", "highest"), [("int8", -128, 127), ("uint8", 0, 255)])
def test_values_outside_the_ranges_get_the_nearest_code(precision: Any, lowest: int, highest: int) -> None:
    calibration = Calibration(np.full(4, -0.1), np.full(4, 0.1), 100)
    vectors = np.array([[-0.9, -0.1, 0.1, 0.9], [-0.100001, 0.100001, -1e30, 1e30]], dtype=np.float32)
    assert quantise(vectors, precision, calibration).tolist() == [
        [lowest, lowest, highest, highest],
        [lowest, highest, lowest, highest],
    ]


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_what_comes_back_is_at_most_half_a_step_off(precision: Any) -> None:
    vectors = random_vectors(300, 32)
    calibration = Calibration.learn(vectors)
    back = dequantise(quantise(vectors, precision, calibration), precision, calibration)
    assert back.dtype == np.float32
    assert (np.abs(back - vectors) <= 0.501 * calibration.steps + 1e-6).all()


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dim", [16, 13])
def test_bits_come_back_as_signs_of_norm_one(precision: Any, dim: int) -> None:
    vectors = random_vectors(20, dim)
    codes = quantise(vectors, precision)
    assert codes.shape == (20, 2)
    back = dequantise(codes, precision, dim=dim)
    np.testing.assert_allclose(back, np.sign(vectors) / math.sqrt(dim), rtol=1e-6)
    with pytest.raises(ContractError, match="2 bytes of bits hold up to 16 dimensions, not 17"):
        dequantise(codes, precision, dim=17)


def test_scalar_codes_without_a_calibration_are_refused() -> None:
    with pytest.raises(ContractError, match=r"precision int8 needs the ranges .* at least 100 documents"):
        quantise(random_vectors(2, 8), "int8")


def test_a_calibration_of_another_dim_is_one_clear_line() -> None:
    vectors = random_vectors(150, 16)
    calibration = Calibration.learn(truncate(vectors, 8))
    for call in (lambda: quantise(vectors, "int8", calibration), lambda: dequantise(vectors.astype(np.int8), "int8", calibration)):
        with pytest.raises(ContractError, match="the calibration is of dim 8, the vectors of dim 16") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_too_few_vectors_make_no_calibration() -> None:
    with pytest.raises(ContractError, match="expected at least 100 vectors to learn ranges from, got 99"):
        Calibration.learn(random_vectors(99, 8))


def test_vectors_that_are_not_finite_are_refused() -> None:
    vectors = random_vectors(150, 8)
    vectors[7, 3] = math.nan
    for call in (lambda: Calibration.learn(vectors), lambda: quantise(vectors, "binary")):
        with pytest.raises(ContractError, match="vector 7 is not finite"):
            call()


def test_an_unknown_precision_and_codes_of_another_kind_are_refused() -> None:
    wrong: Any = "int4"
    with pytest.raises(ContractError, match="got 'int4'; did you mean 'int8'"):
        quantise(random_vectors(2, 8), wrong)
    with pytest.raises(ContractError, match=r"expected float vectors \[N D\], got int8"):
        quantise(np.zeros((2, 8), np.int8), "binary")
    with pytest.raises(ContractError, match=r"expected float vectors \[N D\], got float32 \[8\]"):
        quantise(np.zeros(8, np.float32), "binary")
    with pytest.raises(ContractError, match=r"expected int8 codes \[N D\] of precision binary, got uint8"):
        dequantise(np.zeros((2, 1), np.uint8), "binary")


# Keeping a calibration


def test_a_calibration_comes_back_from_its_file_bit_by_bit(tmp_path: Path) -> None:
    vectors = random_vectors(200, 12)
    calibration = Calibration.learn(vectors)
    calibration.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert np.array_equal(loaded.ranges, calibration.ranges)
    assert (loaded.dim, loaded.vectors) == (12, 200)
    assert np.array_equal(quantise(vectors, "int8", loaded), quantise(vectors, "int8", calibration))
    with pytest.raises(ValueError, match="read-only"):
        loaded.low[0] = 1


@pytest.mark.parametrize(
    "content",
    ["{not json", "[]", '{"low": [0]}', '{"low": [0, 0], "high": [1], "vectors": 9}', '{"low": [1], "high": [0], "vectors": 9}'],
)
def test_a_damaged_calibration_is_one_clear_line(content: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"no {CALIBRATION_FILE}"):
        Calibration.load(tmp_path)
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(ArtifactError, match="cannot be read as ranges") as caught:
        Calibration.load(tmp_path)
    assert "\n" not in str(caught.value)


# Searching


def best(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def rescored(queries: np.ndarray, documents: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The 10 best of each query's candidates, by these vectors of the documents."""
    scores = np.einsum("qd,qkd->qk", queries, documents[candidates])
    return np.take_along_axis(candidates, best(scores, 10), axis=1)


def by_bits(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """The k documents whose signs differ from the query's in the fewest places."""
    stored = quantise(documents, "ubinary")
    distances = np.stack([np.bitwise_count(stored ^ bits).sum(axis=1) for bits in quantise(queries, "ubinary")])
    return best(-distances.astype(np.int32), k)


def overlap(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([len({*a} & {*b}) / len(a) for a, b in zip(expected.tolist(), found.tolist(), strict=True)]))


def test_a_search_among_clusters_survives_int8_and_bits_with_rescoring() -> None:
    centres = RANDOM.standard_normal((40, 128))
    documents = unit(centres[RANDOM.integers(40, size=3000)] + 0.7 * RANDOM.standard_normal((3000, 128)))
    queries = unit(documents[:100] + 0.05 * RANDOM.standard_normal((100, 128)))
    exact = best(queries @ documents.T, 10)
    calibration = Calibration.learn(documents[:500])
    from_int8 = dequantise(quantise(documents, "int8", calibration), "int8", calibration)
    assert overlap(exact, best(queries @ from_int8.T, 10)) >= 0.95
    assert overlap(exact, rescored(queries, from_int8, by_bits(queries, documents, 100))) >= 0.95
    assert overlap(exact, best(queries @ np.roll(from_int8, 1, axis=0).T, 10)) < 0.5


@pytest.fixture(scope="module")
def cranfield(shared_data: Path) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
    """Documents, queries (words weighted by rarity, on 512 random directions) and which documents answer each query."""
    folder = shared_data / "cranfield"
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    texts = [Counter(f"{row['title']} {row['text']}".split()) for row in rows]
    frequency = Counter(word for text in texts for word in text)
    place = {word: number for number, word in enumerate(frequency)}
    rarity = np.array([math.log(len(rows) / count) for count in frequency.values()])
    directions = np.random.default_rng(0).standard_normal((len(place), 512)).astype(np.float32)

    def vector(words: Counter[str]) -> np.ndarray:
        known = [place[word] for word in words if word in place]
        weights = [1 + math.log(count) for word, count in words.items() if word in place]
        return (rarity[known] * weights) @ directions[known] if known else np.zeros(512)

    ids = {row["_id"]: number for number, row in enumerate(rows)}
    answers: dict[str, set[int]] = {row["_id"]: set() for row in asked}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        if int(grade) > 0 and document in ids:
            answers[query].add(ids[document])
    judged = [row for row in asked if answers[row["_id"]]]
    queries = unit(np.stack([vector(Counter(row["text"].split())) for row in judged]))
    return unit(np.stack([vector(text) for text in texts])), queries, [answers[row["_id"]] for row in judged]


def test_recall_on_a_real_collection_survives_int8_and_bits_with_rescoring(cranfield: Any) -> None:
    documents, queries, answers = cranfield

    def recall(found: np.ndarray) -> float:
        return float(np.mean([len(right & {*rows}) / len(right) for right, rows in zip(answers, found.tolist(), strict=True)]))

    exact = recall(best(queries @ documents.T, 10))
    assert exact > 0.2
    calibration = Calibration.learn(documents[:500])
    from_int8 = dequantise(quantise(documents, "int8", calibration), "int8", calibration)
    int8 = recall(best(queries @ from_int8.T, 10))
    bits = recall(rescored(queries, from_int8, by_bits(queries, documents, 100)))
    assert int8 >= 0.99 * exact
    assert bits >= 0.9 * exact
