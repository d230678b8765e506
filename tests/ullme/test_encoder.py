from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import PROMPTS, WORDS, logprob_by_hand, tiny_encoder
from transformers import PreTrainedTokenizerFast

from ullme.attention import trunk
from ullme.batches import TokenRow, collate
from ullme.encoder import Encoder, EncoderConfig
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.pooling import POOLINGS
from ullme.prompts import PromptConfig
from ullme.tiny import byte_tokenizer, tiny_causal_lm
from ullme.training import LoraConfig

TEXTS = ["alpha", "a much longer text about lambda and sigma", "x", "two words", "é ü 漢"]
LORA = LoraConfig(rank=4, alpha=8)


def only(encoder: Encoder, row: TokenRow) -> torch.Tensor:
    with torch.no_grad():
        return encoder.embed(encoder.collate([row]))[0]


# Embedding


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_rows_equal_rows_encoded_one_by_one(pooling: Any, attention: Any) -> None:
    encoder = tiny_encoder(pooling=pooling, attention=attention)
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() <= 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert together.dtype == np.float32


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_on_the_left_gives_the_same_vectors(pooling: Any, attention: Any, implementation: str) -> None:
    encoder = tiny_encoder(pooling=pooling, attention=attention, prompts=PROMPTS)
    encoder.model.set_attn_implementation(implementation)
    rows = encoder.tokenise(TEXTS, "query")
    with torch.no_grad():
        right, left = (encoder.embed(collate(rows, pad_id=0, padding_side=side)) for side in ("right", "left"))
    assert float((right - left).abs().max()) <= 1e-5


def test_the_batch_budget_and_the_order_of_texts_do_not_matter() -> None:
    encoder = tiny_encoder()
    whole = encoder.encode(TEXTS, batch_tokens=10_000)
    assert np.abs(encoder.encode(TEXTS, batch_tokens=1) - whole).max() <= 1e-5
    assert np.abs(encoder.encode(TEXTS[::-1])[::-1] - whole).max() <= 1e-5
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_the_prompt_is_attended_to_and_left_out_of_the_mean() -> None:
    encoder = tiny_encoder(prompts=PROMPTS)
    (row,) = encoder.tokenise(["alpha"], "query")
    assert row.prompt == len("Query:\n")
    with torch.no_grad():
        hidden = trunk(encoder.model)(input_ids=torch.tensor([row.ids]), is_causal=False).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[row.prompt :].mean(0), dim=0)
    assert torch.allclose(only(encoder, row), expected, atol=1e-6)
    assert not np.allclose(encoder.encode(["alpha"], prompt="query"), encoder.encode(["alpha"], prompt="document"), atol=1e-3)


def test_bidirectional_attention_lets_the_last_token_change_the_first() -> None:
    both, one_way = (tiny_encoder(attention=attention, pooling="first") for attention in ("bidirectional", "causal"))
    texts = ["alpha beta", "alpha betz"]
    moved = np.abs(np.subtract(*both.encode(texts))).max()
    assert moved > 1e-4
    assert np.abs(np.subtract(*one_way.encode(texts))).max() == 0


def test_the_language_model_head_is_not_run_for_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder()
    monkeypatch.setattr(encoder.model.lm_head, "forward", lambda *_: pytest.fail("the head was run"))
    encoder.encode(["alpha"])


def test_one_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(ContractError, match=r"write encode\(\[text\]\)"):
        tiny_encoder().encode("alpha")


def test_encoding_leaves_the_training_mode_as_it_was() -> None:
    encoder = tiny_encoder()
    encoder.model.train()
    encoder.encode(["alpha"])
    assert encoder.model.training


# Prompts and truncation


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_takes_the_end_of_the_text_and_never_the_prompt(side: str) -> None:
    model, tokenizer = tiny_causal_lm("llama")
    tokenizer.truncation_side = side
    encoder = Encoder(model, tokenizer, EncoderConfig(max_tokens=16, prompts=PROMPTS))
    (row,) = encoder.tokenise(["abcdefghijklmnopqrstuvwxyz"], "query")
    assert tokenizer.decode(row.ids) == "Query:\nabcdefghi"
    assert len(row) == 16


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge of a space with the letter p."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {**byte_tokenizer().get_vocab(), "Ġp": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "p")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def test_a_prompt_that_merges_with_the_text_is_refused() -> None:
    model, _ = tiny_causal_lm("llama")
    with pytest.raises(ConfigError, match=r"backbone\.prompts\.document: the tokenizer merges the end of 'text: '"):
        Encoder(model, merging_tokenizer(), EncoderConfig(prompts=PromptConfig(query="", document="text: ")))
    assert Encoder(model, merging_tokenizer(), EncoderConfig(prompts=PromptConfig(document="text:\n"))).max_tokens == 512


def test_a_prompt_as_long_as_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens is 8, but the query prompt alone takes 7 tokens"):
        tiny_encoder(max_tokens=8)


