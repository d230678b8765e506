"""The steps of a run as values: what each needs, what is there already, and what would be run and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from flows.config import RunConfig
from flows.retriever import Release
from flows.stage import STAGES, StageRequest
from ullme.artifacts import ArtifactRef, Store
from ullme.components import Section
from ullme.errors import ArtifactError

__all__ = ["Pipeline", "Planned", "Step"]


@dataclass(frozen=True)
class Step:
    """One artifact of a run. inputs: name of the stage's input -> name of the step that makes it."""

    name: str
    stage: str
    section: Section
    inputs: Mapping[str, str]
    seed: int


@dataclass(frozen=True)
class Planned:
    """What a step would do: reuse `ref`, or run because of `why`."""

    step: Step
    ref: ArtifactRef | None
    why: str = ""

    def __str__(self) -> str:
        return f"reuse {self.ref}" if self.ref else f"run ({self.why})"


class Pipeline:
    """The steps of `config`, the references made so far, and what remains.

    A champion whose model is not the one trained here takes part: it is encoded, indexed with the same `index` section, and
    evaluated on the same data.
    """

    def __init__(self, config: RunConfig, champion: Release | None = None) -> None:
        """config: resolved. champion: what is released at present."""
        self.config, self.store = config, Store(config.store)
        self.made: dict[str, ArtifactRef] = {}
        self.champion_model = champion.model if champion else None
        self.steps = {step.name: step for step in self._steps()}
        if self.champion_model is not None:
            self.made["champion"] = self.champion_model

    def _steps(self) -> list[Step]:
        config = self.config
        evaluated = {"base": False, "tuned": True, "champion": True}
        if config.promotion.through == "index":
            evaluated["base"] = True
        if self.champion_model is None:
            del evaluated["champion"]
        model = {"base": "backbone", "tuned": "train", "champion": "champion"}
        mining = {"data": "data", **({"model": "backbone"} if config.mining.miner.needs_model else {})}
        training = {"data": "data", "negatives": "mine", "model": "backbone"}
        steps = [
            self._step("data", "data", config.data, {}),
            self._step("backbone", "backbone", config.backbone, {}),
            self._step("mine", "mine", config.mining, mining),
            self._step("train", "train", config.training, training),
        ]
        steps += [
            self._step(f"encode {who}", "encode", config.encoding, {"data": "data", "model": model[who]}) for who in evaluated
        ]
        steps += [
            self._step("index" if who == "tuned" else f"index {who}", "index", config.index, {"embeddings": f"encode {who}"})
            for who, indexed in evaluated.items()
            if indexed
        ]
        steps.append(self._step("evaluate bm25", "evaluate", config.evaluation, {"data": "data"}))
        for who, indexed in evaluated.items():
            inputs = {"data": "data", "model": model[who], "embeddings": f"encode {who}"}
            if indexed:
                inputs["index"] = "index" if who == "tuned" else f"index {who}"
            steps.append(self._step(f"evaluate {who}", "evaluate", config.evaluation, inputs))
        return steps

    def _step(self, name: str, stage: str, section: Section, inputs: Mapping[str, str]) -> Step:
        return Step(name, stage, section, inputs, _seed_of(stage, self.config.seed))

    def named(self, *stages: str) -> list[str]:
        """Names of the steps of these stages, in order; those of the champion only where it is another model than the tuned one."""
        same = self.champion_model is not None and "train" in self.made and self.made["train"].digest == self.champion_model.digest
        return [
            name
            for name, step in self.steps.items()
            if (name in stages or step.stage in stages) and not (same and name.endswith(" champion"))
        ]

    def planned(self, name: str) -> Planned:
        """What a step would do now. An artifact that is reused is verified, file by file."""
        step = self.steps[name]
        new = [source for source in step.inputs.values() if source not in self.made]
        if new:
            return Planned(step, None, f"{', '.join(new)} will be new")
        work = STAGES[step.stage]
        try:
            ref = self.store.find(work.stage, step.section, self._refs(step), seed=step.seed)
            if ref is None:
                return Planned(step, None, "no artifact yet")
            self.store.open(ref)
        except ArtifactError as error:
            return Planned(step, None, f"the artifact is damaged: {error}")
        return Planned(step, ref)

    def plan(self) -> list[Planned]:
        """What every step would do, in order; nothing is run."""
        plan = []
        for name in self.steps:
            planned = self.planned(name)
            if planned.ref is not None:
                self.made[name] = planned.ref
            plan.append(planned)
        skipped = set(self.steps) - set(self.named(*self.steps))
        return [planned for planned in plan if planned.step.name not in skipped]

    def request(self, name: str) -> StageRequest:
        """What a child process needs to know to run a step whose inputs are made."""
        step = self.steps[name]
        refs = self._refs(step)
        return StageRequest(
            label=name,
            stage=step.stage,
            section=step.section.model_dump(mode="json", serialize_as_any=True),
            refs=refs,
            seed=step.seed,
            key=self.store.key(STAGES[step.stage].stage, step.section, refs, seed=step.seed),
        )

    def release(self) -> Release:
        """What this run has made, ready to be released together."""
        reports = {name.removeprefix("evaluate "): self.made[name] for name in self.named("evaluate")}
        reports.pop("champion", None)
        return Release(model=self.made["train"], index=self.made["index"], data=self.made["data"], reports=reports)

    def reports(self) -> dict[str, ArtifactRef]:
        """System -> its measurement, as far as made."""
        return {name.removeprefix("evaluate "): self.made[name] for name in self.named("evaluate") if name in self.made}

    def _refs(self, step: Step) -> dict[str, ArtifactRef]:
        return {name: self.made[source] for name, source in step.inputs.items()}


def _seed_of(stage: str, seed: int) -> int:
    """The run's one seed, split per stage; 0 where chance plays no part, so that another seed does not make it anew."""
    return int(sha256(f"{seed}:{stage}".encode()).hexdigest()[:8], 16) >> 1 if STAGES[stage].seeded else 0


def names(plan: Sequence[Planned]) -> int:
    """Width of the longest name of a plan, for printing it in columns."""
    return max(len(planned.step.name) for planned in plan)
