"""Learning from documents alone: hidden tokens (MNTP), and the same text twice (SimCSE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_gradcache import LORA, errors
from test_training import PHASE, config, killed, refs, rows_of
from toys import gradients, text_batch, tiny_encoder

from ullme.artifacts import ArtifactRef, Store
from ullme.attention import attention_dropout, check_attention_dropout
from ullme.batches import TokenRow
from ullme.data import read_texts
from ullme.errors import ConfigError
from ullme.gradcache import step
from ullme.objectives.mntp import Mntp
from ullme.objectives.simcse import Simcse
from ullme.prediction import Masking, PredictedRow, mask, mask_id
from ullme.training import TRAIN

__all__ = ["refs"]  # the fixture

MNTP: dict[str, Any] = {**PHASE, "objective": "mntp"}
SIMCSE: dict[str, Any] = {**PHASE, "objective": "simcse"}


# Masking


def masked(ids: Any, style: Any = "bert", share: float = 0.2, seed: int = 0, **settings: Any) -> PredictedRow:
    given: dict[str, Any] = {"mask_id": 7, "vocabulary": 1000, "kept": (), "random": np.random.default_rng(seed), **settings}
    return mask(ids, Masking(share, style, "_"), **given)


def test_targets_are_what_stood_at_the_places_and_the_rest_is_as_it_was() -> None:
    ids = np.arange(100, 160)
    row = masked(ids, share=0.5)
    assert row.targets.tolist() == ids[row.places].tolist()
    others = np.setdiff1d(np.arange(60), row.places)
    assert row.ids[others].tolist() == ids[others].tolist()


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_share_of_hidden_tokens_is_the_one_asked_for(share: float) -> None:
    rows = [masked(np.arange(10, 522), share=share, seed=seed) for seed in range(100)]
    assert sum(len(row.places) for row in rows) / (100 * 511) == pytest.approx(share, abs=0.01)


def test_bert_style_is_80_10_10_and_the_other_masks_all() -> None:
    ids = np.full(200_000, 500)
    row = masked(ids, share=0.2)
    shown = row.ids[row.places]
    assert (shown == 7).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == 500).mean() == pytest.approx(0.1, abs=0.01)
    assert (masked(ids, "all").ids[masked(ids, "all").places] == 7).all()


def test_the_first_token_the_prompt_and_special_ones_are_never_hidden() -> None:
    for seed in range(50):
        places = masked([3, 9, 4, 9, 5, 6], share=0.99, seed=seed, kept=(9,), prompt=3).places
        assert set(places.tolist()) <= {4, 5}
    assert 0 not in masked([5] * 50, share=0.99).places


def test_the_mask_is_one_token_of_the_model() -> None:
    tokenizer = tiny_encoder().tokenizer
    assert tokenizer.decode([mask_id(tokenizer, "_")]) == "_"
    with pytest.raises(ConfigError, match="expected one token of this model, but 'mask' is 4"):
        mask_id(tokenizer, "mask")
    tokenizer.mask_token = "#"
    assert tokenizer.decode([mask_id(tokenizer, "_")]) == "#"


# MNTP


def test_a_hidden_token_is_predicted_from_the_state_before_it_and_sees_what_follows() -> None:
    """By hand: one row, all logits, the state at i - 1 for the token at i."""
    encoder = tiny_encoder(dtype=torch.float64)
    row = PredictedRow(np.array([10, 7, 12, 13, 7, 15]), np.array([1, 4]), np.array([11, 14]))
    found = encoder.predicted_logprobs([row])
    ids = torch.tensor(row.ids)[None]
    logs = encoder.model(input_ids=ids, is_causal=False, use_cache=False).logits[0].log_softmax(-1)
    assert torch.allclose(found, torch.stack([logs[0, 11], logs[3, 14]]), rtol=1e-10)
    later = PredictedRow(np.array([10, 7, 12, 13, 7, 99]), row.places, row.targets)
    assert not torch.allclose(encoder.predicted_logprobs([later])[0], found[0], rtol=1e-6)


def test_the_gradient_of_hidden_tokens_does_not_depend_on_the_chunks() -> None:
    encoder = tiny_encoder(dtype=torch.float64, lora=LORA)
    objective = Mntp(share=0.4)
    batch = text_batch(encoder, objective)
    total = sum(len(row.places) for row in batch.predicted)
    loss = -torch.cat([encoder.predicted_logprobs([row]) for row in batch.predicted if len(row.places)]).sum() / total
    loss.backward()
    expected = gradients(encoder)
    for budget in (1, 40, 100_000):
        report = step(encoder, objective, batch, chunk_tokens=budget)
        assert report.terms == {"mntp": pytest.approx(float(loss.detach()), rel=1e-10)}
        whole, worst = errors(gradients(encoder), expected)
        assert whole <= 1e-9
        assert worst <= 1e-9


# SimCSE


DROPPING = ["llama", "gpt2", "gpt_neox", "opt", "phi", "gemma2", "qwen2", "mistral", "bloom"]


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_of_the_attention_is_really_on_where_it_is_asked_for(family: str) -> None:
    encoder = tiny_encoder(family)
    check_attention_dropout(encoder.model)
    assert not encoder.model.training
    encoder.model.train()
    rows = [TokenRow([5, 6, 7, 8, 9, 10, 11, 12])]

    def embedded(share: float, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)  # other dropouts, which some families' configurations turn on, are then the same
        with torch.no_grad(), attention_dropout(encoder.model, share):
            return encoder.embed(encoder.collate(rows))

    assert not torch.equal(embedded(0.3, 0), embedded(0.3, 1))
    assert not torch.equal(embedded(0.3, 0), embedded(0.0, 0))
    assert torch.equal(embedded(0.3, 0), embedded(0.3, 0))


def test_a_family_whose_attention_drops_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout of its attention changes nothing"):
        check_attention_dropout(tiny_encoder("falcon").model)


def test_both_passes_of_a_chunk_drop_the_same_and_the_two_sides_do_not() -> None:
    encoder = tiny_encoder(lora=LORA)
    encoder.model.train()
    batch = text_batch(encoder, Simcse())
    values = {}
    for share in (0.3, 0.0):
        for budget in (30, 100_000):
            torch.manual_seed(0)
            with attention_dropout(encoder.model, share):
                values[share, budget] = step(encoder, Simcse(), batch, chunk_tokens=budget).health["alignment"]
            gradients(encoder)
    assert values[0.3, 30] > 1e-4
    assert values[0.3, 100_000] > 1e-4
    assert values[0.0, 30] < 1e-6


# From documents to a model


def test_every_document_that_training_may_see_is_a_text(refs: dict[str, ArtifactRef]) -> None:
    texts = read_texts(refs["data"].path)
    assert len({text.query for text in texts}) == len(texts) > 2
    assert all(text.positives == (text.query,) for text in texts)


@pytest.mark.parametrize("phases", [(MNTP,), (SIMCSE,), (MNTP, {**SIMCSE, "adapter": "merge_then_new"}), (MNTP, PHASE)])
def test_documents_alone_train_a_model_and_a_killed_run_ends_bit_equal(
    phases: tuple[dict[str, Any], ...], refs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    section = config(*phases, runtime={"checkpoint_every": 2})
    expected = Store(tmp_path / "one").produce(TRAIN, section, refs, seed=1)
    assert expected.meta["texts"] > 2
    names = {name for row in rows_of(expected) for name in row if name.startswith("loss/")}
    assert names == {f"loss/{phase['objective']}" for phase in phases}
    store = killed(Store(tmp_path / "two"), section, refs, 3)
    assert store.produce(TRAIN, section, refs, seed=1).digest == expected.digest


def test_documents_and_queries_are_not_summed() -> None:
    both = {"kind": "sum", "parts": [{"objective": "contrastive"}, {"objective": "mntp"}]}
    with pytest.raises(ValidationError, match="mntp reads documents and contrastive queries; put them into phases of their own"):
        config({**PHASE, "objective": both})
