from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from toys import tiny_encoder
from transformers import PreTrainedTokenizerBase

from ullme.artifacts import Inputs, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.batches import TokenRow
from ullme.data import PREPARE, DataConfig, Dataset, read_examples
from ullme.encoder import Encoder, EncoderConfig
from ullme.encoding import ENCODE, EncodeConfig
from ullme.errors import ConfigError, ContractError
from ullme.mining_context import MiningContext, encoded_vectors
from ullme.prompts import DatasetPrompts, PromptConfig, Prompts
from ullme.sampling import Sampler
from ullme.systems import VectorSystem
from ullme.tiny import byte_tokenizer, tiny_causal_lm
from ullme.training import PhaseConfig

INSTRUCT = PromptConfig(query="Instruct: {instruction}\nQuery: {text}", document="{text}", instruction="Find the passage")
CHAT = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[answer]\n{% endif %}"


def decoded(prompts: Prompts, texts: list[str], **options: Any) -> list[str]:
    tokenizer: Any = prompts._tokenizer
    return [tokenizer.decode(row.ids) for row in prompts.tokenise(texts, options.pop("role", "query"), **options)]


def prompts(config: PromptConfig, *, max_tokens: int = 200, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts:
    return Prompts(config, tokenizer or byte_tokenizer(), max_tokens)


def chatty() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_template_without_a_place_for_the_text_stands_before_it() -> None:
    assert decoded(prompts(PromptConfig()), ["a"]) == ["Query:\na"]
    assert decoded(prompts(PromptConfig(query="{text}")), ["a"]) == ["a"]


def test_the_instruction_is_the_querys_own_or_the_configured_one() -> None:
    made = prompts(INSTRUCT)
    assert decoded(made, ["a", "b"], instructions=["", "Find code"]) == [
        "Instruct: Find the passage\nQuery: a",
        "Instruct: Find code\nQuery: b",
    ]
    rows = made.tokenise(["a", "b"], "query", instructions=["", "Find code"])
    assert [row.prompt for row in rows] == [len("Instruct: Find the passage\nQuery: "), len("Instruct: Find code\nQuery: ")]
    assert decoded(made, ["a"], role="document") == ["a"]


def test_a_data_set_may_have_templates_and_an_instruction_of_its_own() -> None:
    made = prompts(
        INSTRUCT.model_copy(
            update={
                "datasets": {
                    "code": DatasetPrompts(instruction="Find the function"),
                    "plain": DatasetPrompts(query="Q: {text}", document="D:\n"),
                }
            }
        )
    )
    assert decoded(made, ["a"], dataset="code") == ["Instruct: Find the function\nQuery: a"]
    assert decoded(made, ["a"], dataset="plain") == ["Q: a"]
    assert decoded(made, ["a"], dataset="plain", role="document") == ["D:\na"]
    assert decoded(made, ["a"], dataset="unheard of") == ["Instruct: Find the passage\nQuery: a"]


def test_a_chat_prompt_is_a_users_turn_and_the_answers_opening_follows() -> None:
    made = prompts(PromptConfig(query="Q: ", chat=True), tokenizer=chatty())
    assert decoded(made, ["a"]) == ["[user]\nQ: a\n[answer]\n"]
    assert decoded(made, ["a"], role="document") == ["[user]\na\n[answer]\n"]
    assert made.tokenise(["a"], "query")[0].prompt == len("[user]\nQ: ")


def test_the_text_is_cut_and_neither_the_prompt_nor_the_suffix() -> None:
    made = prompts(PromptConfig(query="Q: {text}\nA:", document="{text}\nA:"), max_tokens=20)
    (row, whole) = made.tokenise(["abcdefghijklmnopqrstuvwxyz", "abc"], "query")
    assert decoded(made, ["abcdefghijklmnopqrstuvwxyz"]) == ["Q: abcdefghijklmn\nA:"]
    assert (len(row), row.lost, whole.lost) == (20, 12, 0)


@pytest.mark.parametrize("text", ["", "x", "two words", "é ü 漢", "Q: \nA:", "  spaces  "])
@pytest.mark.parametrize("config", [PromptConfig(), INSTRUCT, PromptConfig(query="Q: {text}\nA:", document="{text}\nA:")])
def test_a_text_that_fits_is_tokenised_as_the_one_string_it_is(config: PromptConfig, text: str) -> None:
    made, tokenizer = prompts(config), byte_tokenizer()
    (row,) = made.tokenise([text], "query")
    assert list(row.ids) == tokenizer(made.string(text, "query"))["input_ids"]


def test_what_a_tokenizer_puts_around_every_text_stays_around_the_cut_one() -> None:
    from ullme.prompts import end_texts_with

    tokenizer = byte_tokenizer()
    end_texts_with(tokenizer, [5], [1])
    made = prompts(PromptConfig(query="Q:"), max_tokens=12, tokenizer=tokenizer)
    (row,) = made.tokenise(["abcdefghijklmn"], "query")
    assert (row.ids[0], row.ids[-1], len(row), row.prompt) == (5, 1, 12, 3)
    assert list(made.tokenise(["a"], "query")[0].ids) == tokenizer("Q:a")["input_ids"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"query": "{text} {text}"}, "{text} at most once"),
        ({"query": "{text} {instruction}"}, "at most once and before it"),
        ({"datasets": {"a": {"document": "{instruction}{instruction}"}}}, "at most once and before it"),
        ({"datasets": {"a": {"querry": "x"}}}, "querry"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PromptConfig.model_validate(wrong)


def test_endings_that_differ_between_roles_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be the same in every template.*query: '!', document: ''"):
        prompts(PromptConfig(query="Q: {text}!", document="{text}"))


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="no chat template; set chat: false"):
        prompts(PromptConfig(chat=True))


