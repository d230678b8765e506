"""GEM: special tokens, the mask that makes them a bottleneck, and the training that reads texts through them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import build, uncompiled
from pydantic import ValidationError
from test_gradcache import LORA, errors
from test_training import PHASE, config, killed, refs, rows_of
from toys import gem_encoder, gradients, text_batch, tiny_encoder

from ullme.artifacts import ArtifactRef, Store
from ullme.attention import check_bottleneck, hidden_states, trunk
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.batches import TokenRow, with_some_left_out
from ullme.bottleneck import PREFIX, SPECIAL, SUFFIX, bottleneck_mask, model_masks, segments_of
from ullme.encoder import Encoder
from ullme.errors import ConfigError
from ullme.gradcache import step
from ullme.objectives.gem import Gem
from ullme.prediction import Doubling
from ullme.tiny import tiny_causal_lm
from ullme.training import TRAIN

__all__ = ["refs"]  # the fixture

GEM: dict[str, Any] = {**PHASE, "objective": {"kind": "gem", "alpha_after": 1, "alpha_steps": 2}}
IMPLEMENTATIONS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "phi"]
KINDS = [PREFIX] * 4 + [SPECIAL] * 2 + [SUFFIX] * 3


# The mask


def test_the_mask_by_hand() -> None:
    seen = bottleneck_mask(torch.tensor([[PREFIX, PREFIX, SPECIAL, SPECIAL, SUFFIX, SUFFIX]]), torch.ones(1, 6, dtype=torch.bool))
    rows = ["100000", "110000", "111000", "110100", "001110", "001111"]
    assert ["".join(str(int(value)) for value in row) for row in seen[0]] == rows


def test_a_text_without_special_tokens_has_the_causal_mask_and_padding_is_not_seen() -> None:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    seen = bottleneck_mask(torch.zeros(2, 3, dtype=torch.long), mask)
    assert seen[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert seen[1].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_segments_follow_from_the_ids() -> None:
    ids = torch.tensor([[0, 5, 90, 91, 6, 0], [5, 6, 7, 90, 91, 0]])
    assert segments_of(ids, 90).tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2]]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Any:
    with uncompiled() if request.param == "flex_attention" else nullcontext():
        yield request.param


def states(model: Any, ids: list[int], seen: torch.Tensor) -> torch.Tensor:
    """Last states of one row under any mask."""
    row, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    inner: Any = trunk(model)
    with torch.no_grad():
        return inner(
            input_ids=row,
            position_ids=positions,
            attention_mask=model_masks(inner, seen, positions),
            is_causal=True,
            use_cache=False,
        ).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_special_tokens_knows_the_text_through_them_alone(family: str, implementation: str) -> None:
    model = build(family, implementation)
    segments = torch.tensor([KINDS])
    opened = bottleneck_mask(segments, torch.ones(1, 9, dtype=torch.bool))
    closed = opened & ~((segments.unsqueeze(2) == SUFFIX) & (segments.unsqueeze(1) == SPECIAL))
    one, other = [3, 4, 5, 6, 200, 201, 7, 8, 9], [13, 14, 15, 16, 200, 201, 7, 8, 9]
    assert torch.equal(states(model, one, closed)[6:], states(model, other, closed)[6:])
    assert not torch.allclose(states(model, one, opened)[6:], states(model, other, opened)[6:], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_do_not_see_each_other(family: str, implementation: str) -> None:
    model = build(family, implementation)
    seen = bottleneck_mask(torch.tensor([KINDS]), torch.ones(1, 9, dtype=torch.bool))
    one, other = [3, 4, 5, 6, 200, 201, 7, 8, 9], [3, 4, 5, 6, 210, 201, 7, 8, 9]
    assert torch.equal(states(model, one, seen)[5], states(model, other, seen)[5])
    assert not torch.allclose(states(model, one, seen)[4], states(model, other, seen)[4], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_special_tokens_is_plain_causal(family: str, implementation: str) -> None:
    model = build(family, implementation)
    ids, mask = torch.arange(3, 19)[None], torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        plain = hidden_states(model, ids, mask, is_causal=True)
        masked = hidden_states(model, ids, mask, is_causal=True, segments=torch.zeros_like(ids))
    assert torch.allclose(plain, masked, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_may_stand_on_either_side(family: str, implementation: str) -> None:
    model = build(family, implementation)
    ids = torch.tensor([[3, 4, 5, 6, 200, 201, 7, 8, 9]])
    segments = torch.tensor([KINDS])
    with torch.no_grad():
        alone = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), is_causal=True, segments=segments)[0]
        for side in ((3, 0), (0, 3)):
            padded, kinds = (torch.nn.functional.pad(of, side) for of in (ids, segments))
            mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), side)
            found = hidden_states(model, padded, mask, is_causal=True, segments=kinds)[0]
            assert torch.allclose(found[mask[0]], alone, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "gpt_neox", "qwen3", "gemma3_text", "olmo2"])
def test_the_proof_at_load_holds(family: str) -> None:
    for name in ("eager", "sdpa"):
        model = tiny_causal_lm(family)[0]
        if name == "sdpa" and not model._supports_sdpa:
            continue
        model.set_attn_implementation(name)
        check_bottleneck(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_proof_fails_where_one_layer_forgets_the_mask(layer: int) -> None:
    model: Any = build("llama", "sdpa")
    plain = model.model.layers[layer].forward
    model.model.layers[layer].forward = lambda hidden, attention_mask=None, **more: plain(hidden, attention_mask=None, **more)
    with pytest.raises(ConfigError, match=rf"layers \[{layer}\] do not keep to the mask of special tokens"):
        check_bottleneck(model)


# Embeddings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "merge", "head"), [(1, "mean", False), (3, "mean", True), (3, "concat", False)])
def test_embeddings_do_not_depend_on_the_batch_and_survive_a_folder(
    family: str, count: int, merge: str, head: bool, tmp_path: Path
) -> None:
    encoder = gem_encoder(family, count, merge=merge, head=head)
    texts = ["alpha", "beta gamma delta", "a much longer text that is cut where forty-eight tokens end, wherever that may be"]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert together.shape[1] == encoder.dim == 64 * (count if merge == "concat" else 1)
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path, device="cpu")
    assert again.special_ids == encoder.special_ids
    assert np.abs(again.encode(texts) - together).max() < 1e-6


@pytest.mark.parametrize(("count", "merge", "head"), [(1, "mean", False), (3, "mean", True), (3, "concat", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_gives_the_same_vectors(family: str, count: int, merge: str, head: bool, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = gem_encoder(family, count, merge=merge, head=head)
    if head:
        encoder.pooler.head.weight.data += 0.01 * torch.randn(encoder.pooler.head.weight.shape)  # type: ignore[union-attr]
    encoder.save(tmp_path)
    plain = count == 1 and not head
    peer = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=not plain)
    texts = ["alpha", "beta gamma delta", "a much longer text that is cut where forty-eight tokens end, wherever that may be"]
    found = peer.encode(texts, batch_size=3)
    assert (found * encoder.encode(texts, prompt="document")).sum(1).min() > 0.99999


def test_vocabulary_and_head_stay_as_they_are(tmp_path: Path) -> None:
    plain = tiny_encoder("llama", attention="causal", pooling="last")
    encoder = gem_encoder("llama", 2)
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path, device="cpu")
    expected = plain.model.state_dict()
    for one in (encoder, again):
        found = one.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert one.model.config.vocab_size == plain.model.config.vocab_size


def test_special_tokens_need_causal_attention() -> None:
    with pytest.raises(ValidationError, match="reads a text in one direction"):
        BackboneConfig(model="tiny:llama", pooling="special")


# Training


def test_texts_are_read_as_they_are_or_doubled() -> None:
    encoder = gem_encoder(count=2)
    rows = encoder.tokenise(["alpha beta"] * 400, "document")
    text = list(rows[0].ids[:-2])
    assert list(rows[0].ids[-2:]) == encoder.special_ids
    found = Doubling(0.2).rows(rows, encoder, np.random.default_rng(0))
    begin = len(encoder.prompts.begin)
    doubled = [row for row in found if len(row) > len(text)]
    assert len(doubled) / 400 == pytest.approx(0.2, abs=0.05)
    for row in found:
        if len(row) == len(text):
            assert row.ids.tolist() == text
            assert row.places.tolist() == list(range(1, len(text)))
        else:
            assert row.ids.tolist() == [*text, *encoder.special_ids, *text[begin:]]
            assert set(row.places.tolist()) == set(range(1, len(row))) - {len(text), len(text) + 1}
        assert row.targets.tolist() == row.ids[row.places].tolist()


def test_tokens_are_left_out_of_the_text_alone() -> None:
    row = TokenRow(list(range(100)), prompt=10)
    random = np.random.default_rng(0)
    kept = [with_some_left_out(row, 0.3, random, ending=5).ids for _ in range(200)]
    assert all(list(ids[:10]) == list(range(10)) and list(ids[-5:]) == list(range(95, 100)) for ids in kept)
    assert np.mean([len(ids) - 15 for ids in kept]) == pytest.approx(0.7 * 85, rel=0.03)
    assert len(with_some_left_out(TokenRow([1, 2, 3]), 0.999, random).ids) == 1


def test_the_weight_of_the_contrastive_term_follows_its_schedule() -> None:
    objective = Gem(alpha=(0.0, 1.0), alpha_after=100, alpha_steps=400)
    assert [objective.at(step).alpha[0] for step in (0, 100, 300, 500, 900)] == [0, 0, 0.5, 1, 1]
    assert not objective.at(0).embeds
    assert objective.at(300).embeds
    assert objective.at(300).prediction is not None
    assert objective.at(500).prediction is None


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_does_not_depend_on_the_chunks(family: str, count: int) -> None:
    eager = family == "gemma2"  # its softmax is in float32 whatever it is given
    dtype, most = (torch.float32, 1e-4) if eager else (torch.float64, 1e-9)
    encoder = gem_encoder(family, count, lora=LORA, dtype=dtype)
    objective = Gem(alpha=(0.4, 0.4), doubled=0.5, learn_temperature=False)
    batch = text_batch(encoder, objective)
    queries, documents = (encoder.embed(encoder.collate(rows)) for rows in (batch.queries, batch.documents))
    similarity = queries @ documents.T / objective.temperature
    contrastive = -similarity.log_softmax(1).diagonal().mean()
    total = sum(len(row.places) for row in batch.predicted)
    following = -torch.cat([encoder.predicted_logprobs([row]) for row in batch.predicted]).sum() / total
    (0.4 * contrastive + 0.6 * following).backward()
    vectors = encoder.pooler.vectors  # type: ignore[union-attr]
    expected = {**gradients(encoder), "vectors": vectors.grad.clone()}
    assert vectors.grad.abs().sum() > 0
    for budget in (1, 60, 100_000):
        vectors.grad = None
        report = step(encoder, objective, batch, chunk_tokens=budget)
        assert report.terms == {
            "next_token": pytest.approx(0.6 * float(following.detach()), rel=most),
            "contrastive": pytest.approx(0.4 * float(contrastive.detach()), rel=most),
        }
        whole, worst = errors({**gradients(encoder), "vectors": vectors.grad.clone()}, expected)
        assert whole <= most
        assert worst <= 10 * most


@pytest.fixture(scope="module")
def special_refs(refs: dict[str, ArtifactRef], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    """The same data, and a model with two special tokens and a head."""
    section = BackboneConfig(
        model="tiny:llama",
        dtype="float32",
        attention="causal",
        pooling="special",
        max_tokens=48,
        special={"count": 2, "head": True},  # type: ignore[arg-type]
    )
    store = Store(tmp_path_factory.mktemp("special"))
    return {**refs, "model": store.produce(BACKBONE, section, {}, seed=0)}


def test_a_killed_run_ends_bit_equal(special_refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config({**GEM, "steps": 4}, runtime={"checkpoint_every": 2})
    expected = Store(tmp_path / "one").produce(TRAIN, section, special_refs, seed=1)
    rows = rows_of(expected)
    assert "loss/contrastive" not in rows[0]
    assert {"loss/contrastive", "loss/next_token", "temperature"} <= rows[2].keys()
    assert "loss/next_token" not in rows[3]
    store = killed(Store(tmp_path / "two"), section, special_refs, 3)
    assert store.produce(TRAIN, section, special_refs, seed=1).digest == expected.digest


def test_with_a_frozen_trunk_the_language_model_is_bit_identical(special_refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    section = config(GEM, adapter=None, frozen_trunk=True, runtime={"chunk_tokens": 1})  # each text by itself
    trained = Store(tmp_path).produce(TRAIN, section, special_refs, seed=1)
    before, after = (Encoder.load(ref.path, device="cpu") for ref in (special_refs["model"], trained))
    own, now = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(own[name], now[name]) for name in own)
    batch = before.collate([TokenRow([3, 4, 5, 6, 7, 8])])
    with torch.no_grad():
        assert torch.equal(before.sequence_logprobs(batch)[0], after.sequence_logprobs(batch)[0])
    assert before.generate(["alpha beta"], max_new_tokens=8) == after.generate(["alpha beta"], max_new_tokens=8)
    assert np.abs(before.encode(["alpha"]) - after.encode(["alpha"])).max() > 1e-5
    assert not torch.equal(before.pooler.head.weight, after.pooler.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen_trunk": True}, "frozen_trunk trains no adapter; set adapter: null"),
        ({"keep_adapter": True, "adapter": None}, "keep_adapter keeps the one adapter there is"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(GEM, **settings)


def test_an_adapter_that_is_kept_leaves_language_as_it_was(refs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    trained = Store(tmp_path).produce(TRAIN, config(PHASE, keep_adapter=True), refs, seed=1)
    before, after = (Encoder.load(ref.path, device="cpu") for ref in (refs["model"], trained))
    batch = before.collate([TokenRow([3, 4, 5, 6, 7, 8])])
    with torch.no_grad():
        assert torch.equal(before.sequence_logprobs(batch)[0], after.sequence_logprobs(batch)[0])
    assert np.abs(before.encode(["alpha"]) - after.encode(["alpha"])).max() > 1e-5


def test_special_tokens_of_a_model_without_them_are_asked_for() -> None:
    encoder = tiny_encoder()
    with pytest.raises(ConfigError, match=r"set backbone\.pooling: special"):
        Doubling(1.0).rows(encoder.tokenise(["alpha"], "document"), encoder, np.random.default_rng(0))
