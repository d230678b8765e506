"""The training stage: phases of an objective over examples, resumable at any checkpoint, exact for a seed.

The order of examples, the choice of positives and negatives and the queries that the language model scores are pure
functions of (seed, phase, step), so a run that was interrupted goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from ullme.artifacts import Draft, Inputs, Stage, digest_of, sync, write_atomic
from ullme.checkpoints import Checkpoint, Checkpoints, training_space
from ullme.components import Section, component
from ullme.data import Example, read_examples
from ullme.errors import NotFinite
from ullme.guide import GuideConfig, guides
from ullme.objectives import LEARNED_RANGE, Objective
from ullme.progress import Progress
from ullme.sampling import GenerationScore, Sampler

if TYPE_CHECKING:
    import torch

    from ullme.encoder import Encoder, Role

__all__ = ["TRAIN", "GenerationConfig", "LoraConfig", "PhaseConfig", "TrainConfig", "train"]

logger = logging.getLogger(__name__)

SCORED_BEFORE_AND_AFTER = 48


class LoraConfig(Section):
    """A low-rank adapter (arXiv 2106.09685) through peft."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    base_bits: Literal[4] | None = None
    """4: the frozen weights below the adapter in 4-bit NF4 (QLoRA, arXiv 2305.14314; pip install 'ullme[qlora]')."""


class GenerationConfig(Section):
    """How the language model scores a candidate: log pi(passage | template with the query)."""

    score: GenerationScore = "passage_given_query"
    """What the alignment of GRL reads (see `ullme.generation`); passage_given_query is ULLME's."""
    teacher: Literal["live", "frozen"] = "live"
    """live: the model scores as it is at that step; frozen: as it was when the phase began, once per candidate, stored."""
    template: str = "{query}\n"
    passage_template: str = "{passage}\n"
    """What stands before the query in query_given_passage and sum."""
    passage_tokens: int = Field(default=128, ge=1)
    """Longest passage that is scored; the rest is cut."""
    queries: int | None = Field(default=None, ge=1)
    """Queries of each batch whose candidates are scored (seeded choice); null: all. Fewer cost less and are noisier."""

    @field_validator("template", "passage_template")
    @classmethod
    def _has_its_place_once(cls, value: str, info: ValidationInfo) -> str:
        place = "{query}" if info.field_name == "template" else "{passage}"
        if value.count(place) != 1 or value.replace(place, "").count("{"):
            raise ValueError(f"expected a text with {place} in it once, and no other braces")
        return value


class PhaseConfig(Section):
    """One objective for a number of steps."""

    objective: Annotated[Objective, component("ullme.objectives")]
    steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=2)
    """Queries per optimisation step."""
    num_negatives: int = Field(default=1, ge=0)
    """Mined hard negatives beside each positive, drawn from those the miner kept."""
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    generation: GenerationConfig = GenerationConfig()
    guide: GuideConfig | None = None
    """An embedding model that is not trained: what `contrastive.guided` and `distill` compare with."""

    @model_validator(mode="after")
    def _a_guide_where_it_is_read(self) -> PhaseConfig:
        if self.objective.uses_guide and self.guide is None:
            raise ValueError(f"guide: objective '{self.objective.kind}' compares with one; set guide: {{model: FOLDER}}")
        if self.guide is not None and not self.objective.uses_guide:
            raise ValueError("guide: the objective does not read it; remove it, or use distill or contrastive with guided: true")
        return self

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then the schedule down to 0 at the end."""
        warmup = round(self.warmup_share * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.learning_rate * factor


class TrainRuntime(Section):
    """Speed and memory; none of it changes the result."""

    chunk_tokens: int = Field(default=4096, ge=1)
    """Padded tokens per forward pass with gradient."""
    checkpoint_every: int = Field(default=25, ge=1)
    """Steps between checkpoints."""


class TrainConfig(Section):
    """Phases run one after another on the same adapter; `adapter: null` trains every weight."""

    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    adapter: LoraConfig | None = LoraConfig()
    generation_adapter: LoraConfig | None = None
    """An adapter of the language model's own; `adapter` then serves embeddings alone. The trained model keeps both, unmerged."""
    start_from: Literal["base", "champion"] = "base"
    """The weights that training starts from: the backbone's, or the released champion's (the backbone's while there is none)."""
    runtime: TrainRuntime = TrainRuntime()

    @model_validator(mode="after")
    def _two_adapters_or_one(self) -> TrainConfig:
        if self.generation_adapter is not None:
            if self.adapter is None:
                raise ValueError("generation_adapter needs an adapter for embeddings beside it, or every weight would serve both")
            if self.generation_adapter.base_bits is not None:
                raise ValueError("generation_adapter.base_bits: both adapters stand on one base; set adapter.base_bits alone")
        return self

    def resolved(self) -> TrainConfig:
        """A copy in which each guide's `source_digest` names its contents as they are now.

        Raises:
            ConfigError: a guide is not there, or its contents are others than were pinned.
        """
        phases = [p if p.guide is None else p.model_copy(update={"guide": p.guide.resolved()}) for p in self.phases]
        return self.model_copy(update={"phases": tuple(phases)})


