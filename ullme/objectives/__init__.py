"""What is minimised: one file per kind, each with one public `Objective`.

An objective has hyper-parameters only. `batch_loss` couples the rows of a whole batch and is pure in the representations,
so the joint step (`ullme.gradcache`) can cache it; `generation_loss` is per query, so chunks add up to the batch.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import model_validator

from ullme.components import Component

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.prediction import Prediction
    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["LEARNED_RANGE", "Objective"]

LEARNED_RANGE = (0.01, 1.0)
"""Where a learned temperature stays, as in CLIP: its logit scale, log(1 / temperature), lies in [0, log 100]."""


class Objective(Component):
    """Base of every kind. Terms come back by name, already weighted; the loss is their sum."""

    @property
    def inner(self) -> tuple[Objective, ...]:
        """The objectives that this one is made of; what it needs is what they need."""
        return ()

    @model_validator(mode="after")
    def _learns_each_temperature_once_and_in_range(self) -> Objective:
        twice = [name for name, count in Counter(n for one in self.inner for n in one.learned).items() if count > 1]
        if twice:
            raise ValueError(f"expected one objective that learns {twice[0]}, got several; set learn_temperature in one of them")
        lowest, highest = LEARNED_RANGE
        for name, start in self.learned.items():
            if not lowest <= start <= highest:
                raise ValueError(f"{name}: one that is learned stays between {lowest:g} and {highest:g}, got {start:g}")
        return self

    @property
    def learned(self) -> dict[str, float]:
        """Temperatures that are trained beside the weights, by name: where they start.

        What is optimised is log(1 / temperature) (CLIP, arXiv 2103.00020, section 2.5); `Representations.learned` holds it.
        """
        return {name: start for objective in self.inner for name, start in objective.learned.items()}

    def at(self, step: int) -> Objective:
        """The objective of this step of the phase, 0, 1, ...: itself, unless something in it follows a schedule."""
        del step
        return self

    @property
    def embeds(self) -> bool:
        """True when `batch_loss` has terms: without, nothing is embedded."""
        return any(objective.embeds for objective in self.inner) if self.inner else True

    @property
    def reads_texts(self) -> bool:
        """True when it learns from documents alone: a step's rows are texts, each the positive of itself."""
        return any(objective.reads_texts for objective in self.inner)

    @property
    def uses_special_tokens(self) -> bool:
        """True when texts are read through special tokens, so that the model must have them (`backbone.pooling: special`)."""
        return any(objective.uses_special_tokens for objective in self.inner)

    @property
    def prediction(self) -> Prediction | None:
        """How texts are read whose tokens `prediction_loss` predicts; None: no token is predicted."""
        return next((objective.prediction for objective in self.inner if objective.prediction is not None), None)

    @property
    def token_dropout(self) -> float:
        """Share of its tokens that a text lacks where it stands as a document."""
        return max((objective.token_dropout for objective in self.inner), default=0.0)

    @property
    def attention_dropout(self) -> float:
        """Share of the attention that is dropped in training, whatever the model's own configuration says."""
        return max((objective.attention_dropout for objective in self.inner), default=0.0)

    @property
    def uses_generation(self) -> bool:
        """True when the candidates' log-probabilities under the language model are needed."""
        return any(objective.uses_generation for objective in self.inner)

    @property
    def trains_generation(self) -> bool:
        """True when `generation_loss` has terms, so that the candidates' log-probabilities need a gradient."""
        return any(objective.trains_generation for objective in self.inner)

    @property
    def uses_reference(self) -> bool:
        """True when the log-probabilities under the reference model are needed too: the model as the phase began."""
        return any(objective.uses_reference for objective in self.inner)

    @property
    def uses_mismatched(self) -> bool:
        """True when `generation_loss` reads `CandidateLogprobs.baseline`, measured on queries beside another one's passage."""
        return any(objective.uses_mismatched for objective in self.inner)

    @property
    def uses_teacher(self) -> bool:
        """True when `batch_loss` reads the generation score of the candidates."""
        return any(objective.uses_teacher for objective in self.inner)

    @property
    def uses_guide(self) -> bool:
        """True when `batch_loss` reads the embeddings of the phase's guide, `Representations.guide`."""
        return any(objective.uses_guide for objective in self.inner)

    @property
    def copies_guide(self) -> bool:
        """True when it compares embeddings with the guide's number by number, so that both must be of one length."""
        return any(objective.copies_guide for objective in self.inner)

    @property
    def teacher_temperature(self) -> float:
        """What the generation score is divided by before its softmax."""
        return next((objective.teacher_temperature for objective in self.inner if objective.uses_teacher), 1.0)

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """Scalar terms of the whole batch; `generation` holds detached log-probabilities of its chosen queries."""
        del representations, generation
        return {}

    def prediction_loss(self, logprobs: Tensor) -> dict[str, Tensor]:
        """Float[T] values per term, one per predicted token, of its log-probability; the joint step averages them."""
        del logprobs
        return {}

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """Float[Q] values per term, one per query of this chunk; the joint step averages them over the whole batch."""
        del logprobs
        return {}
