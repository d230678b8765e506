from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import gradients, logprob_by_hand, tiny_encoder, toy_batch

from ullme import losses
from ullme.batches import TokenRow, chunk_by_tokens
from ullme.encoder import Encoder
from ullme.gradcache import StepReport, TrainBatch, step
from ullme.objectives import Objective
from ullme.objectives.contrastive import Contrastive
from ullme.objectives.distill import Distill
from ullme.objectives.grl import Grl
from ullme.objectives.matryoshka import Matryoshka
from ullme.objectives.preference import Preference
from ullme.objectives.sft import Sft
from ullme.objectives.spread_out import SpreadOut
from ullme.objectives.sum import Part, Sum
from ullme.representations import Representations
from ullme.training import LoraConfig

LORA = LoraConfig(rank=4, alpha=8)
GRL = Grl(
    contrastive_weight=1.0,
    preference_weight=0.5,
    kl_weight=0.7,
    temperature=0.1,
    beta=0.2,
    label_smoothing=0.1,
    generation_temperature=0.5,
)
OBJECTIVES: dict[str, Objective] = {
    "contrastive": Contrastive(temperature=0.1),
    "own candidates": Contrastive(temperature=0.1, in_batch=False),
    "symmetric": Contrastive(temperature=0.1, symmetric=True),
    "all pairs": Contrastive(temperature=0.1, all_pairs=True),
    "hard all": Contrastive(temperature=0.1, hardness=5),
    "hard in batch": Contrastive(temperature=0.1, hardness=5, hardness_of="in_batch_negatives"),
    "hard mined": Contrastive(temperature=0.1, hardness=5, hardness_of="hard_negatives", all_pairs=True),
    "false negatives": Contrastive(temperature=0.1, false_negative_margin=0.01),
    "learned": Contrastive(temperature=0.1, learn_temperature=True),
    "learned, hard and symmetric": Contrastive(temperature=0.1, learn_temperature=True, hardness=5, symmetric=True),
    "matryoshka, learned": Matryoshka(dims=(64, 16), objective=Contrastive(kind="contrastive", learn_temperature=True)),
    "guided": Contrastive(temperature=0.1, guided=True),
    "guided, all pairs": Contrastive(temperature=0.1, guided=True, guide_margin=0.1, all_pairs=True),
    "guided, symmetric": Contrastive(temperature=0.1, guided=True, guide_margin=-0.05, symmetric=True),
    "guided, own candidates": Contrastive(temperature=0.1, guided=True, in_batch=False),
    "distill, scores": Distill(temperature=0.1, guide_temperature=0.2),
    "distill, scores of the batch": Distill(temperature=0.1, in_batch=True),
    "distill, embeddings": Distill(target="embeddings"),
    "grl": GRL,
    "grl, ipo": GRL.model_copy(update={"preference_loss": "ipo", "label_smoothing": 0.0}),
    "grl, kto": GRL.model_copy(update={"preference_loss": "kto", "label_smoothing": 0.0}),
    "sft": Sft(kind="sft"),
    "sft, summed": Sft(kind="sft", per_token=False),
    "preference": Preference(label_smoothing=0.1, beta=0.2),
    "preference, ipo": Preference(loss="ipo", beta=0.2),
    "preference, hinge": Preference(loss="hinge", beta=0.2),
    "preference, kto": Preference(loss="kto", beta=0.2),
    "spread_out": SpreadOut(),
    "sum": Sum(
        parts=(
            Part(objective=Contrastive(kind="contrastive", temperature=0.1, learn_temperature=True)),
            Part(objective=SpreadOut(kind="spread_out"), weight=0.3),
            Part(objective=Distill(kind="distill"), weight=0.4),
            Part(objective=Sft(kind="sft"), weight=0.2),
            Part(objective=Preference(kind="preference", loss="hinge"), weight=0.1),
        )
    ),
}
SEEDS = {"preference, kto": 7}  # a batch whose baseline is above zero; of the others it is cut off there
BUDGETS = [1, 60, 150, 100_000]  # one row per chunk, several, all at once


