"""Several objectives at once, each with a weight: `{kind: sum, parts: [{objective: ...}, {objective: ..., weight: 0.1}]}`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from ullme.components import Section, component
from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Part", "Sum"]


class Part(Section):
    """An objective and how much it counts."""

    objective: Annotated[Objective, component("ullme.objectives")]
    weight: float = Field(default=1.0, gt=0)


class Sum(Objective):
    """L = sum over the parts of weight x loss. Contrastive + SFT and contrastive + preference of ULLME are such sums."""

    parts: tuple[Part, ...] = Field(min_length=2)

    @field_validator("parts")
    @classmethod
    def _each_kind_once(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        twice = [kind for kind, count in Counter(part.objective.kind for part in value).items() if count > 1]
        if twice:
            raise ValueError(f"expected each kind once, got {twice[0]} twice; put their weights together")
        return value

    @model_validator(mode="after")
    def _read_the_same(self) -> Sum:
        kinds = {part.objective.reads_texts: part.objective.kind for part in self.parts}
        if len(kinds) > 1:
            raise ValueError(f"{kinds[True]} reads documents and {kinds[False]} queries; put them into phases of their own")
        predicting = [part.objective.kind for part in self.parts if part.objective.prediction is not None]
        if len(predicting) > 1:
            raise ValueError(f"{' and '.join(predicting)} read the same texts in two ways; put them into phases of their own")
        return self

    @property
    def inner(self) -> tuple[Objective, ...]:
        """The parts."""
        return tuple(part.objective for part in self.parts)

    def at(self, step: int) -> Sum:
        """Its parts at this step."""
        parts = tuple(part.model_copy(update={"objective": part.objective.at(step)}) for part in self.parts)
        return self.model_copy(update={"parts": parts})

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """The parts' terms, weighted."""
        return self._weighted([part.objective.batch_loss(representations, generation) for part in self.parts])

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """The parts' terms per query, weighted."""
        return self._weighted([part.objective.generation_loss(logprobs) for part in self.parts])

    def prediction_loss(self, logprobs: Tensor) -> dict[str, Tensor]:
        """The parts' terms per token, weighted."""
        return self._weighted([part.objective.prediction_loss(logprobs) for part in self.parts])

    def _weighted(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Terms of the same name (the contrastive one of `grl`, too) add up."""
        terms: dict[str, Tensor] = {}
        for part, losses in zip(self.parts, found, strict=True):
            for name, value in losses.items():
                terms[name] = terms[name] + part.weight * value if name in terms else part.weight * value
        return terms
