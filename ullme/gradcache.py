"""The joint step: gradients of a whole batch, in chunks that fit a token budget (GradCache, arXiv 2101.06983).

    1. encode every row without gradient                      (skipped when everything fits the budget at once)
    2. score candidates with the language model, chunk by chunk, backward at once; keep the detached log-probabilities
    3. batch loss on the representations -> their gradient     (the alignment term costs no further forward)
    4. encode every chunk again with gradient, backward through  sum(representation * cached gradient)

Every term is divided by the number of queries of the whole batch, so the result does not depend on the chunk size. With
dropout, the random state of each chunk is replayed, so that both passes give bit-equal representations.

Where several processes train, each takes its share of the chunks (see `ullme.distributed`), and all of them end with the gradient
of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ullme.attention import trunk
from ullme.batches import TokenRow, chunk_by_tokens
from ullme.distributed import current
from ullme.encoder import Encoder
from ullme.fused import fused_layers
from ullme.generation import Logprobs, logprobs, passage_rows, teacher_scores
from ullme.losses import entropy
from ullme.objectives import Objective
from ullme.prediction import PredictedRow
from ullme.representations import CandidateLogprobs, Representations
from ullme.scoring import GenerationScore

__all__ = ["StepReport", "TrainBatch", "step"]

FREE = 4
"""How many times as many tokens a pass may have that keeps nothing for a gradient, and so holds far less per token."""


@dataclass(frozen=True)
class TrainBatch:
    """Token rows of one optimisation step.

    candidates: Int[Q K], positions in `documents`: column 0 the target, then hard negatives, -1 where there are fewer.
    known: Bool[Q C], True where document c is a positive of query q but not its target. own_only: Bool[Q], True where other
    queries' passages are no negatives of query q; None: nowhere. dataset: that of all queries, where a phase has several.
    scored: the queries (positions) whose candidates the language model scores; `prompts` and `passages` hold for each of
    them the condition's tokens and its K candidates' tokens (empty where missing). score: which generation score the
    alignment reads; `alone` and `questions` are the rows that it needs (see `ullme.generation.teacher_scores`). teacher:
    Float[G K], the score as it was stored, or None. reference: Float[G K], the candidates' log-probabilities under the reference as
    they were stored, or None. predicted: texts for the objectives that predict their tokens. guide_queries: Float[Q G] and
    guide_documents: Float[C G], the unit-norm embeddings of the phase's guide, or None.
    """

    query_ids: Sequence[str]
    queries: Sequence[TokenRow]
    documents: Sequence[TokenRow]
    candidates: np.ndarray
    known: np.ndarray
    own_only: np.ndarray | None = None
    dataset: str = ""
    scored: Sequence[int] = ()
    prompts: Sequence[Sequence[int]] = ()
    passages: Sequence[Sequence[Sequence[int]]] = ()
    score: GenerationScore = "passage_given_query"
    alone: Sequence[Sequence[TokenRow | None]] = ()
    questions: Sequence[Sequence[TokenRow | None]] = ()
    teacher: np.ndarray | None = None
    reference: np.ndarray | None = None
    predicted: Sequence[PredictedRow] = ()
    guide_queries: np.ndarray | None = None
    guide_documents: np.ndarray | None = None


@dataclass(frozen=True)
class StepReport:
    """What one step measured: the weighted terms, their sum, and the scores behind them.

    tokens: that went through the model once or more, without padding. padding: share of the embedded positions that are padding.
    """

    terms: dict[str, float]
    health: dict[str, float]
    tokens: int
    padding: float = 0.0

    @property
    def loss(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())


def step(
    encoder: Encoder,
    objective: Objective,
    batch: TrainBatch,
    *,
    chunk_tokens: int,
    learned: Mapping[str, Tensor] | None = None,
) -> StepReport:
    """Add the gradient of the objective over the whole batch to the encoder's trainable parameters, and to those `learned`.

    None of them has a gradient before, where several processes train.

    chunk_tokens: padded tokens per forward pass with gradient; it changes memory and speed, not the result. learned: log(1 /
    temperature) of each temperature that `objective.learned` names.
    """
    terms: dict[str, float] = {}
    health: dict[str, float] = {}
    generation, tokens, padding = None, 0, 0.0
    if objective.uses_generation and batch.scored:
        generation, cost = _generation(encoder, objective, batch, chunk_tokens=chunk_tokens, terms=terms)
        tokens += cost
    if objective.prediction is not None:
        tokens += _predicted(encoder, objective, batch.predicted, chunk_tokens=chunk_tokens, terms=terms)
    if objective.embeds:
        representations, padding = _embedded(
            encoder, objective, batch, generation, chunk_tokens=chunk_tokens, learned=learned or {}, terms=terms
        )
        health |= _health(representations)
        tokens += sum(map(len, (*batch.queries, *batch.documents)))
    current().add_gradients(encoder.trainable().values())
    if generation is not None:
        scores = generation.score
        spread = entropy(scores, generation.present, temperature=objective.teacher_temperature)
        health["generation_entropy"] = float(spread.mean())
        best = scores.masked_fill(~generation.present, float("-inf")).argmax(1)
        health["generation_accuracy"] = float((best == 0).float().mean())
    return StepReport(terms, health, tokens, padding)


def _embedded(
    encoder: Encoder,
    objective: Objective,
    batch: TrainBatch,
    generation: CandidateLogprobs | None,
    *,
    chunk_tokens: int,
    learned: Mapping[str, Tensor],
    terms: dict[str, float],
) -> tuple[Representations, float]:
    """The batch loss and its backward through every row's embedding. Also the share of the positions that is padding."""
    device, together = encoder.device, current()
    rows = [*batch.queries, *batch.documents]
    lengths = [len(row) for row in rows]
    chunks = list(chunk_by_tokens(lengths, together.budget(lengths, chunk_tokens)))
    turns = together.turns(chunks)
    replay = _Replay(device)
    held = [max(lengths[position] for position in chunk) * len(chunk) for chunk in chunks]
    fits = all(sum(held[rank :: together.count]) <= chunk_tokens for rank in range(together.count))  # the same in every process
    pieces: list[Tensor] = []
    for index, (chunk, _) in enumerate(turns):
        with torch.set_grad_enabled(fits), replay.record(index):
            pieces.append(encoder.embed(encoder.collate([rows[position] for position in chunk])))
    cached = pieces[0].detach().new_zeros(len(rows), pieces[0].shape[1])
    for (chunk, counts), embedded in zip(turns, pieces, strict=True):
        if counts:
            cached[chunk] = embedded.detach()
    together.add(cached)
    cached.requires_grad_(True)

    representations = Representations(
        cached[: len(batch.queries)],
        cached[len(batch.queries) :],
        torch.as_tensor(batch.candidates, device=device),
        torch.as_tensor(batch.known, device=device),
        None if batch.own_only is None or not batch.own_only.any() else torch.as_tensor(batch.own_only, device=device),
        learned,
        *(None if of is None else torch.as_tensor(of, device=device) for of in (batch.guide_queries, batch.guide_documents)),
    )
    losses = objective.batch_loss(representations, generation)
    if losses:
        torch.stack(list(losses.values())).sum().backward()
        terms.update({name: float(value.detach()) for name, value in losses.items()})
        gradient = cached.grad
        assert gradient is not None
        live = pieces if fits else []
        del pieces
        for index, (chunk, counts) in enumerate(turns):
            if fits:
                embedded = live.pop(0)
            else:
                with replay.again(index):
                    embedded = encoder.embed(encoder.collate([rows[position] for position in chunk]))
            (embedded * gradient[chunk]).sum().mul(int(counts)).backward()
    padded = sum(max(lengths[position] for position in chunk) * len(chunk) for chunk, _ in turns)
    real = sum(lengths[position] for chunk, _ in turns for position in chunk)
    return representations, 1 - real / padded