def encoder64(**settings: Any) -> Encoder:
    return tiny_encoder(dtype=torch.float64, lora=LORA, **settings)


# The same losses, written plainly: row by row, no chunks, no padding, full logits.


def embed_one(encoder: Encoder, row: TokenRow) -> Tensor:
    ids = torch.tensor([list(row.ids)])
    states = encoder.model.get_base_model().model(input_ids=ids, is_causal=False, use_cache=False).last_hidden_state[0]
    pooled = states[row.prompt :].mean(0)
    return pooled / pooled.norm()


def cross_entropy(logits: list[Tensor], target: int) -> Tensor:
    return torch.logsumexp(torch.stack(logits), 0) - logits[target]


def learned_of(objective: Objective) -> dict[str, Tensor]:
    """log(1 / temperature) of what is learned, away from where it starts."""
    return {
        name: torch.tensor(0.2 - math.log(start), dtype=torch.float64, requires_grad=True)
        for name, start in objective.learned.items()
    }


def contrastive_plainly(
    objective: Contrastive | Grl, batch: TrainBatch, queries: Tensor, documents: Tensor, learned: dict[str, Tensor]
) -> Tensor:
    plain = Contrastive() if isinstance(objective, Grl) else objective
    scores = queries @ documents.T
    temperature: Any = 1 / learned["temperature"].exp() if plain.learn_temperature else objective.temperature
    guide_queries, guide_documents = guide_of(batch)
    terms = []

    def near(q: int, one: Tensor, other: Tensor) -> bool:
        limit = guide_queries[q] @ guide_documents[int(batch.candidates[q, 0])] - plain.guide_margin
        return plain.guided and bool(one @ other > limit)

    for q in range(len(scores)):
        target = int(batch.candidates[q, 0])
        own = {int(c) for c in batch.candidates[q] if c >= 0}
        columns = range(scores.shape[1]) if objective.in_batch else sorted(own)
        kept = [c for c in columns if not batch.known[q, c]]
        if plain.false_negative_margin is not None:
            kept = [c for c in kept if c == target or scores[q, c] <= scores[q, target] + plain.false_negative_margin]
        kept = [c for c in kept if c == target or not near(q, guide_queries[q], guide_documents[c])]
        hard = {"all_negatives": set(kept), "hard_negatives": own, "in_batch_negatives": set(kept) - own}[plain.hardness_of]
        logits = [
            scores[q, c] / temperature + (plain.hardness * scores[q, c].detach() if c in hard and c != target else 0.0)
            for c in kept
        ]
        if plain.all_pairs:
            targets = [int(column) for column in batch.candidates[:, 0]]
            others = [o for o in range(len(scores)) if targets[o] != target]
            asking = [o for o in others if not batch.known[o, target] and not near(q, guide_documents[target], guide_queries[o])]
            apart = [c for c in range(len(documents)) if c not in own and not batch.known[q, c]]
            apart = [c for c in apart if not near(q, guide_documents[target], guide_documents[c])]
            extra = [queries[q] @ queries[o] for o in others if not near(q, guide_queries[q], guide_queries[o])]
            extra += [scores[o, target] for o in [q, *asking]]
            extra += [documents[target] @ documents[c] for c in apart]
            logits += [value / temperature for value in extra]
        terms.append(cross_entropy(logits, kept.index(target)))
    loss = torch.stack(terms).mean()
    if isinstance(objective, Contrastive) and objective.symmetric:
        mirrored = []
        for q in range(len(scores)):
            target = int(batch.candidates[q, 0])
            kept = [o for o in range(len(scores)) if o == q or (not batch.known[o, target] and batch.candidates[o, 0] != target)]
            kept = [o for o in kept if o == q or not near(q, guide_documents[target], guide_queries[o])]
            mirrored.append(cross_entropy([scores[o, target] / temperature for o in kept], kept.index(q)))
        loss = (loss + torch.stack(mirrored).mean()) / 2
    return loss