def train(section: TrainConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: base model + examples -> a model artifact of the same form, its metrics under logs/.

    Resumes from the newest complete checkpoint of an interrupted attempt.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite. DataError: no examples.
        ConfigError: an objective needs a reference model that does not exist, or a guide that cannot be used.
    """
    import torch

    from ullme.encoder import Encoder
    from ullme.gradcache import require_reference

    negatives = inputs["negatives"] if "negatives" in inputs else None  # noqa: SIM401 - Inputs is no mapping
    examples = read_examples(inputs["data"], negatives)
    shutil.rmtree(draft.path, ignore_errors=True)
    logs = draft.path / "logs"
    logs.mkdir(parents=True)
    torch.manual_seed(draft.seed)
    encoder = Encoder.load(inputs["model"], base_bits=section.adapter.base_bits if section.adapter is not None else None)
    if section.adapter is not None:
        encoder.add_lora(section.adapter)
    if section.generation_adapter is not None:
        encoder.add_lora(section.generation_adapter, "generation")
    loop = Loop(encoder, section, draft)
    for phase in section.phases:
        require_reference(encoder, phase.objective)
    started = time.monotonic()
    budget = section.runtime.chunk_tokens
    guide = guides(section.phases, examples, folder=draft.scratch, dim=encoder.dim, batch_tokens=budget)
    sample = examples[:: max(1, len(examples) // SCORED_BEFORE_AND_AFTER)][:SCORED_BEFORE_AND_AFTER]
    before = loop.recalled("before") or loop.remember("before", _scores(encoder, sample, section.runtime))
    samplers: dict[int, Sampler] = {}
    for phase, step in loop.positions():
        if phase not in samplers:
            samplers = {phase: loop.taught(Sampler(examples, section.phases[phase], draft.seed, phase, guide=guide.get(phase)))}
        loop.advance(samplers[phase], phase, step)
    encoder.model.eval()
    if section.adapter is not None and section.generation_adapter is None:
        encoder.save_adapter(draft.path / "adapter")
        if section.adapter.base_bits is not None:  # merged into the weights as they were, not as 4 bits rounded them
            pooler, encoder = encoder.pooler, Encoder.load(inputs["model"])
            encoder.pooler = pooler
            encoder.read_adapter(draft.path / "adapter")
        encoder.merge_adapter()
    encoder.save(draft.path)
    write_atomic(logs / "scores.json", json.dumps({"before": before, "after": _scores(encoder, sample, section.runtime)}))
    qualities = [loop.recalled(f"quality-{phase}") for phase in range(len(section.phases))]
    write_atomic(logs / "teacher.json", json.dumps([quality for quality in qualities if quality is not None]))
    shutil.copy(loop.metrics_file, logs / "metrics.jsonl")
    draft.meta |= {
        "dim": encoder.dim,
        "steps": sum(phase.steps for phase in section.phases),
        "examples": len(examples),
        "final_loss": loop.last_loss,
        "train_seconds": round(time.monotonic() - started, 1),
    }


TRAIN = Stage("train", "model", 1, train, training_space)


class Loop:
    """The state of a training run: optimizer, position, metrics, checkpoints."""

    def __init__(self, encoder: Encoder, section: TrainConfig, draft: Draft) -> None:
        import torch

        self._encoder, self._section, self._draft = encoder, section, draft
        self._trainable = encoder.trainable()
        for parameter in self._trainable.values():
            parameter.data = parameter.data.float() if section.adapter is not None else parameter.data
        self._learned = [  # per phase: log(1 / temperature) of those that are trained, from the phase's own start
            {
                name: torch.nn.Parameter(torch.tensor(-math.log(start), device=encoder.device))
                for name, start in phase.objective.learned.items()
            }
            for phase in section.phases
        ]
        scalars = {f"learned.{number}.{name}": value for number, of in enumerate(self._learned) for name, value in of.items()}
        self._state = self._trainable | scalars
        groups = [{"params": list(self._trainable.values()), "decays": True}]
        groups += [{"params": list(scalars.values()), "decays": False}] if scalars else []
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        self._steps = [(p, s) for p, phase in enumerate(section.phases) for s in range(phase.steps)]
        self._checkpoints = Checkpoints(draft.scratch, digest_of([section.identity(), draft.seed]))
        self.metrics_file = draft.scratch / "metrics.jsonl"
        self.last_loss = float("nan")
        self._done = self._resume()

    def positions(self) -> Iterator[tuple[int, int]]:
        """(phase, step) of every step still to do."""
        if self._done:
            logger.info("resuming training after step %d of %d", self._done, len(self._steps))
        with Progress(len(self._steps), "train", unit="step", initial=self._done) as progress:
            for position in range(self._done, len(self._steps)):
                yield self._steps[position]
                self._done = position + 1
                if self._done % self._section.runtime.checkpoint_every == 0 or self._done == len(self._steps):
                    self._checkpoint()
                progress.advance(note=f"loss {self.last_loss:.3f}")

    def advance(self, sampler: Sampler, phase: int, step: int) -> None:
        """One optimisation step."""
        import torch

        from ullme import gradcache

        settings, learned = self._section.phases[phase], self._learned[phase]
        model = self._encoder.model
        started = time.monotonic()
        # The generator restarts at every step, so resuming needs no random state of its own.
        torch.manual_seed(int(np.random.SeedSequence([self._draft.seed, phase, step]).generate_state(1)[0]))
        model.train()
        batch = sampler.batch(step, self._encoder)
        budget = self._section.runtime.chunk_tokens
        report = gradcache.step(self._encoder, settings.objective, batch, chunk_tokens=budget, learned=learned)
        number = sum(p.steps for p in self._section.phases[:phase]) + step + 1
        for name, value in report.terms.items():
            if not math.isfinite(value):
                raise NotFinite(number, name, batch.query_ids)
        trained = [*self._trainable.values(), *learned.values()]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        if not math.isfinite(norm):
            raise NotFinite(number, "the gradient", batch.query_ids)
        rate = settings.learning_rate_at(step)
        for group in self._optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, settings.weight_decay if group["decays"] else 0.0
        temperatures = {name: math.exp(-float(value.detach())) for name, value in learned.items()}
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for value in learned.values():
            value.data.clamp_(-math.log(LEARNED_RANGE[1]), -math.log(LEARNED_RANGE[0]))
        seconds = time.monotonic() - started
        self.last_loss = report.loss
        row: dict[str, Any] = {
            "step": number,
            "phase": phase,
            "loss": report.loss,
            **{f"loss/{name}": value for name, value in report.terms.items()},
            **report.health,
            **temperatures,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": report.tokens / seconds,
            "seconds": seconds,
        }
        with self.metrics_file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        terms = " ".join(f"{name} {value:.4f}" for name, value in report.terms.items())
        logger.info(
            "step %d/%d loss %.4f (%s) %.0f tokens/s", number, len(self._steps), report.loss, terms, row["tokens_per_second"]
        )

    def taught(self, sampler: Sampler) -> Sampler:
        """The sampler of a phase that begins or goes on: its teacher measured, and scored where it is frozen."""
        from ullme import teacher

        phase, number = sampler.phase, sampler.phase_index
        if not phase.objective.uses_teacher:
            return sampler
        self._encoder.model.eval()
        budget = self._section.runtime.chunk_tokens
        if self.recalled(f"quality-{number}") is None:
            found = teacher.measure(self._encoder, sampler, chunk_tokens=budget)
            self.remember(f"quality-{number}", {"phase": number, "score": phase.generation.score, **asdict(found)})
            teacher.report(found, phase.generation.score)
        if phase.generation.teacher == "live":
            return sampler
        name = f"teacher-{number}"
        stored = self.recalled(name) or self.remember(name, teacher.frozen(self._encoder, sampler, chunk_tokens=budget))
        return replace(sampler, teacher=stored)

    def remember(self, name: str, value: Any) -> Any:
        """Keep a value across a crash."""
        write_atomic(self._draft.scratch / f"{name}.json", json.dumps(value))
        return value

    def recalled(self, name: str) -> Any:
        """What `remember` kept, or None."""
        file = self._draft.scratch / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _checkpoint(self) -> None:
        sync(self.metrics_file)
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._state.items():
            tensors[f"weight/{name}"] = parameter.detach().clone()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.detach().clone()
        self._checkpoints.save(Checkpoint(self._done, self.last_loss, tensors))

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps done."""
        found = self._checkpoints.newest()
        if found is None:
            self.metrics_file.unlink(missing_ok=True)
            return 0
        tensors = found.tensors
        for name, parameter in self._state.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            self._optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors
            }
        rows = self.metrics_file.read_text(encoding="utf-8").splitlines() if self.metrics_file.is_file() else []
        write_atomic(self.metrics_file, "".join(f"{row}\n" for row in rows[: found.done]))
        self.last_loss = found.loss
        return found.done


def _scores(encoder: Encoder, examples: Sequence[Example], runtime: TrainRuntime) -> dict[str, list[float]]:
    """Cosine of each example's query with its first positive and its first negatives: what a plot shows before and after."""

    dataset, batch_tokens = examples[0].dataset, runtime.chunk_tokens

    def encode(texts: Sequence[str], role: Role, instructions: Sequence[str] | None = None) -> np.ndarray:
        return encoder.encode(texts, prompt=role, dataset=dataset, instructions=instructions, batch_tokens=batch_tokens)

    queries = encode([example.query for example in examples], "query", [example.instruction for example in examples])
    positives = encode([example.positives[0] for example in examples], "document")
    pairs = [(row, text) for row, example in enumerate(examples) for text in example.negatives[:1]]
    negatives = encode([text for _, text in pairs], "document")
    return {
        "positive": [float(value) for value in (queries * positives).sum(1)],
        "negative": [float(queries[row] @ vector) for (row, _), vector in zip(pairs, negatives, strict=True)],
    }