def _predicted(
    encoder: Encoder, objective: Objective, rows: Sequence[PredictedRow], *, chunk_tokens: int, terms: dict[str, float]
) -> int:
    """Predict tokens of texts, with the backward of the terms that train on it, chunk by chunk. Returns the tokens it took."""
    together = current()
    rows = [row for row in rows if len(row.places)]
    lengths = [len(row) for row in rows]
    wanted = sum(len(row.places) for row in rows)
    sums: dict[str, Tensor] = {}
    for chunk, counts in together.turns(chunk_by_tokens(lengths, together.budget(lengths, chunk_tokens))):
        losses = objective.prediction_loss(encoder.predicted_logprobs([rows[position] for position in chunk]))
        share = int(counts) / wanted
        total = torch.stack([value.sum() for value in losses.values()]).sum()
        if total.requires_grad:  # not with a frozen trunk, of texts without special tokens
            total.mul(share).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=encoder.device)) + value.detach().sum() * share
    together.add(*sums.values())
    terms.update({name: float(value) for name, value in sums.items()})
    return sum(lengths)


def _generation(
    encoder: Encoder, objective: Objective, batch: TrainBatch, *, chunk_tokens: int, terms: dict[str, float]
) -> tuple[CandidateLogprobs, int]:
    """Score the candidates of the chosen queries; backward of the per-query terms chunk by chunk. Also the tokens it took."""
    rows = passage_rows(batch.prompts, batch.passages)
    stored, reads = batch.teacher, objective.uses_teacher and batch.teacher is None
    found, tokens = _nothing(encoder, batch, rows), 0
    if objective.trains_generation or objective.uses_reference or (reads and batch.score != "query_given_passage"):
        found, tokens = _passages(encoder, objective, batch, rows, chunk_tokens=chunk_tokens, terms=terms)
    if stored is not None:
        found = replace(found, teacher=torch.as_tensor(stored, device=encoder.device))
    elif reads and batch.score != "passage_given_query":
        given = Logprobs(found.total, found.tokens, 0)
        teacher, cost = teacher_scores(
            encoder, batch.score, given=given, alone=batch.alone, questions=batch.questions, chunk_tokens=FREE * chunk_tokens
        )
        found, tokens = replace(found, teacher=teacher), tokens + cost
    return found, tokens