def guide_of(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(batch.guide_queries), torch.as_tensor(batch.guide_documents)


def distill_plainly(objective: Distill, batch: TrainBatch, queries: Tensor, documents: Tensor) -> Tensor:
    guide_queries, guide_documents = guide_of(batch)
    if objective.target == "embeddings":
        pairs = [*zip(queries, guide_queries, strict=True), *zip(documents, guide_documents, strict=True)]
        return torch.stack([1 - mine @ theirs for mine, theirs in pairs]).mean()
    terms = []
    for q, row in enumerate(batch.candidates):
        everything = [c for c in range(len(documents)) if not batch.known[q, c]]
        columns = everything if objective.in_batch else [int(c) for c in row if c >= 0]
        teacher = torch.softmax(guide_documents[columns] @ guide_queries[q] / objective.guide_temperature, 0)
        student = torch.softmax(documents[columns] @ queries[q] / objective.temperature, 0)
        terms.append((teacher * (teacher / student).log()).sum())
    return torch.stack(terms).mean()


def spread_out_plainly(rows: Tensor, names: list[int]) -> Tensor:
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j and names[i] != names[j]]
    return torch.stack([(rows[i] @ rows[j]) ** 2 for i, j in pairs]).mean()


def preference_plainly(objective: Any, loss: str, policy: list[Tensor], reference: list[Tensor], lengths: list[int]) -> Tensor:
    values = []
    for n in range(1, len(policy)):
        if loss == "ipo":
            gains = [(policy[i] - reference[i]) / lengths[i] for i in (0, n)]
            values.append((gains[0] - gains[1] - 1 / (2 * objective.beta)) ** 2)
            continue
        margin = objective.beta * ((policy[0] - policy[n]) - (reference[0] - reference[n]))
        if loss == "hinge":
            values.append(torch.relu(1 - margin))
            continue
        smooth = objective.label_smoothing
        values.append(-(1 - smooth) * torch.log(torch.sigmoid(margin)) - smooth * torch.log(torch.sigmoid(-margin)))
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def kto_plainly(beta: float, generation: list[Scored]) -> Tensor:
    baseline = torch.stack([of.mismatched for of in generation]).mean().clamp(min=0)
    values = []
    for of in generation:
        gains = [policy - reference for policy, reference in zip(of.policy, of.reference, strict=True)]
        values.append((1 - torch.sigmoid(beta * (gains[0] - baseline))) / 2)
        if gains[1:]:
            values[-1] = values[-1] + torch.stack([1 - torch.sigmoid(beta * (baseline - gain)) for gain in gains[1:]]).mean() / 2
    return torch.stack(values).mean()


class Scored(NamedTuple):
    """Of one query's candidates: which they are, their log-probabilities, those of the reference, and their lengths.

    mismatched: log pi - log pi_ref of the next scored query's target.
    """

    query: int
    policy: list[Tensor]
    reference: list[Tensor]
    lengths: list[int]
    mismatched: Tensor


def scored_plainly(encoder: Encoder, batch: TrainBatch) -> list[Scored]:
    found = []
    for place, q in enumerate(batch.scored):
        rows = [TokenRow([*batch.prompts[place], *body], len(batch.prompts[place])) for body in batch.passages[place] if body]
        policy = [logprob_by_hand(encoder, row) for row in rows]
        with torch.no_grad(), encoder.model.disable_adapter():
            reference = [logprob_by_hand(encoder, row) for row in rows]
        other = batch.passages[(place + 1) % len(batch.scored)][0]
        with torch.no_grad():
            stranger = TokenRow([*batch.prompts[place], *other], len(batch.prompts[place]))
            mismatched = logprob_by_hand(encoder, stranger)
            with encoder.model.disable_adapter():
                mismatched = mismatched - logprob_by_hand(encoder, stranger)
        found.append(Scored(q, policy, reference, [len(row) - row.prompt for row in rows], mismatched))
    return found


