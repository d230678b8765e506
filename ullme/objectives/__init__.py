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
    def uses_generation(self) -> bool:
        """True when the candidates' log-probabilities under the language model are needed."""
        return False

    @property
    def trains_generation(self) -> bool:
        """True when `generation_loss` has terms, so that the candidates' log-probabilities need a gradient."""
        return False

    @property
    def uses_reference(self) -> bool:
        """True when the log-probabilities under the reference model (adapters off) are needed too."""
        return False

    @property
    def uses_teacher(self) -> bool:
        """True when `batch_loss` reads the generation score of the candidates."""
        return False

    @property
    def teacher_temperature(self) -> float:
        """What the generation score is divided by before its softmax."""
        return 1.0

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """Scalar terms of the whole batch; `generation` holds detached log-probabilities of its chosen queries."""
        raise NotImplementedError

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """Float[Q] values per term, one per query of this chunk; the joint step averages them over the whole batch."""
        del logprobs
        return {}
