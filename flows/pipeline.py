"""The steps of a run as values: what each needs, what is there already, and what would be run and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from flows.config import RunConfig
from flows.retriever import Release
from flows.stage import STAGES, StageRequest
from ullme.artifacts import ArtifactRef, Store
from ullme.components import Section
from ullme.errors import ArtifactError

__all__ = ["Model", "Pipeline", "Planned", "Step", "names"]

Model = Literal["trained", "champion"]
"""Whose vectors are released: of the model that this run trains, or of the one that is released at present."""
TARGETS = {"mine": ["mine"], "train": ["train"], "encode": ["encode tuned"], "index": ["index"]}
"""What a verb of one stage makes; `evaluate` makes every report, `promote` everything."""


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
    evaluated on the same data. Of the champion's own model (`model="champion"`) nothing is trained: the corpus as it is now
    is encoded with it, indexed and measured.
    """

    def __init__(
        self, config: RunConfig, champion: Release | None = None, *, model: Model = "trained", until: str = "promote"
    ) -> None:
        """config: resolved. champion: what is released at present. until: the verb of the last stage that is wanted.

        Raises:
            ArtifactError: the champion's model is asked for, and there is none.
        """
        if model == "champion" and champion is None:
            raise ArtifactError(
                f"no version of '{config.tracking.model_name}' is released, or its model is gone: there is nothing to refresh; "
                "run train-and-index first"
            )
        self.config, self.store, self.champion, self.model = config, Store(config.store), champion, model
        self.made: dict[str, ArtifactRef] = {}
        if champion is not None:
            self.made["champion"] = champion.model
        self.steps = self._needed({step.name: step for step in self._steps()}, until)

    @property
    def released_model(self) -> str:
        """Name of what makes the model that this run releases."""
        return "champion" if self.model == "champion" else "train"

    def _steps(self) -> list[Step]:
        config = self.config
        models, indexed = {"tuned": self.released_model}, {"tuned"}
        steps = [self._step("data", "data", config.data, {})]
        if self.model == "trained":
            steps.append(self._step("evaluate bm25", "evaluate", config.evaluation, {"data": "data"}))
            models = {"base": "backbone", **models}
            if self.champion is not None:
                models["champion"] = "champion"
                indexed.add("champion")
            if config.promotion.through == "index":
                indexed.add("base")
            start = "champion" if config.training.start_from == "champion" and self.champion is not None else "backbone"
            steps.append(self._step("backbone", "backbone", config.backbone, {}))
            learned_from = "data"
            if config.synthetic is not None:
                learned_from = "synthetic"
                steps.append(self._step("synthetic", "synthesise", config.synthetic, {"data": "data", "model": "backbone"}))
            steps += self._learning(learned_from, start)
        for who, model in models.items():
            steps.append(self._step(f"encode {who}", "encode", config.encoding, {"data": "data", "model": model}))
        index = {who: "index" if who == "tuned" else f"index {who}" for who in models if who in indexed}
        for who, name in index.items():
            steps.append(self._step(name, "index", config.index, {"embeddings": f"encode {who}"}))
        for who, model in models.items():
            inputs = {"data": "data", "model": model, "embeddings": f"encode {who}"}
            if who in index:
                inputs["index"] = index[who]
            steps.append(self._step(f"evaluate {who}", "evaluate", config.evaluation, inputs))
        return steps

    def _learning(self, data: str, start: str) -> list[Step]:
        """Mine and train, in rounds: a later one mines with the model that the one before it trained.

        The steps of the last are called `mine` and `train`, those of earlier ones `mine 1`, `train 1` and so on.
        """
        config, steps, teacher = self.config, [], "backbone"
        rounds = config.mining.rounds if config.training.reads_pairs else 1
        for number in range(1, rounds + 1):
            suffix = "" if number == rounds else f" {number}"
            inputs = {"data": data, "model": start}
            if config.training.reads_pairs:
                section = config.mining.in_round(number)
                mining = {"data": data, **({"model": teacher} if section.needs_model else {})}
                steps.append(self._step(f"mine{suffix}", "mine", section, mining))
                inputs["negatives"] = f"mine{suffix}"
            teacher = f"train{suffix}"
            steps.append(self._step(teacher, "train", config.training, inputs))
        return steps

    def _step(self, name: str, stage: str, section: Section, inputs: Mapping[str, str]) -> Step:
        return Step(name, stage, section, inputs, _seed_of(stage, self.config.seed))

    def _needed(self, steps: dict[str, Step], until: str) -> dict[str, Step]:
        """The steps that `until` takes, in order."""
        wanted = set(TARGETS.get(until, steps))
        for name in reversed(steps):
            if name in wanted:
                wanted |= set(steps[name].inputs.values()) & steps.keys()
        return {name: step for name, step in steps.items() if name in wanted}

    def named(self, *stages: str) -> list[str]:
        """Names of the steps of these stages, in order; those of the champion only where it is another model than the tuned one."""
        same = self.champion is not None and "train" in self.made and self.made["train"].digest == self.champion.model.digest
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

    def nothing_new(self) -> bool:
        """Whether everything is made already and what it would release is what is released. Makes the plan."""
        return all(planned.ref for planned in self.plan()) and (
            self.champion is not None and self.release().digests == self.champion.digests
        )

    def request(self, name: str) -> StageRequest:
        """What a child process needs to know to run a step: inputs that are not made yet come from steps before it there."""
        step = self.steps[name]
        refs = self._refs(step)
        after = {source: made for source, made in step.inputs.items() if made not in self.made}
        key = "" if after else self.store.key(STAGES[step.stage].stage, step.section, refs, seed=step.seed)
        section = step.section.model_dump(mode="json", serialize_as_any=True)
        return StageRequest(label=name, stage=step.stage, section=section, refs=refs, seed=step.seed, key=key, after=after)

    def release(self) -> Release:
        """What this run has made, ready to be released together."""
        reports = {name.removeprefix("evaluate "): self.made[name] for name in self.named("evaluate")}
        reports.pop("champion", None)
        return Release(model=self.made[self.released_model], index=self.made["index"], data=self.made["data"], reports=reports)

    def reports(self) -> dict[str, ArtifactRef]:
        """System -> its measurement, as far as made."""
        return {name.removeprefix("evaluate "): self.made[name] for name in self.named("evaluate") if name in self.made}

    def _refs(self, step: Step) -> dict[str, ArtifactRef]:
        refs = {name: self.made[source] for name, source in step.inputs.items() if source in self.made}
        if step.stage == "train" and step.inputs["model"] == "champion":
            refs["model"] = self._start(step, refs)
        return refs

    def _start(self, step: Step, refs: Mapping[str, ArtifactRef]) -> ArtifactRef:
        """What training starts from: the champion; where this very training made the champion, what that started from.

        Without this a run that is repeated after its release would train what it has trained once more.
        """
        champion = refs["model"]
        try:
            inputs = self.store.manifest(champion).get("provenance", {}).get("inputs", {})
            before = ArtifactRef.model_validate(inputs["model"])
        except (ArtifactError, KeyError, ValueError):
            return champion  # not made by training
        key = self.store.key(STAGES["train"].stage, step.section, {**refs, "model": before}, seed=step.seed)
        return before if key == champion.path.name else champion


def _seed_of(stage: str, seed: int) -> int:
    """The run's one seed, split per stage; 0 where chance plays no part, so that another seed does not make it anew."""
    return int(sha256(f"{seed}:{stage}".encode()).hexdigest()[:8], 16) >> 1 if STAGES[stage].seeded else 0


def names(plan: Sequence[Planned]) -> int:
    """Width of the longest name of a plan, for printing it in columns."""
    return max(len(planned.step.name) for planned in plan)
