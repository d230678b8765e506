"""What a model keeps of its language: perplexity, last words and questions with several answers, against values by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import beir_data, encoded, tiny_model, write_beir
from toys import tiny_encoder

from ullme.artifacts import ArtifactRef, Store
from ullme.batches import TokenRow
from ullme.encoder import Encoder
from ullme.errors import ConfigError, DataError
from ullme.evaluation import EVALUATE, EvalConfig
from ullme.tasks.last_word import LastWordTask
from ullme.tasks.multiple_choice import MultipleChoiceTask
from ullme.tasks.perplexity import PerplexityTask
from ullme.training import LoraConfig

TEXT = "the cat sat on the mat and looked at the moon while the dog slept\n" * 6


def logs(encoder: Encoder, ids: list[int]) -> torch.Tensor:
    """log p of every next token, by the whole logits: Float[S - 1 V]."""
    with torch.no_grad():
        return encoder.model(input_ids=torch.tensor([ids]), is_causal=True, use_cache=False).logits[0, :-1].log_softmax(-1)


def own_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def measured(task: Any, encoder: Encoder, budget: int = 200) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    return task.measure(encoder, task.units(encoder), budget)


def test_perplexity_by_hand(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    ids = encoder.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    begin = list(encoder.prompts.begin)
    total, count, windows = 0.0, 0, []
    for start in range(0, len(ids) - 1, 50):
        row = [*begin, *ids[start : start + 50]]
        found = [float(logs(encoder, row)[place - 1, row[place]]) for place in range(max(1, len(begin)), len(row))]
        total, count = total - sum(found), count + len(found)
        windows.append(-sum(found) / len(found))
    task = PerplexityTask(path=file, window=50)
    whole, each = measured(task, encoder)
    assert whole["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert each["nll"].tolist() == pytest.approx(windows, rel=1e-5)
    assert len(PerplexityTask(path=file, window=50, max_windows=3).units(encoder)) == 3


def greedy(encoder: Encoder, ids: list[int], count: int) -> list[int]:
    """`ids` and the likeliest tokens after them."""
    for _ in range(count):
        ids = [*ids, int(logs(encoder, [*ids, 5])[-1].argmax())]
    return ids


def test_a_last_word_counts_when_greedy_decoding_writes_it(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    file = own_lines(tmp_path / "words.jsonl", [{"text": "the cat sat on it"}, {"text": "a dog looked at me"}, {"text": "moon"}])
    units = LastWordTask(path=file).units(encoder)
    assert [unit.name for unit in units] == ["line 1", "line 2"]  # a single word has nothing before it
    row = units[0].rows[0]
    assert encoder.tokenizer.decode(row.ids[row.prompt :]) == " it"
    right = greedy(encoder, list(row.ids[: row.prompt]), 3)
    wrong = [*right[:-1], (right[-1] + 1) % 250]
    rows = [TokenRow(right, row.prompt), TokenRow(wrong, row.prompt), TokenRow(right[:-1], row.prompt)]
    assert encoder.writes(encoder.collate(rows)).tolist() == [True, False, True]


@pytest.mark.parametrize("answers", ["letter", "text"])
def test_the_likeliest_choice_by_hand(answers: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    records = [
        {"question": f"what is {n}", "choices": ["one", "twenty two", "three"], "answer": n % 3, "subject": "s"} for n in range(5)
    ]
    shots = own_lines(tmp_path / "dev.jsonl", records[:2])
    task = MultipleChoiceTask(path=own_lines(tmp_path / "test.jsonl", records), answers=answers, examples=shots, shots=1)
    right = []
    for record in records:
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABC", record["choices"], strict=True))
        options = ["A", "B", "C"] if answers == "letter" else record["choices"]
        shot = f"Question: what is 0{listed if answers == 'letter' else ''}\nAnswer: {options[0]}\n\n"
        asked = f"Question: {record['question']}{listed if answers == 'letter' else ''}\nAnswer:"
        given = encoder.tokenizer(shot + asked)["input_ids"]
        scores = []
        for option in options:
            ids = [*given, *encoder.tokenizer(f" {option}", add_special_tokens=False)["input_ids"]]
            score = sum(float(logs(encoder, ids)[place - 1, ids[place]]) for place in range(len(given), len(ids)))
            scores.append(score / (len(f" {option}") if answers == "text" else 1))
        right.append(float(np.argmax(scores) == record["answer"]))
    whole, each = measured(task, encoder, budget=500)
    assert each["accuracy"].tolist() == right
    assert whole["accuracy"] == pytest.approx(np.mean(right))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("language")
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return {"text": text, "words": own_lines(folder / "words.jsonl", [{"text": "the cat sat"}, {"text": "a dog slept"}])}


def tasks(files: dict[str, Path]) -> list[dict[str, Any]]:
    return [
        {"kind": "retrieval"},
        {"kind": "perplexity", "path": str(files["text"]), "window": 32},
        {"kind": "last_word", "path": str(files["words"])},
    ]


def report(store: Store, refs: dict[str, ArtifactRef], files: dict[str, Path]) -> dict[str, Any]:
    section = EvalConfig.model_validate({"bootstrap_samples": 200, "tasks": tasks(files)}).resolved()
    return json.loads((store.produce(EVALUATE, section, refs, seed=0).path / "report.json").read_text(encoding="utf-8"))


def test_language_stands_beside_retrieval_and_bm25_has_none(files: dict[str, Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    data, model = beir_data(store, write_beir(tmp_path / "beir")), tiny_model(store)
    refs = {"data": data, "model": model, "embeddings": encoded(store, data, model)}
    found = report(store, refs, files)
    assert set(found["scores"]) == {"retrieval", "perplexity", "last_word"}
    assert set(found["scores"]["perplexity"]) == {"perplexity", "nll"}
    low, high = found["intervals"]["perplexity"]["nll"]
    assert low <= found["scores"]["perplexity"]["nll"] <= high
    assert set(report(store, {"data": data}, files)["scores"]) == {"retrieval"}


def test_with_adapters_off_the_scores_are_those_of_the_base_model(files: dict[str, Path]) -> None:
    base = tiny_encoder()
    adapted = tiny_encoder(lora=LoraConfig(rank=4))
    task = PerplexityTask(path=files["text"], window=32)
    plain, changed = (measured(task, encoder)[0] for encoder in (base, adapted))
    assert plain != changed
    with adapted.adapters_off():
        assert measured(task, adapted)[0] == plain


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("last_word", "{}", r':1: expected \{"text"'),
        ("multiple_choice", '{"question": "q", "choices": ["a"], "answer": 0}', "with 2 to 10 choices"),
        ("multiple_choice", '{"question": "q", "choices": ["a", "b"], "answer": 2}', "with 2 to 10 choices"),
        ("multiple_choice", "no json", "place of the right one, from 0"),
    ],
)
def test_a_bad_line_is_named(kind: str, line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    task: Any = (LastWordTask if kind == "last_word" else MultipleChoiceTask)(path=file)
    with pytest.raises(DataError, match=message):
        task.units(tiny_encoder())


def test_a_file_that_is_not_there_is_a_mistake_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="perplexity: no such file"):
        PerplexityTask(kind="perplexity", path=tmp_path / "none.txt").resolved()


def test_generation_is_causal_greedy_or_drawn_by_seed_and_does_not_depend_on_the_batch() -> None:
    encoder = tiny_encoder()
    prompts = ["the cat", "a much longer prompt about dogs"]
    found = encoder.generate(prompts, max_new_tokens=6)
    assert [encoder.generate([prompt], max_new_tokens=6)[0] for prompt in prompts] == found
    start = encoder.tokenizer(prompts[0])["input_ids"]
    ids = greedy(encoder, list(start), 6)[len(start) :]
    ids = ids[: ids.index(encoder.tokenizer.eos_token_id)] if encoder.tokenizer.eos_token_id in ids else ids
    assert found[0] == encoder.tokenizer.decode(ids, skip_special_tokens=True)
    drawn = [encoder.generate(prompts, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