def test_a_tokenizer_without_any_padding_token_is_refused() -> None:
    model, tokenizer = tiny_causal_lm("llama")
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token"):
        Encoder(model, tokenizer, EncoderConfig(base="mine"))


# Language-model mode


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_log_probabilities_equal_the_sum_by_hand_without_the_prompt(attention: Any) -> None:
    encoder = tiny_encoder(attention=attention, dtype=torch.float64)
    rows = [
        TokenRow(encoder.tokenizer(text)["input_ids"], prompt)
        for text, prompt in (("alpha beta", 4), ("xyz", 1), ("longer text here", 15))
    ]
    sums, counts = encoder.sequence_logprobs(encoder.collate(rows))
    assert counts.tolist() == [6, 2, 1]
    expected = torch.stack([logprob_by_hand(encoder, row) for row in rows])
    assert torch.allclose(sums, expected, rtol=1e-10)


def test_the_first_token_without_a_prompt_has_no_condition_and_is_not_scored() -> None:
    encoder = tiny_encoder()
    _, counts = encoder.sequence_logprobs(encoder.collate([TokenRow([5, 6, 7])]))
    assert counts.tolist() == [2]


def test_generation_does_not_depend_on_the_embedding_mode() -> None:
    both, one_way = tiny_encoder(attention="bidirectional"), tiny_encoder(attention="causal")
    ids = torch.tensor([both.tokenizer("alpha beta")["input_ids"]])
    both.encode(TEXTS)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(both.model.generate(ids, **options), one_way.model.generate(ids, **options))


@pytest.mark.parametrize(
    ("family", "settings"), [("gemma2", {"final_logit_softcapping": 0.3}), ("granite", {"logits_scaling": 8.0}), ("cohere", {})]
)
def test_a_head_with_a_cap_or_scale_scores_as_its_family_does(family: str, settings: dict[str, float]) -> None:
    encoder = tiny_encoder(family, dtype=torch.float64)
    encoder.model.config.update(settings)
    row = TokenRow(encoder.tokenizer("alpha beta")["input_ids"], 4)
    sums, _ = encoder.sequence_logprobs(encoder.collate([row]))
    assert torch.allclose(sums[0], logprob_by_hand(encoder, row), rtol=1e-10)


def test_a_head_that_does_something_else_is_refused_rather_than_misread() -> None:
    encoder = tiny_encoder("granite")
    encoder.model.config.update({"logits_scaling": 8.0})
    forward = encoder.model.forward

    def doubled(**settings: Any) -> Any:
        out = forward(**settings)
        out.logits = out.logits * 2
        return out

    encoder.model.forward = doubled
    with pytest.raises(ConfigError, match="its logits are not what its head makes of its last states"):
        encoder.sequence_logprobs(encoder.collate([TokenRow([5, 6], 1)]))


# Adapters


def test_adapters_off_is_the_base_exactly_and_only_within_the_block() -> None:
    base, adapted = tiny_encoder(), tiny_encoder(lora=LORA)
    expected, tuned = base.encode(TEXTS), adapted.encode(TEXTS)
    with adapted.adapters_off():
        assert np.array_equal(adapted.encode(TEXTS), expected)
    assert np.abs(tuned - expected).max() > 1e-3
    assert np.array_equal(adapted.encode(TEXTS), tuned)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"dropout": 0.3}])
def test_a_merged_adapter_equals_its_forward(settings: dict[str, Any]) -> None:
    encoder = tiny_encoder(dtype=torch.float64, lora=LoraConfig(rank=4, alpha=8, **settings))
    before = encoder.encode(TEXTS)
    encoder.merge_adapter()
    assert not encoder.has_adapter
    assert np.abs(encoder.encode(TEXTS) - before).max() <= 1e-6


def test_a_fresh_adapter_changes_nothing() -> None:
    encoder = tiny_encoder()
    before = encoder.encode(TEXTS)
    encoder.add_lora(LORA)
    assert np.array_equal(encoder.encode(TEXTS), before)


def test_a_reference_without_an_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="every weight is trained"), tiny_encoder().adapters_off():
        pass


def test_each_mode_takes_its_own_adapter_and_only_its_own_has_a_gradient() -> None:
    encoder = tiny_encoder(lora=LORA)
    rows = encoder.tokenise(TEXTS, "query")
    batch = encoder.collate(rows)
    alone, scored = encoder.encode(TEXTS), encoder.sequence_logprobs(batch)[0]
    with encoder.adapters_off():
        base_scored = encoder.sequence_logprobs(batch)[0]
    encoder.add_lora(LORA, "generation")
    assert encoder.adapters == ["embedding", "generation"]
    assert np.array_equal(encoder.encode(TEXTS), alone)
    assert torch.equal(encoder.sequence_logprobs(batch)[0], base_scored)  # a fresh adapter changes nothing
    assert not torch.equal(scored, base_scored)
    for name, parameter in encoder.model.named_parameters():
        if "lora_B.generation" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert np.array_equal(encoder.encode(TEXTS), alone)
    assert not torch.equal(encoder.sequence_logprobs(batch)[0], base_scored)
    for run, used in (
        (lambda: encoder.embed(batch).sum(), "embedding"),
        (lambda: encoder.sequence_logprobs(batch)[0].sum(), "generation"),
    ):
        run().backward()
        moved = {
            name.split(".")[-2] for name, weight in encoder.trainable().items() if weight.grad is not None and weight.grad.any()
        }
        assert moved == {used}
        encoder.model.zero_grad()