def _nothing(encoder: Encoder, batch: TrainBatch, rows: Sequence[Sequence[TokenRow | None]]) -> CandidateLogprobs:
    """Which candidates there are, unscored."""
    device = encoder.device
    present = torch.tensor([[row is not None for row in group] for group in rows], device=device)
    zeros = torch.zeros(present.shape, device=device)
    return CandidateLogprobs(torch.tensor(list(batch.scored), device=device), zeros, zeros.long(), present)


def _passages(
    encoder: Encoder,
    objective: Objective,
    batch: TrainBatch,
    grouped: Sequence[Sequence[TokenRow | None]],
    *,
    chunk_tokens: int,
    terms: dict[str, float],
) -> tuple[CandidateLogprobs, int]:
    """log pi(p | q) of every candidate, with the backward of the terms that train on it."""
    width, together = batch.candidates.shape[1], current()
    baseline, cost = _baseline(encoder, batch, chunk_tokens=chunk_tokens) if objective.uses_mismatched else (None, 0)
    longest = [max(len(row) for row in group if row is not None) * width for group in grouped]
    found = _nothing(encoder, batch, grouped)
    reference = None if batch.reference is None else torch.as_tensor(batch.reference, device=encoder.device)
    live = objective.uses_reference and reference is None
    if live:
        reference = _reference(encoder, grouped, width, chunk_tokens=FREE * chunk_tokens)
    parts: list[tuple[list[int], CandidateLogprobs]] = []
    sums: dict[str, Tensor] = {}
    for chunk, counts in together.turns(chunk_by_tokens(longest, together.budget(longest, chunk_tokens))):
        with torch.set_grad_enabled(objective.trains_generation):
            total, lengths = _candidate_logprobs(encoder, [grouped[g] for g in chunk], width)
        scores = CandidateLogprobs(
            found.rows[chunk],
            total,
            lengths,
            found.present[chunk],
            None if reference is None else reference[chunk],
            baseline=baseline,
        )
        losses = objective.generation_loss(scores)
        if losses:
            share = int(counts) / len(batch.scored)
            torch.stack([value.sum() for value in losses.values()]).sum().mul(share).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=encoder.device)) + value.detach().sum() * share
        parts.append((chunk if counts else [], replace(scores, total=scores.total.detach())))
    total, lengths = parts[0][1].total.new_zeros(found.total.shape), torch.zeros_like(found.tokens)
    for chunk, scores in parts:
        if chunk:
            total[chunk], lengths[chunk] = scores.total, scores.tokens
    together.add(total, lengths, *sums.values())
    terms.update({name: float(value) for name, value in sums.items()})
    passes = 2 if live else 1
    cost += passes * sum(len(row) for group in grouped for row in group if row is not None)
    return CandidateLogprobs(found.rows, total, lengths, found.present, reference if live else None), cost