def plainly(encoder: Encoder, objective: Any, batch: TrainBatch, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row goes through the model once, whatever terms use it: the norms round to float32, so two passes do not add up."""
    queries = torch.stack([embed_one(encoder, row) for row in batch.queries])
    documents = torch.stack([embed_one(encoder, row) for row in batch.documents])
    generation = scored_plainly(encoder, batch) if objective.uses_generation or isinstance(objective, Grl) else []
    return terms_plainly(objective, batch, (queries, documents), generation, learned)


def terms_plainly(
    objective: Any, batch: TrainBatch, embedded: tuple[Tensor, Tensor], generation: list[Scored], learned: dict[str, Tensor]
) -> dict[str, Tensor]:
    queries, documents = embedded
    scores = queries @ documents.T
    if isinstance(objective, Sum):
        parts = [(part.weight, terms_plainly(part.objective, batch, embedded, generation, learned)) for part in objective.parts]
        return {name: weight * value for weight, terms in parts for name, value in terms.items()}
    if isinstance(objective, Matryoshka):
        short = [tuple(rows[:, :dim] / rows[:, :dim].norm(dim=1, keepdim=True) for rows in embedded) for dim in objective.dims]
        found = [terms_plainly(objective.objective, batch, cut, generation, learned) for cut in short]  # type: ignore[arg-type]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}
    if isinstance(objective, Contrastive):
        return {"contrastive": contrastive_plainly(objective, batch, queries, documents, learned)}
    if isinstance(objective, Distill):
        return {"distill": distill_plainly(objective, batch, queries, documents)}
    if isinstance(objective, SpreadOut):
        targets = [int(column) for column in batch.candidates[:, 0]]
        apart = spread_out_plainly(queries, list(range(len(queries)))) + spread_out_plainly(documents[targets], targets)
        return {"spread_out": apart}
    if isinstance(objective, Sft):
        values = [-of.policy[0] / (of.lengths[0] if objective.per_token else 1) for of in generation]
        return {"sft": torch.stack(values).mean()}
    loss = objective.loss if isinstance(objective, Preference) else objective.preference_loss
    if loss == "kto":
        preference = kto_plainly(objective.beta, generation)
    else:
        values = [preference_plainly(objective, loss, of.policy, of.reference, of.lengths) for of in generation]
        preference = torch.stack(values).mean()
    if isinstance(objective, Preference):
        return {"preference": preference}
    kl = []
    for of in generation:
        teacher = torch.stack([p / n for p, n in zip(of.policy, of.lengths, strict=True)]).detach()
        teacher = teacher / objective.generation_temperature
        own = [int(c) for c in batch.candidates[of.query] if c >= 0]
        student = scores[of.query, own] / objective.temperature
        kl.append((teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))).sum())
    return {
        "contrastive": objective.contrastive_weight * contrastive_plainly(objective, batch, queries, documents, learned),
        "preference": objective.preference_weight * preference,
        "kl": objective.kl_weight * torch.stack(kl).mean(),
    }


def uncached(encoder: Encoder, objective: Objective, batch: TrainBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    learned = learned_of(objective)
    terms = plainly(encoder, objective, batch, learned)
    torch.stack(list(terms.values())).sum().backward()
    return {name: float(value.detach()) for name, value in terms.items()}, gradients(encoder) | of_learned(learned)


def of_learned(learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each learned temperature."""
    return {f"learned {name}": value.grad for name, value in learned.items() if value.grad is not None}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error of the whole gradient, and of the worst single tensor."""
    assert got.keys() == expected.keys()
    whole = math.sqrt(
        sum(float((got[n] - expected[n]).square().sum()) for n in got) / sum(float(g.square().sum()) for g in expected.values())
    )
    return whole, max(float((got[name] - expected[name]).norm() / expected[name].norm()) for name in got)


def cached(encoder: Encoder, objective: Objective, batch: TrainBatch, budget: int) -> tuple[StepReport, dict[str, Tensor]]:
    learned = learned_of(objective)
    report = step(encoder, objective, batch, chunk_tokens=budget, learned=learned)
    return report, gradients(encoder) | of_learned(learned)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_chunk_budget_gives_the_gradient_of_the_plain_loss(name: str) -> None:
    encoder, objective = encoder64(), OBJECTIVES[name]
    batch = toy_batch(encoder, seed=SEEDS.get(name, 0))
    terms, expected = uncached(encoder, objective, batch)
    assert min(float(gradient.norm()) for gradient in expected.values()) > 1e-6
    for budget in BUDGETS:
        report, got = cached(encoder, objective, batch, budget)
        assert report.terms == pytest.approx(terms, rel=1e-10)
        whole, worst = errors(got, expected)
        assert whole <= 1e-9, budget
        assert worst <= 1e-9, budget


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_each_term_alone_has_its_plain_gradient(weights: tuple[int, int, int]) -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    objective = GRL.model_copy(update=dict(zip(("contrastive_weight", "preference_weight", "kl_weight"), weights, strict=True)))
    _, expected = uncached(encoder, objective, batch)
    for budget in (1, 100_000):
        _, got = cached(encoder, objective, batch, budget)
        assert max(errors(got, expected)) <= 1e-9


def test_the_baseline_of_kto_is_of_the_whole_batch_and_zero_where_one_query_is_scored() -> None:
    encoder, objective = encoder64(), OBJECTIVES["preference, kto"]
    baselines: list[float] = []
    plain = Preference.generation_loss

    def watched(self: Preference, logprobs: Any) -> dict[str, Tensor]:
        baselines.append(float(logprobs.baseline))
        return plain(self, logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preference, "generation_loss", watched)
        cached(encoder, objective, toy_batch(encoder, seed=7), 1)
        cached(encoder, objective, toy_batch(encoder, seed=7, scored=[2]), 1)
    assert min(baselines[:4]) > 0
    assert len(set(baselines[:4])) == 1
    assert baselines[4:] == [0.0]


def test_full_fine_tuning_has_its_plain_gradient() -> None:
    encoder = tiny_encoder(dtype=torch.float64)
    encoder.model.get_base_model = lambda: encoder.model
    batch = toy_batch(encoder)
    _, expected = uncached(encoder, OBJECTIVES["contrastive"], batch)
    del encoder.model.get_base_model
    _, got = cached(encoder, OBJECTIVES["contrastive"], batch, 80)
    assert len(expected) > 15
    assert max(errors(got, expected)) <= 1e-9


@pytest.mark.parametrize("pooling", ["weighted_mean", "last", "first", "max"])
def test_every_pooling_is_chunk_invariant(pooling: Any) -> None:
    encoder = encoder64(pooling=pooling)
    batch = toy_batch(encoder)
    (_, once), (_, apart) = (cached(encoder, GRL, batch, budget) for budget in (100_000, 1))
    assert max(errors(apart, once)) <= 1e-9


@pytest.mark.parametrize("way", ["frozen head", "fused", "chunks"])
def test_every_way_to_the_log_probabilities_gives_the_same_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    encoder.model.get_output_embeddings().weight.requires_grad_(way != "frozen head")
    batch = toy_batch(encoder)
    _, expected = uncached(encoder, GRL, batch)
    seen = []
    for holder, name in ((torch.nn.functional, "linear_cross_entropy"), (losses._FrozenHead, "apply")):
        own = getattr(holder, name)

        def noted(*a: Any, plain: Any = own, name: str = name, **k: Any) -> Any:
            seen.extend([name] * torch.is_grad_enabled())
            return plain(*a, **k)

        monkeypatch.setattr(holder, name, noted)
    if way == "chunks":
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions")
    if way != "fused":
        monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 258 * 10)
    _, got = cached(encoder, GRL, batch, 100_000)
    assert set(seen) == {"frozen head": {"apply"}, "fused": {"linear_cross_entropy"}, "chunks": set()}[way]
    assert max(errors(got, expected)) <= 1e-9


def test_a_scale_that_is_wrong_by_one_percent_in_one_chunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    _, expected = uncached(encoder, GRL, batch)
    plain, calls = Encoder.embed, []

    def wrong(self: Encoder, tokens: Any) -> Tensor:
        embedded = plain(self, tokens)
        calls.append(embedded.requires_grad)
        if sum(calls) == 2 and embedded.requires_grad:  # the second chunk of the pass with gradient
            return embedded.detach() + 1.01 * (embedded - embedded.detach())
        return embedded

    monkeypatch.setattr(Encoder, "embed", wrong)
    _, got = cached(encoder, GRL, batch, 60)
    assert sum(calls) > 2
    whole, worst = errors(got, expected)
    assert whole > 1e-6
    assert worst > 1e-6


def test_a_generation_term_wrong_by_one_percent_in_one_chunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    _, expected = uncached(encoder, GRL, batch)
    plain, calls = Grl.generation_loss, []

    def wrong(self: Grl, logprobs: Any) -> dict[str, Tensor]:
        calls.append(1)
        scale = 1.01 if len(calls) == 2 else 1.0
        return {name: value * scale for name, value in plain(self, logprobs).items()}

    monkeypatch.setattr(Grl, "generation_loss", wrong)
    _, got = cached(encoder, GRL, batch, 60)
    assert len(calls) > 2
    assert errors(got, expected)[0] > 1e-6


def test_terms_do_not_grow_with_the_number_of_chunks_or_the_scored_queries() -> None:
    encoder = encoder64()
    reports = [cached(encoder, GRL, toy_batch(encoder), budget)[0] for budget in BUDGETS]
    for report in reports[1:]:
        assert report.terms == pytest.approx(reports[0].terms, rel=1e-10)
        assert report.health == pytest.approx(reports[0].health, rel=1e-10)
        assert report.tokens == reports[0].tokens
    alone = [cached(encoder, GRL, toy_batch(encoder, scored=[q]), 60)[0].terms for q in (0, 1, 3, 4)]
    for name in ("preference", "kl"):
        assert float(np.mean([terms[name] for terms in alone])) == pytest.approx(reports[0].terms[name], rel=1e-9)


def test_the_report_names_terms_scores_and_tokens() -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    report, _ = cached(encoder, GRL, batch, 100)
    assert report.terms.keys() == {"contrastive", "preference", "kl"}
    assert report.loss == pytest.approx(sum(report.terms.values()))
    assert report.health.keys() == {
        "positive_score",
        "hardest_negative_score",
        "accuracy",
        "alignment",
        "uniformity",
        "generation_entropy",
        "generation_accuracy",
    }
    candidates = sum(len(p) + len(body) for p, bodies in zip(batch.prompts, batch.passages, strict=True) for body in bodies if body)
    assert report.tokens == sum(map(len, [*batch.queries, *batch.documents])) + 2 * candidates
    scores = (
        torch.stack([embed_one(encoder, r) for r in batch.queries])
        @ torch.stack([embed_one(encoder, r) for r in batch.documents]).T
    )
    positive = scores[range(5), batch.candidates[:, 0]]
    assert report.health["positive_score"] == pytest.approx(float(positive.detach().mean()), rel=1e-9)
    queries, documents = ([embed_one(encoder, row).detach() for row in rows] for rows in (batch.queries, batch.documents))
    apart = [(query - documents[place]).square().sum() for query, place in zip(queries, batch.candidates[:, 0], strict=True)]
    assert report.health["alignment"] == pytest.approx(float(torch.stack(apart).mean()), rel=1e-9)
    pairs = [(one - other).square().sum() for place, one in enumerate(documents) for other in documents[place + 1 :]]
    assert report.health["uniformity"] == pytest.approx(float((-2 * torch.stack(pairs)).exp().mean().log()), rel=1e-9)


def test_padding_is_counted() -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    assert cached(encoder, OBJECTIVES["contrastive"], batch, 1)[0].padding == 0  # every row alone
    rows = [len(row) for row in [*batch.queries, *batch.documents]]
    chunks = list(chunk_by_tokens(rows, 100_000))
    padded = sum(max(rows[place] for place in chunk) * len(chunk) for chunk in chunks)
    found = cached(encoder, OBJECTIVES["contrastive"], batch, 100_000)[0].padding
    assert found == pytest.approx(1 - sum(rows) / padded)
    assert found > 0


def test_without_generation_weights_the_language_model_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    monkeypatch.setattr(Encoder, "sequence_logprobs", lambda *_: pytest.fail("the language model was run"))
    quiet = GRL.model_copy(update={"preference_weight": 0.0, "kl_weight": 0.0})
    assert cached(encoder, quiet, toy_batch(encoder), 100)[0].terms.keys() == {"contrastive"}


def test_one_chunk_is_encoded_once_and_several_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    plain, calls = Encoder.embed, []
    monkeypatch.setattr(Encoder, "embed", lambda self, tokens: (calls.append(len(tokens.input_ids)), plain(self, tokens))[1])
    step(encoder, OBJECTIVES["contrastive"], batch, chunk_tokens=100_000)
    assert sum(calls) == 12
    calls.clear()
    step(encoder, OBJECTIVES["contrastive"], batch, chunk_tokens=60)
    assert sum(calls) == 24


@pytest.mark.parametrize("budget", [1, 60])
def test_with_dropout_both_passes_are_bit_equal_and_rows_differ_from_no_dropout(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_encoder(lora=LoraConfig(rank=4, alpha=8, dropout=0.3))
    batch = toy_batch(encoder)
    encoder.model.train()
    plain = Encoder.embed
    passes: dict[bool, list[Tensor]] = {True: [], False: []}

    def watched(self: Encoder, tokens: Any) -> Tensor:
        embedded = plain(self, tokens)
        passes[embedded.requires_grad].append(embedded.detach().clone())
        return embedded

    monkeypatch.setattr(Encoder, "embed", watched)
    torch.manual_seed(5)
    step(encoder, GRL, batch, chunk_tokens=budget)
    assert len(passes[False]) == len(passes[True]) > 2
    assert all(torch.equal(first, second) for first, second in zip(passes[False], passes[True], strict=True))
    encoder.model.eval()
    quiet = plain(
        encoder, encoder.collate(sorted([*batch.queries, *batch.documents], key=lambda row: -len(row))[: len(passes[True][0])])
    )
    assert not torch.allclose(quiet, passes[True][0], atol=1e-4)


def test_replaying_a_chunk_leaves_the_random_state_after_the_step_as_without_it() -> None:
    encoder = tiny_encoder(lora=LoraConfig(rank=4, alpha=8, dropout=0.3))
    encoder.model.train()
    batch = toy_batch(encoder)
    torch.manual_seed(5)
    step(encoder, OBJECTIVES["contrastive"], batch, chunk_tokens=60)
    first = gradients(encoder)
    torch.manual_seed(5)
    step(encoder, OBJECTIVES["contrastive"], batch, chunk_tokens=60)
    assert max(errors(gradients(encoder), first)) == 0


def test_gradients_add_up_over_steps() -> None:
    encoder = encoder64()
    batches = [toy_batch(encoder, seed=seed) for seed in (0, 1)]
    apart = [cached(encoder, GRL, batch, 60)[1] for batch in batches]
    for batch in batches:
        step(encoder, GRL, batch, chunk_tokens=60)
    both = gradients(encoder)
    assert max(errors(both, {name: apart[0][name] + apart[1][name] for name in both})) <= 1e-9


def test_half_precision_gives_nearly_the_float32_gradient() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder = tiny_encoder(dtype=dtype, lora=LORA)
        for parameter in encoder.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        report, gradient = cached(encoder, GRL, toy_batch(encoder), 60)
        found.append((report, torch.cat([value.flatten() for value in gradient.values()])))
    assert found[1][0].loss == pytest.approx(found[0][0].loss, rel=0.05)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.95


def test_own_candidates_are_marked_and_missing_ones_are_not() -> None:
    encoder = encoder64()
    batch = toy_batch(encoder)
    empty = torch.zeros(5, 4)
    marks = Representations(empty, torch.zeros(7, 4), torch.as_tensor(batch.candidates), torch.as_tensor(batch.known)).own
    expected = [{0, 1, 2}, {3, 0}, {4, 5, 1}, {0, 6, 3}, {5}]
    assert [set(row.nonzero().flatten().tolist()) for row in marks] == expected
