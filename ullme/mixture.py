"""Which data set each query of a phase comes from: a pure function of the configuration and the sizes of the data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import Field

from ullme.components import Section
from ullme.data import Example
from ullme.errors import DataError

__all__ = ["DatasetShare", "Mixture", "MixtureConfig"]


class DatasetShare(Section):
    """How one data set takes part."""

    weight: float = Field(default=1.0, gt=0)
    """Its share is multiplied by this."""
    in_batch: bool = True
    """false: other queries' passages are no negatives of its queries, as for classes and clusters, where they may be right too."""


class MixtureConfig(Section):
    """The data sets of a phase: share = weight x queries^(1 / temperature), over the sum of all.

    The run's own data set goes by `data.name` (or the kind of its source), auxiliary ones by their names.
    """

    datasets: dict[str, DatasetShare] = Field(default_factory=dict)
    """Those that take part; empty: all, as they are."""
    temperature: float = Field(default=1.0, gt=0)
    """1: each by its number of queries; larger: more even, small ones are seen more often (arXiv 1910.10683, section 3.5.2)."""
    homogeneous: bool = True
    """All queries of a batch come from one data set, so that no positive is told from its negatives by its style alone."""


@dataclass(frozen=True)
class Mixture:
    """The examples of a phase, by data set.

    batch_size: queries per step; steps: of the phase.
    """

    examples: Sequence[Example]
    config: MixtureConfig
    batch_size: int
    steps: int

    def __post_init__(self) -> None:
        known = {example.dataset for example in self.examples}
        unknown = self.config.datasets.keys() - known
        if unknown:
            raise DataError(
                f"training.phases: mixture.datasets names '{min(unknown)}', which has no train query; there are: "
                f"{', '.join(sorted(known))}"
            )
        for name, places in self.places.items():
            if len(places) < 2:
                raise DataError(f"training: expected at least 2 train queries in data set '{name}', got {len(places)}")

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """Data set -> its examples' positions, in their order."""
        found: dict[str, list[int]] = {}
        for place, example in enumerate(self.examples):
            if not self.config.datasets or example.dataset in self.config.datasets:
                found.setdefault(example.dataset, []).append(place)
        return found

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """Data set -> the share of the queries that come from it."""
        raw = {name: self.setting(name).weight * len(of) ** (1 / self.config.temperature) for name, of in self.places.items()}
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    def setting(self, name: str) -> DatasetShare:
        """How a data set takes part."""
        return self.config.datasets.get(name, DatasetShare())

    def size(self, step: int) -> int:
        """Queries of a step: as configured, or all there are of its data set (of all data sets, where they are mixed)."""
        there = len(self.places[self._turns[step]]) if self.config.homogeneous else sum(map(len, self.places.values()))
        return min(self.batch_size, there)

    def drawn(self, step: int) -> list[tuple[str, int]]:
        """(data set, how many of its queries were drawn before) for every query of a step."""
        before = dict(self._before[step])
        if self.config.homogeneous:
            return [(self._turns[step], before[self._turns[step]] + number) for number in range(self.size(step))]
        found = []
        for name in self._turns[step * self.size(0) : (step + 1) * self.size(0)]:
            found.append((name, before[name]))
            before[name] += 1
        return found

    def said(self) -> str:
        """What the whole phase draws from each data set, and what it leaves over."""
        lines = []
        for name, drawn in self._before[self.steps].items():
            there = len(self.places[name])
            left = f", {there - drawn} are never drawn" if drawn < there else ""
            lines.append(f"{name or 'data'}: {drawn} queries drawn from {there} ({drawn / there:.2f} epochs{left})")
        return "; ".join(lines)

    @cached_property
    def _turns(self) -> list[str]:
        """Whose turn it is: per step, or per query where data sets are mixed. Always that which is furthest behind its share."""
        names, shares = list(self.shares), np.array(list(self.shares.values()))
        wanted = self.steps if self.config.homogeneous else self.steps * self.size(0)
        behind, turns = np.zeros(len(names)), []
        for _ in range(wanted):
            behind += shares
            turn = int(behind.argmax())
            behind[turn] -= 1
            turns.append(names[turn])
        return turns

    @cached_property
    def _before(self) -> Sequence[Mapping[str, int]]:
        """Per step, and after the last: how many queries of each data set were drawn before."""
        counts = dict.fromkeys(self.shares, 0)
        found = [dict(counts)]
        for step in range(self.steps):
            if self.config.homogeneous:
                counts[self._turns[step]] += self.size(step)
            else:
                for name in self._turns[step * self.size(0) : (step + 1) * self.size(0)]:
                    counts[name] += 1
            found.append(dict(counts))
        return found
