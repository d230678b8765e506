"""What is minimised: one file per kind, each with one public `Objective`.

An objective has hyper-parameters only. `batch_loss` couples the rows of a whole batch and is pure in the representations,
so the joint step (`ullme.gradcache`) can cache it; `generation_loss` is per query, so chunks add up to the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.components import Component

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.gradcache import CandidateLogprobs, Representations

__all__ = ["Objective"]


class Objective(Component):
    """Base of every kind. Terms come back by name, already weighted; the loss is their sum."""

    @property
    def inner(self) -> tuple[Objective, ...]:
        """The objectives that this one is made of; what it needs is what they need."""
        return ()

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
        """True when the log-probabilities under the reference model (adapters off) are needed too."""
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
    def teacher_temperature(self) -> float:
        """What the generation score is divided by before its softmax."""
        return next((objective.teacher_temperature for objective in self.inner if objective.uses_teacher), 1.0)

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """Scalar terms of the whole batch; `generation` holds detached log-probabilities of its chosen queries."""
        del representations, generation
        return {}

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """Float[Q] values per term, one per query of this chunk; the joint step averages them over the whole batch."""
        del logprobs
        return {}