def test_as_many_instructions_as_texts_are_needed() -> None:
    with pytest.raises(ContractError, match=r"expected one per text \(2\), got 1"):
        prompts(INSTRUCT).tokenise(["a", "b"], "query", instructions=["x"])


def test_prompt_tokens_are_pooled_only_when_asked() -> None:
    model, tokenizer = tiny_causal_lm("llama")
    left_out, pooled = (Encoder(model, tokenizer, EncoderConfig(pool_prompt=choice)) for choice in (False, True))
    bare = tiny_encoder(prompts=PromptConfig(query=""), pool_prompt=False)
    assert np.abs(left_out.encode(["alpha"]) - pooled.encode(["alpha"])).max() > 1e-3
    assert np.allclose(pooled.encode(["alpha"]), bare.encode(["Query:\nalpha"]), atol=1e-6)


def test_the_encoder_embeds_with_instructions_and_data_sets() -> None:
    encoder = tiny_encoder(prompts=INSTRUCT, max_tokens=80)
    told = encoder.encode(["alpha", "alpha"], instructions=["", "Find code"])
    assert np.abs(told[0] - told[1]).max() > 1e-4
    assert np.array_equal(told[:1], encoder.encode(["alpha"]))


# The same string in training and in use


def test_training_mining_encoding_and_evaluation_embed_the_very_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (("sing", "", "train"), ("swim", "Find the manual", "train"), ("ski", "Find the manual", "test"))
    lines = [
        {"query": f"how to {word}", "pos": [f"{word} is done like this"], "instruction": said, "split": split}
        for word, said, split in asked
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = Store(tmp_path / "store")
    section = DataConfig.model_validate({"source": {"kind": "jsonl", "path": str(source)}, "name": "manuals"}).resolved()
    prompts = {
        "query": "Instruct: {instruction}\nQuery: {text}",
        "instruction": "Find it",
        "datasets": {"manuals": {"document": "Manual: {text}", "instruction": "Find the page"}},
    }
    base = BackboneConfig.model_validate({"model": "tiny:llama", "dtype": "float32", "prompts": prompts})
    refs = {"data": store.produce(PREPARE, section, {}, seed=0), "model": store.produce(BACKBONE, base, {}, seed=0)}

    seen: dict[str, dict[str, list[int]]] = {}
    stage = ""
    tokenise = Prompts.tokenise

    def noted(self: Prompts, texts: Sequence[str], *args: Any, **options: Any) -> list[TokenRow]:
        rows = tokenise(self, texts, *args, **options)
        seen.setdefault(stage, {}).update(zip(texts, (list(row.ids) for row in rows), strict=True))
        return rows

    monkeypatch.setattr(Prompts, "tokenise", noted)
    stage = "train"
    examples = read_examples(refs["data"].path)
    phase = PhaseConfig.model_validate({"objective": "contrastive", "steps": 1, "batch_size": 2})
    Sampler(examples, phase, seed=0).batch(0, Encoder.load(refs["model"].path))
    stage = "encode"
    refs["embeddings"] = store.produce(ENCODE, EncodeConfig(), refs, seed=0)
    stage = "mine"
    inputs = Inputs(store, {name: refs[name] for name in ("data", "model")})
    data = Dataset.open(refs["data"].path)
    model = partial(Encoder.load, refs["model"].path)
    context = MiningContext(data.queries("train"), data.training_documents(), seed=0)
    encoded_vectors(inputs, data.name, model, batch_tokens=500)(context)
    stage = "evaluate"
    system = VectorSystem(Inputs(store, refs), store, None, 500)
    for split in ("train", "test"):
        system.searchers()["exact"].search(data.queries(split), 2)

    decode: Any = byte_tokenizer().decode
    expected = {
        "how to sing": "Instruct: Find the page\nQuery: how to sing",
        "how to swim": "Instruct: Find the manual\nQuery: how to swim",
        "how to ski": "Instruct: Find the manual\nQuery: how to ski",
        **{text: f"Manual: {text}" for text in (document.content for document in data.documents())},
    }
    assert {name: {text: decode(ids) for text, ids in found.items()} for name, found in seen.items()} == {
        "train": {text: expected[text] for text in seen["train"]},
        "encode": {
            text: expected[text] for text in (*(document.content for document in data.corpus()), "how to sing", "how to swim")
        },
        "mine": {text: expected[text] for text in seen["mine"]},
        "evaluate": {text: expected[text] for text in ("how to sing", "how to swim", "how to ski")},
    }
    assert {"how to sing", "how to swim", "sing is done like this"} <= set(seen["train"]) & set(seen["mine"])