@torch.no_grad()
def _reference(
    encoder: Encoder, grouped: Sequence[Sequence[TokenRow | None]], width: int, *, chunk_tokens: int
) -> Float[Tensor, "G K"]:
    """log pi_ref(p | q) of every candidate, in larger passes than those with gradient, which products make better use of."""
    together = current()
    longest = [max(len(row) for row in group if row is not None) * width for group in grouped]
    found = torch.zeros(len(grouped), width, device=encoder.device)
    with encoder.reference(), fused_layers(trunk(encoder.model)):
        for chunk, counts in together.turns(chunk_by_tokens(longest, together.budget(longest, chunk_tokens))):
            total, _ = _candidate_logprobs(encoder, [grouped[g] for g in chunk], width)
            found = found.to(total.dtype)
            if counts:
                found[chunk] = total
    together.add(found)
    return found


@torch.no_grad()
def _baseline(encoder: Encoder, batch: TrainBatch, *, chunk_tokens: int) -> tuple[Float[Tensor, ""], int]:
    """z of KTO (arXiv 2402.01306, section 4.1), and the tokens that went through the model for it.

    The mean over the scored queries of log pi(p' | q) - log pi_ref(p' | q), at least 0, where p' is the target of the next scored
    query; 0 for a single query, which has no other one's passage. With dropout, z is that of one draw, like every other score.
    """
    if len(batch.scored) < 2:
        return torch.zeros((), device=encoder.device), 0
    others = [batch.passages[(place + 1) % len(batch.passages)][:1] for place in range(len(batch.passages))]
    rows = passage_rows(batch.prompts, others)
    policy = logprobs(encoder, rows, chunk_tokens=FREE * chunk_tokens)
    with encoder.reference():
        reference = logprobs(encoder, rows, chunk_tokens=FREE * chunk_tokens)
    return (policy.total - reference.total).mean().clamp_min(0), policy.cost + reference.cost


def _candidate_logprobs(
    encoder: Encoder, grouped: Sequence[Sequence[TokenRow | None]], width: int
) -> tuple[Float[Tensor, "G K"], Int[Tensor, "G K"]]:
    """Log-probability of every candidate and the number of its tokens, in one pass; zero where there is none."""
    places = [i * width + k for i, group in enumerate(grouped) for k, row in enumerate(group) if row is not None]
    where = torch.tensor(places, device=encoder.device)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(grouped) * width).index_put((where,), values).view(len(grouped), width)

    total, lengths = encoder.candidate_logprobs([[row for row in group if row is not None] for group in grouped])
    return spread(total), spread(lengths)


@torch.no_grad()
def _health(representations: Representations) -> dict[str, float]:
    """Scores and accuracy within the batch, and alignment and uniformity (arXiv 2005.10242, eq. 1 and 2, at their exponent 2)."""
    similarity = representations.queries @ representations.documents.T
    positive = similarity.gather(1, representations.target.unsqueeze(1)).squeeze(1)
    others = similarity.masked_fill(representations.excluded, float("-inf"))
    others.scatter_(1, representations.target.unsqueeze(1), float("-inf"))
    negative = others.amax(1)
    reachable = torch.isfinite(negative)
    return {
        "positive_score": float(positive.mean()),
        "hardest_negative_score": float(negative[reachable].mean()) if bool(reachable.any()) else 0.0,
        "accuracy": float((positive > negative).float().mean()),
        "alignment": float((2 - 2 * positive).mean()),
        "uniformity": _uniformity(representations.documents),
    }


def _uniformity(vectors: Float[Tensor, "C D"]) -> float:
    """log of the mean over pairs of exp(-2 |x - y|^2): 0 where all are one point, the lower the more evenly they spread."""
    if len(vectors) < 2:
        return 0.0
    pairs = (vectors @ vectors.T).triu(1)[tuple(torch.triu_indices(len(vectors), len(vectors), 1))]
    return float((4 * pairs - 4).exp().mean().log())


class _Replay:
    """Random state of each chunk's first pass, given back for its second."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @contextmanager
    def record(self, index: int) -> Iterator[None]:
        self._states[index] = (torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices])
        yield

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        cpu, cuda = self._states[index]
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(cpu)
            for device, state in zip(self._devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