def test_merging_keeps_the_embedding_adapter_alone() -> None:
    encoder = tiny_encoder(dtype=torch.float64, lora=LORA)
    encoder.add_lora(LORA, "generation")
    expected = encoder.encode(TEXTS)
    encoder.merge_adapter()
    assert encoder.adapters == []
    assert np.abs(encoder.encode(TEXTS) - expected).max() <= 1e-6


@pytest.mark.parametrize("dim", [16, 64])
def test_a_shorter_embedding_is_the_first_numbers_at_unit_length(dim: int) -> None:
    encoder = tiny_encoder()
    whole, short = encoder.encode(TEXTS), encoder.shortened(dim)
    expected = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
    assert short.dim == dim
    assert np.allclose(short.encode(TEXTS), expected, atol=1e-6)


def test_a_longer_embedding_than_the_model_makes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.dim: expected at most 64, the model's own length, got 65"):
        tiny_encoder(dim=65)


# Saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_saved_and_loaded_is_bit_equal(attention: Any, dtype: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(attention=attention, dtype=getattr(torch, dtype), pooling="weighted_mean")
    encoder.config = encoder.config.model_copy(update={"dtype": dtype})
    encoder.save(tmp_path / "first")
    encoder = Encoder.load(tmp_path / "first")  # .to(bfloat16) also rounds the rotary frequencies; loading does not
    encoder.save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model")
    assert loaded.config == encoder.config
    assert next(loaded.model.parameters()).dtype == getattr(torch, dtype)
    for prompt in ("query", "document"):
        assert np.array_equal(loaded.encode(TEXTS, prompt=prompt), encoder.encode(TEXTS, prompt=prompt))
    batch = encoder.collate([TokenRow([5, 6, 7, 8], 1), TokenRow([9, 10], 1)])
    assert torch.equal(loaded.sequence_logprobs(batch)[0], encoder.sequence_logprobs(batch)[0])


def test_a_saved_folder_names_no_place_and_holds_no_pickle(tmp_path: Path) -> None:
    names = []
    for place in ("one", "two"):
        encoder = tiny_encoder()
        encoder.save(tmp_path / place / "first")
        again = Encoder.load(tmp_path / place / "first")  # transformers remembers where a model was loaded from
        again.save(tmp_path / place / "second")
        files = {
            file.relative_to(tmp_path / place / "second"): file.read_bytes()
            for file in (tmp_path / place / "second").rglob("*")
            if file.is_file()
        }
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
        assert not [name for name in files if name.suffix in {".bin", ".pt", ".pkl", ".pickle"}]
        names.append(files)
    assert names[0] == names[1]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no ullme\.json; expected a model folder"):
        Encoder.load(tmp_path)


@pytest.mark.parametrize("damaged", ["ullme.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_one_clear_error(damaged: str, tmp_path: Path) -> None:
    tiny_encoder().save(tmp_path)
    (tmp_path / damaged).write_bytes(b"{not json")
    with pytest.raises(ArtifactError, match="the model cannot be read"):
        Encoder.load(tmp_path)


@pytest.fixture(scope="module")
def sentence_transformers() -> Any:
    """Takes seconds to import, so once."""
    return pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize(
    ("attention", "pooling"),
    [
        ("bidirectional", "mean"),
        ("causal", "last"),
        ("bidirectional", "weighted_mean"),
        ("causal", "mean"),
        ("bidirectional", "max"),
        ("bidirectional", "first"),
    ],
)
def test_sentence_transformers_gives_the_same_vectors(
    attention: Any, pooling: Any, sentence_transformers: Any, tmp_path: Path
) -> None:
    encoder = tiny_encoder(attention=attention, pooling=pooling, prompts=PROMPTS)
    encoder.save(tmp_path / "model")
    plain = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [*TEXTS, " ".join(WORDS)]  # the last is longer than max_tokens
    for prompt in ("query", "document"):
        expected = encoder.encode(texts, prompt=prompt)
        got = plain.encode(texts, prompt_name=prompt, show_progress_bar=False)
        assert (expected * got).sum(1).min() >= 0.99999
        assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_the_settings_file_keeps_every_field(tmp_path: Path) -> None:
    encoder = tiny_encoder(pooling="last", max_tokens=40, attention="causal", attn_implementation="eager")
    encoder.save(tmp_path)
    settings = json.loads((tmp_path / "ullme.json").read_text())
    assert settings == encoder.config.model_dump(mode="json")
    assert Encoder.load(tmp_path).model.config._attn_implementation == "eager"
