"""Which examples, positives, negatives and scored queries make up a training step, and their token rows.

All of it is a pure function of (seed, phase, step), so a run that was interrupted goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.data import Example
from ullme.errors import DataError
from ullme.mixture import Mixture
from ullme.scoring import ScoredRows

if TYPE_CHECKING:
    from ullme.encoder import Encoder
    from ullme.gradcache import TrainBatch
    from ullme.guide import Guide
    from ullme.training import PhaseConfig

__all__ = ["Asked", "Sampler"]


@dataclass(frozen=True)
class Asked:
    """A query whose candidates the language model scores. candidates: (id, text), the positive first; None = there is none."""

    query_id: str
    query: str
    candidates: Sequence[tuple[str, str] | None]

    def pair(self, identifier: str) -> str:
        """Name of a stored score."""
        return f"{self.query_id}\t{identifier}"


@dataclass(frozen=True)
class Sampler:
    """Which examples, positives, negatives and scored queries make up a step: a pure function of (seed, phase, step)."""

    examples: Sequence[Example]
    phase: PhaseConfig
    seed: int
    phase_index: int = 0
    teacher: Mapping[str, float] | None = None
    """The stored generation score by `Asked.pair`, where the teacher is frozen."""
    reference: Mapping[str, float] | None = None
    """The stored log-probability by `Asked.pair`, where the reference is."""
    guide: Guide | None = None
    """What the phase's guide makes of the training texts."""

    def __post_init__(self) -> None:
        if len(self.examples) < 2:
            raise DataError(f"training: expected at least 2 examples, got {len(self.examples)}; look at the data stage's counts")
        _ = self.mixture  # refuses data sets that are not there before the first step

    @cached_property
    def mixture(self) -> Mixture:
        """Which data set each query comes from."""
        return Mixture(self.examples, self.phase.mixture, self.phase.batch_size, self.phase.steps)

    def positions(self, step: int) -> list[int]:
        """Examples of a step. Of each data set, epochs are permutations laid end to end, so that no example is left over."""
        orders: dict[tuple[str, int], np.ndarray] = {}
        chosen = []
        for name, number in self.mixture.drawn(step):
            places = self.mixture.places[name]
            epoch, offset = divmod(number, len(places))
            if (name, epoch) not in orders:
                orders[name, epoch] = np.random.default_rng([self.seed, self.phase_index, epoch]).permutation(len(places))
            chosen.append(places[orders[name, epoch][offset]])
        return chosen

    def draw(self, step: int) -> list[tuple[Example, int, list[int]]]:
        """(example, which positive, which negatives) for every query of a step."""
        random = np.random.default_rng([self.seed, self.phase_index, step, 1])
        drawn = []
        for position in self.positions(step):
            example = self.examples[position]
            positive = int(random.integers(len(example.positives)))
            count = min(self.phase.num_negatives, len(example.negatives))
            drawn.append((example, positive, sorted(int(n) for n in random.choice(len(example.negatives), count, replace=False))))
        return drawn

    def scored(self, step: int) -> list[int]:
        """Queries of a step (positions in the batch) whose candidates the language model scores."""
        size = self.mixture.size(step)
        random = np.random.default_rng([self.seed, self.phase_index, step, 2])
        return sorted(int(p) for p in random.choice(size, min(self.phase.generation.queries or size, size), replace=False))

    def asked(self, step: int) -> list[Asked]:
        """The scored queries of a step, with their candidates."""
        drawn = self.draw(step)
        width = 1 + self.phase.num_negatives
        found = []
        for row in self.scored(step):
            example, candidates = drawn[row][0], _candidates(*drawn[row])
            found.append(Asked(example.query_id, example.query, [*candidates, *[None] * (width - len(candidates))]))
        return found

    def batch(self, step: int, encoder: Encoder) -> TrainBatch:
        """Token rows of a step. A passage that several queries share is encoded once."""
        from ullme.batches import with_some_left_out
        from ullme.gradcache import TrainBatch

        drawn = self.draw(step)
        column: dict[str, int] = {}
        texts: list[str] = []
        datasets: list[str] = []
        candidates = np.full((len(drawn), 1 + self.phase.num_negatives), -1, dtype=np.int64)
        for row, entry in enumerate(drawn):
            for place, (identifier, text) in enumerate(_candidates(*entry)):
                if identifier not in column:
                    column[identifier] = len(texts)
                    texts.append(text)
                    datasets.append(entry[0].dataset)
                candidates[row, place] = column[identifier]
        known = np.zeros((len(drawn), len(texts)), dtype=bool)
        for row, (example, _, _) in enumerate(drawn):
            for identifier in example.positive_ids:
                if identifier in column and column[identifier] != candidates[row, 0]:
                    known[row, column[identifier]] = True
        generation: dict[str, Any] = {}
        if self.phase.objective.uses_generation:
            generation = self.scoring(self.asked(step), self.scored(step), encoder)
        guided: dict[str, Any] = {}
        if self.guide is not None:
            guided["guide_queries"] = self.guide.queries([example for example, _, _ in drawn])
            guided["guide_documents"] = self.guide.documents(texts)
        asking = [example.dataset for example, _, _ in drawn]
        rows = encoder.tokenise(texts, "document", dataset=datasets, max_tokens=self.phase.max_tokens)
        if self.phase.objective.prediction is not None:
            random = np.random.default_rng([self.seed, self.phase_index, step, 4])
            texts_again = [rows[column] for column in candidates[:, 0]]
            generation["predicted"] = self.phase.objective.prediction.rows(texts_again, encoder, random)
        if self.phase.objective.token_dropout:
            random = np.random.default_rng([self.seed, self.phase_index, step, 5])
            share, ending = self.phase.objective.token_dropout, len(encoder.prompts.ending)
            rows = [with_some_left_out(row, share, random, ending=ending) for row in rows]
        return TrainBatch(
            query_ids=[example.query_id for example, _, _ in drawn],
            queries=encoder.tokenise(
                [example.query for example, _, _ in drawn],
                "document" if self.phase.objective.reads_texts else "query",
                dataset=asking,
                instructions=[example.instruction for example, _, _ in drawn],
                max_tokens=self.phase.max_tokens,
            ),
            documents=rows,
            candidates=candidates,
            known=known,
            own_only=np.array([not self.mixture.setting(name).in_batch for name in asking]),
            dataset=asking[0] if len(self.mixture.places) > 1 and len(set(asking)) == 1 else "",
            **generation,
            **guided,
        )

    def scoring(self, asked: Sequence[Asked], rows: Sequence[int], encoder: Encoder) -> dict[str, Any]:
        """What the language model reads, as fields of a `TrainBatch`. rows: the queries' places in the batch.

        A query without a token, or whose positive has none, has no probability and is left out.
        """
        settings = self.phase.generation
        texts = [[None if found is None else found[1] for found in one.candidates] for one in asked]
        read = ScoredRows.of(encoder, settings, [one.query for one in asked], texts)
        fields: dict[str, Any] = {
            "scored": [rows[place] for place in read.kept],
            "prompts": read.prompts,
            "passages": read.passages,
            "score": settings.score,
        }
        if self.phase.objective.uses_reference and settings.reference != "live":
            stored = [self._stored(asked[place], self.reference or {}) for place in read.kept]
            fields["reference"] = np.array(stored, dtype=np.float32)
        if not self.phase.objective.uses_teacher:
            return fields
        if self.teacher is not None:
            return fields | {"teacher": np.array([self._stored(asked[place], self.teacher) for place in read.kept], np.float32)}
        return fields | {"alone": read.alone, "questions": read.questions}

    @staticmethod
    def _stored(one: Asked, teacher: Mapping[str, float]) -> list[float]:
        return [teacher.get(one.pair(found[0]), 0.0) if found is not None else 0.0 for found in one.candidates]


def _candidates(example: Example, positive: int, negatives: Sequence[int]) -> list[tuple[str, str]]:
    """(id, text) of the positive, then of the negatives."""
    chosen = [(example.negative_ids[n], example.negatives[n]) for n in negatives]
    return [(example.positive_ids[positive], example.positives[positive]), *chosen]
