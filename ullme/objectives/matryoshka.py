"""Matryoshka: any objective at several lengths of the same embedding, so that its first numbers alone serve, too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from ullme.components import component
from ullme.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ullme.representations import CandidateLogprobs, Representations

__all__ = ["Matryoshka"]


class Matryoshka(Objective):
    """L = mean over the lengths d of the inner loss on the first d numbers, at unit length again (arXiv 2205.13147, eq. 1).

    `dims` holds every length that is trained, the full one too if it is wanted. What the language model learns is the inner
    objective's, once. Search with them: `backbone.dim`, or `Encoder.shortened`.
    """

    objective: Annotated[Objective, component("ullme.objectives")]
    dims: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)

    @field_validator("dims")
    @classmethod
    def _each_length_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"expected each length once, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _copies_no_embeddings(self) -> Matryoshka:
        if self.objective.copies_guide:
            raise ValueError(
                "objective: the guide's embeddings have one length, so they cannot be learned at several; "
                "use distill with target: scores, or put it beside this one in a sum"
            )
        return self

    @property
    def inner(self) -> tuple[Objective, ...]:
        """The one that is taken at several lengths."""
        return (self.objective,)

    def at(self, step: int) -> Matryoshka:
        """The inner one at this step."""
        return self.model_copy(update={"objective": self.objective.at(step)})

    def batch_loss(self, representations: Representations, generation: CandidateLogprobs | None) -> dict[str, Tensor]:
        """The inner terms, averaged over the lengths.

        Raises:
            ConfigError: a length is longer than the embeddings.
        """
        from torch.nn.functional import normalize

        from ullme.errors import ConfigError

        width = representations.queries.shape[1]
        if max(self.dims) > width:
            raise ConfigError(f"matryoshka.dims: expected at most {width}, the embedding's length, got {max(self.dims)}")
        terms: dict[str, Tensor] = {}
        for dim in self.dims:
            first = replace(
                representations,
                queries=normalize(representations.queries[:, :dim], dim=-1),
                documents=normalize(representations.documents[:, :dim], dim=-1),
            )
            for name, value in self.objective.batch_loss(first, generation).items():
                share = value / len(self.dims)
                terms[name] = terms[name] + share if name in terms else share
        return terms

    def generation_loss(self, logprobs: CandidateLogprobs) -> dict[str, Tensor]:
        """The inner terms per query."""
        return self.objective.generation_loss(logprobs)

    def prediction_loss(self, logprobs: Tensor) -> dict[str, Tensor]:
        """The inner terms per token."""
        return self.objective.prediction_loss(logprobs)
