"""Limits of a run: disk, time and memory of each stage, and how often what was killed is started again.

    disk     what a stage will write is estimated before it starts, and refused with the numbers where it does not fit
    time     a stage that takes longer is ended
    memory   a stage whose processes hold more is ended, and started once more with half the token budget

`flows.child` keeps the last two, `ullme.disk` the first. None of them changes a result, so none is part of a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from flows.stage import STAGES
from ullme.components import Section, did_you_mean
from ullme.errors import UllmeError

if TYPE_CHECKING:
    from flows.pipeline import Pipeline, Planned

__all__ = ["LimitsConfig", "estimate"]

Amount = Annotated[float, Field(gt=0)]
PerStage = Amount | dict[str, Amount] | None
GIGABYTE = 10**9


class LimitsConfig(Section):
    """One number for every stage, or one per stage by its name; null: no limit."""

    timeout_s: PerStage = None
    """Longest time that a stage may take; it begins with the stage, where several share a process."""
    memory_gb: PerStage = None
    """Most memory that a stage's processes may hold together, in 10^9 bytes, looked at four times a second. Files mapped into
    memory do not count."""
    disk_reserve_gb: float | None = Field(default=None, ge=0)
    """Space that stays free on the store's disk, in 10^9 bytes; null: a hundredth of the disk, at most 1."""
    retries: int = Field(default=1, ge=0)
    """How often a stage whose process crashed or was killed is started again, from where it was."""

    @field_validator("timeout_s", "memory_gb", mode="before")
    @classmethod
    def _known_stages(cls, value: Any) -> Any:
        for name, amount in value.items() if isinstance(value, Mapping) else ():
            if name not in STAGES:
                raise ValueError(f"unknown stage '{name}'; allowed: {', '.join(STAGES)}{did_you_mean(name, STAGES)}")
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0:
                raise ValueError(f"expected a number > 0 for {name}, got {amount!r}")
        return value

    def seconds(self, stage: str) -> float | None:
        """Longest time of a stage."""
        return _of(self.timeout_s, stage)

    def memory_bytes(self, stage: str) -> int | None:
        """Most memory of a stage."""
        gigabytes = _of(self.memory_gb, stage)
        return None if gigabytes is None else int(gigabytes * GIGABYTE)

    @property
    def reserve_bytes(self) -> int | None:
        """Space to leave free, or None for the default."""
        return None if self.disk_reserve_gb is None else int(self.disk_reserve_gb * GIGABYTE)


def _of(value: PerStage, stage: str) -> float | None:
    return value.get(stage) if isinstance(value, Mapping) else value


def estimate(pipeline: Pipeline, plan: Sequence[Planned]) -> dict[str, int | None]:
    """Step -> the bytes that it would write at most, for the steps of `plan` that would run.

    None: nobody can tell yet, as for everything that follows from an artifact that is still to be made.
    """
    found: dict[str, int | None] = {}
    for planned in plan:
        step = planned.step
        if planned.ref is not None:
            continue
        refs = {name: pipeline.made[source] for name, source in step.inputs.items() if source in pipeline.made}
        try:
            known = len(refs) == len(step.inputs)
            found[step.name] = pipeline.store.space(STAGES[step.stage].stage, step.section, refs) if known else None
        except UllmeError:
            found[step.name] = None  # an input is damaged or gone; the stage will say so
    return found
