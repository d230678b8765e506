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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from ullme.artifacts import Draft, Inputs, Stage, digest_of, sync, write_atomic
from ullme.checkpoints import Checkpoint, Checkpoints, training_space
from ullme.components import Section, component
from ullme.data import Example, read_examples
from ullme.development import DevelopmentConfig, reciprocal_rank, set_aside
from ullme.errors import LimitExceeded, NotFinite
from ullme.guide import GuideConfig, guides
from ullme.mixture import MixtureConfig
from ullme.objectives import LEARNED_RANGE, Objective
from ullme.progress import Progress
from ullme.sampling import GenerationScore, Sampler

if TYPE_CHECKING:
    import torch

    from ullme.encoder import Encoder, Role
    from ullme.gradcache import StepReport, TrainBatch

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
    """Queries per optimisation step. Each learns from one of its positives, drawn anew every time; the others are no negatives."""
    num_negatives: int = Field(default=1, ge=0)
    """Mined hard negatives beside each positive, drawn from those the miner kept."""
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    adapter: Literal["continue", "merge_then_new", "new"] = "continue"
    """With what adapter the phase begins, after another: the same; a new one, the former folded into the weights (as LLM2Vec does,
    arXiv 2404.05961, section 2); or a new one, the former dropped."""
    mixture: MixtureConfig = MixtureConfig()
    """Which data sets it learns from, and how much from each."""
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
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """How many train together, each with a part of every batch; auto: one per GPU, or one."""
    shard: bool = False
    """Each process holds a piece of the layers' weights (FSDP2): for models that do not fit on one GPU."""


class TrainConfig(Section):
    """Phases run one after another on the same adapter; `adapter: null` trains every weight."""

    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    adapter: LoraConfig | None = LoraConfig()
    generation_adapter: LoraConfig | None = None
    """An adapter of the language model's own; `adapter` then serves embeddings alone. The trained model keeps both, unmerged."""
    average_last: int = Field(default=0, ge=0)
    """Steps at the end whose weights are averaged (stochastic weight averaging, arXiv 1803.05407); 0: the last ones alone."""
    development: DevelopmentConfig | None = None
    """Queries set aside, to keep the best weights of the last phase and to stop early; null: the last weights are kept."""
    start_from: Literal["base", "champion"] = "base"
    """The weights that training starts from: the backbone's, or the released champion's (the backbone's while there is none)."""
    runtime: TrainRuntime = TrainRuntime()

    @model_validator(mode="after")
    def _phases_can_begin(self) -> TrainConfig:
        for number, phase in enumerate(self.phases):
            if phase.adapter == "continue":
                continue
            where = f"phases.{number}.adapter: {phase.adapter}"
            if not number:
                raise ValueError(f"{where} is for a phase after another; the first begins with a new adapter anyway")
            if self.adapter is None or self.generation_adapter is not None:
                raise ValueError(f"{where} needs one adapter; set adapter and leave generation_adapter out")
            if phase.adapter == "merge_then_new" and (self.adapter.base_bits is not None or self.runtime.shard):
                raise ValueError(f"{where} needs the weights in full; leave out adapter.base_bits and runtime.shard")
        if self.development is not None and (self.average_last or self.runtime.shard):
            other = "average_last" if self.average_last else "runtime.shard"
            raise ValueError(f"development and {other} do not go together: leave one of them out")
        if self.average_last > self.phases[-1].steps:
            raise ValueError(f"average_last: expected at most the last phase's {self.phases[-1].steps} steps")
        return self

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

    Resumes from the newest complete checkpoint of an interrupted attempt. With several processes, all of them on this machine,
    the result is that of one process up to the order of summation.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite. DataError: no examples.
        ConfigError: an objective needs a reference model that does not exist, or a guide that cannot be used.
    """
    from ullme import distributed

    count = distributed.wanted(section.runtime.processes)
    if count == 1 or distributed.joined():
        draft.meta |= _train(section, inputs, draft)
    else:
        draft.meta |= distributed.run(count, _train, section, inputs, draft)


def _train(section: TrainConfig, inputs: Inputs, draft: Draft) -> dict[str, Any]:
    """In each of the processes that train; returns what the artifact's manifest says of it."""
    import torch

    from ullme import distributed
    from ullme.encoder import Encoder
    from ullme.gradcache import require_reference

    together = distributed.current()
    negatives = inputs["negatives"] if "negatives" in inputs else None  # noqa: SIM401 - Inputs is no mapping
    examples, aside = read_examples(inputs["data"], negatives), []
    if section.development is not None:
        examples, aside = set_aside(examples, section.development.queries, draft.seed)
    torch.manual_seed(draft.seed)
    encoder = Encoder.load(inputs["model"], base_bits=section.adapter.base_bits if section.adapter is not None else None)
    _add_adapters(encoder, section)
    for phase in section.phases:
        require_reference(encoder, phase.objective)
    started = time.monotonic()
    budget = section.runtime.chunk_tokens
    made = [guides(section.phases, examples, folder=draft.scratch, dim=encoder.dim, batch_tokens=budget)] if together.leads else []
    together.agreed(lambda: None)  # the others read what this one has made
    guide = made[0] if made else guides(section.phases, examples, folder=draft.scratch, dim=encoder.dim, batch_tokens=budget)
    sample = examples[:: max(1, len(examples) // SCORED_BEFORE_AND_AFTER)][:SCORED_BEFORE_AND_AFTER]
    memory = Memory(draft.scratch)
    before = memory.recalled("before") or memory.remember("before", _scores(encoder, sample, section.runtime))
    if section.runtime.shard and together.count > 1:
        distributed.shard(encoder.model)
    loop = Loop(encoder, section, draft, memory, aside)
    samplers: dict[int, Sampler] = {}
    for phase, step in loop.positions():
        if phase not in samplers:
            loop.begin(phase)
            sampler = Sampler(examples, section.phases[phase], draft.seed, phase, guide=guide.get(phase))
            logger.info("phase %d of %d: %s", phase + 1, len(section.phases), sampler.mixture.said())
            samplers = {phase: loop.taught(sampler)}
        loop.advance(samplers[phase], phase, step)
    loop.finish()
    encoder.model.eval()
    if section.runtime.shard and together.count > 1:
        trained = loop.weights()
        encoder = Encoder.load(inputs["model"], base_bits=section.adapter.base_bits if section.adapter is not None else None)
        _add_adapters(encoder, section)
        for name, parameter in encoder.trainable().items():
            parameter.data = trained[name].to(parameter.device)
    meta = {
        "dim": encoder.dim,
        "steps": loop.steps_done,
        "examples": len(examples),
        **loop.best_so_far,
        "final_loss": loop.last_loss,
        "train_seconds": round(time.monotonic() - started, 1),
    }
    if not together.leads:
        return meta
    shutil.rmtree(draft.path, ignore_errors=True)
    logs = draft.path / "logs"
    logs.mkdir(parents=True)
    if section.adapter is not None and section.generation_adapter is None:
        encoder.save_adapter(draft.path / "adapter")
        if section.adapter.base_bits is not None:  # merged into the weights as they were, not as 4 bits rounded them
            pooler, encoder = encoder.pooler, Encoder.load(inputs["model"])
            encoder.pooler = pooler
            encoder.read_adapter(draft.path / "adapter")
        encoder.merge_adapter()
    encoder.save(draft.path)
    write_atomic(logs / "scores.json", json.dumps({"before": before, "after": _scores(encoder, sample, section.runtime)}))
    qualities = [memory.read(f"quality-{phase}") for phase in range(len(section.phases))]
    write_atomic(logs / "teacher.json", json.dumps([quality for quality in qualities if quality is not None]))
    shutil.copy(loop.metrics_file, logs / "metrics.jsonl")
    return meta


def _add_adapters(encoder: Encoder, section: TrainConfig) -> None:
    if section.adapter is not None:
        encoder.add_lora(section.adapter)
    if section.generation_adapter is not None:
        encoder.add_lora(section.generation_adapter, "generation")


TRAIN = Stage("train", "model", 2, train, training_space)


class Memory:
    """Values of a run that survive a crash, the same in all of its processes."""

    def __init__(self, folder: Path) -> None:
        from ullme.distributed import current

        self._folder, self._together = folder, current()

    def remember(self, name: str, value: Any) -> Any:
        """Keep a value."""
        if self._together.leads:
            write_atomic(self._folder / f"{name}.json", json.dumps(value))
        return value

    def recalled(self, name: str) -> Any:
        """What `remember` kept, or None. Every process must ask."""
        return self._together.agreed(lambda: self.read(name))

    def read(self, name: str) -> Any:
        """The same, for one process alone."""
        file = self._folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class Loop:
    """The state of a training run: optimizer, position, metrics, checkpoints."""

    def __init__(self, encoder: Encoder, section: TrainConfig, draft: Draft, memory: Memory, aside: Sequence[Example] = ()) -> None:
        import torch

        from ullme.distributed import current

        self._encoder, self._section, self._draft, self._memory = encoder, section, draft, memory
        self._together = current()
        self._chunk_tokens = section.runtime.chunk_tokens
        self._learned = [  # per phase: log(1 / temperature) of those that are trained, from the phase's own start
            {
                name: torch.nn.Parameter(torch.tensor(-math.log(start), device=encoder.device))
                for name, start in phase.objective.learned.items()
            }
            for phase in section.phases
        ]
        self._steps = [(p, s) for p, phase in enumerate(section.phases) for s in range(phase.steps)]
        self._checkpoints = Checkpoints(draft.scratch, digest_of([section.identity(), draft.seed]))
        self.metrics_file = draft.scratch / "metrics.jsonl"
        self.last_loss = float("nan")
        self._kept: dict[str, torch.Tensor] = {}  # the mean of the last weights, or the best
        self._aside = aside
        self._measured: list[tuple[int, float]] = []
        self._phase = 0
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self._state: dict[str, torch.nn.Parameter] = {}
        self._optimizer: torch.optim.AdamW
        self._take_what_learns()
        self._done = self._resume()

    def _take_what_learns(self) -> None:
        import torch

        from ullme.distributed import is_sharded

        self._trainable = self._encoder.trainable()
        for parameter in self._trainable.values():
            parameter.data = parameter.data.float() if self._section.adapter is not None else parameter.data
        scalars = {f"learned.{number}.{name}": value for number, of in enumerate(self._learned) for name, value in of.items()}
        self._state = self._trainable | scalars
        sharded = [parameter for parameter in self._trainable.values() if is_sharded(parameter)]
        kept = [parameter for parameter in self._trainable.values() if not is_sharded(parameter)]
        split = [(kept, True), (sharded, True), (list(scalars.values()), False)]  # the fused step takes no mixture
        groups = [{"params": of, "decays": decays} for of, decays in split if of]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)

    def begin(self, phase: int) -> None:
        """Enter a phase, if this is not where the run is already: its adapter, and what its preference terms compare with."""
        from safetensors.torch import load_file, save_file

        if phase <= self._phase:
            return
        settings = self._section.phases[phase]
        compares = settings.objective.uses_reference and settings.adapter == "continue"
        if compares or settings.adapter == "merge_then_new":  # kept, because the checkpoints of this phase no longer hold it
            file = self._draft.scratch / f"before-{phase}.safetensors"
            weights = self.weights()
            if self._together.leads:
                partial = file.with_suffix(".partial")
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
                sync(partial)
                partial.rename(file)
            self._together.agreed(lambda: None)
            self._enter(phase, load_file(file))
        else:
            self._enter(phase, {})

    def _enter(self, phase: int, before: dict[str, torch.Tensor]) -> None:
        """Begin a phase whose predecessor ended with the weights `before`."""
        import torch

        settings, encoder = self._section.phases[phase], self._encoder
        self._phase = phase
        encoder.keep_reference(None)
        if settings.adapter == "continue":
            if settings.objective.uses_reference:
                encoder.keep_reference({name: tensor for name, tensor in before.items() if "lora_" in name})
            return
        if settings.adapter == "merge_then_new":
            for name, parameter in self._trainable.items():
                parameter.data.copy_(before[name])
            encoder.merge_adapter()
        else:
            encoder.drop_adapters()
        torch.manual_seed(int(np.random.SeedSequence([self._draft.seed, phase, 2**31]).generate_state(1)[0]))
        assert self._section.adapter is not None
        encoder.add_lora(self._section.adapter)
        self._take_what_learns()

    def positions(self) -> Iterator[tuple[int, int]]:
        """(phase, step) of every step still to do."""
        if self._done:
            logger.info("resuming training after step %d of %d", self._done, len(self._steps))
        with Progress(len(self._steps), "train", unit="step", initial=self._done) as progress:
            for position in range(self._done, len(self._steps)):
                if self._is_over():
                    logger.info("training ends at step %d: no better since step %d", position, self.best_so_far["best_step"])
                    break
                yield self._steps[position]
                self._done = position + 1
                if self._done % self._section.runtime.checkpoint_every == 0 or self._done == len(self._steps):
                    self._checkpoint()
                progress.advance(note=f"loss {self.last_loss:.3f}")

    def advance(self, sampler: Sampler, phase: int, step: int) -> None:
        """One optimisation step."""
        import torch

        from ullme.distributed import clip

        settings, learned = self._section.phases[phase], self._learned[phase]
        model = self._encoder.model
        started = time.monotonic()
        # The generator restarts at every step, so resuming needs no random state of its own.
        entropy = [self._draft.seed, phase, step, *([] if self._together.leads else [self._together.rank])]
        model.train()
        batch = sampler.batch(step, self._encoder)
        report = None
        while report is None:
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            report = self._step(settings.objective, batch, learned)
        number = sum(p.steps for p in self._section.phases[:phase]) + step + 1
        for name, value in report.terms.items():
            if not math.isfinite(value):
                raise NotFinite(number, name, batch.query_ids)
        norm = clip([*self._trainable.values(), *learned.values()], settings.max_grad_norm)
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
        self._average(number)
        seconds = time.monotonic() - started
        measured = self._measure(number)
        self.last_loss = report.loss
        row: dict[str, Any] = {
            "step": number,
            "phase": phase,
            "loss": report.loss,
            **{f"loss/{name}": value for name, value in report.terms.items()},
            **({f"loss/{name}/{batch.dataset}": value for name, value in report.terms.items()} if batch.dataset else {}),
            **report.health,
            **temperatures,
            "gradient_norm": norm,
            "learning_rate": rate,
            **measured,
            "padding_ratio": report.padding,
            "tokens_per_second": report.tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": _peak_memory_gb(),
        }
        if self._together.leads:
            with self.metrics_file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        terms = " ".join(f"{name} {value:.4f}" for name, value in report.terms.items())
        logger.info(
            "step %d/%d loss %.4f (%s) %.0f tokens/s", number, len(self._steps), report.loss, terms, row["tokens_per_second"]
        )

    def _step(self, objective: Objective, batch: TrainBatch, learned: Mapping[str, torch.nn.Parameter]) -> StepReport | None:
        """Gradients of a batch, or None where memory did not suffice: then the budget is half of what it was."""
        import torch

        from ullme import gradcache
        from ullme.engine import out_of_memory

        try:
            return gradcache.step(self._encoder, objective, batch, chunk_tokens=self._chunk_tokens, learned=learned)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        rows = [*batch.queries, *batch.documents]
        if self._together.count > 1 or self._chunk_tokens <= max(map(len, rows)):
            raise LimitExceeded(
                f"training: {self._chunk_tokens} tokens at once do not fit into memory ({said}); set training.runtime.chunk_tokens "
                "lower, or backbone.max_tokens; the last checkpoint is kept and the next run resumes from it"
            )
        self._chunk_tokens //= 2
        logger.warning("training: out of memory (%s); going on with %d tokens per forward pass", said, self._chunk_tokens)
        return None

    def _average(self, number: int) -> None:
        """Take the weights after a step (1, 2, ...) into the running mean of the last ones."""
        count = number - (len(self._steps) - self._section.average_last)
        if count < 1:
            return
        for name, parameter in self._trainable.items():
            if count == 1:
                self._kept[name] = parameter.detach().clone()
            else:
                self._kept[name] += (parameter.detach() - self._kept[name]) / count

    def _measure(self, number: int) -> dict[str, float]:
        """How well the queries that were set aside find their passages after a step, where that is due."""
        settings, into = self._section.development, number - (len(self._steps) - self._section.phases[-1].steps)
        if settings is None or into < 1 or (into % settings.every and number < len(self._steps)):
            return {}
        value = reciprocal_rank(self._encoder, self._aside, batch_tokens=self._section.runtime.chunk_tokens)
        if all(value > other for _, other in self._measured):
            self._kept = {name: parameter.detach().clone() for name, parameter in self._trainable.items()}
        self._measured.append((number, value))
        logger.info("step %d: MRR %.4f of %d queries that were set aside", number, value, len(self._aside))
        return {"development_mrr": value}

    @property
    def best_so_far(self) -> dict[str, Any]:
        """Where the best weights were, among those that were measured."""
        if not self._measured:
            return {}
        step, value = max(self._measured, key=lambda found: (found[1], -found[0]))
        return {"best_step": step, "development_mrr": value}

    def _is_over(self) -> bool:
        settings = self._section.development
        if settings is None or settings.patience is None or not self._measured:
            return False
        return sum(step > self.best_so_far["best_step"] for step, _ in self._measured) >= settings.patience

    @property
    def steps_done(self) -> int:
        """Optimisation steps there have been."""
        return self._done

    def finish(self) -> None:
        """Put the averaged or the best weights in place, where there are any."""
        for name, kept in self._kept.items():
            self._trainable[name].data.copy_(kept)

    def weights(self) -> dict[str, torch.Tensor]:
        """What has been trained, by name, in full; every process must ask for it."""
        from ullme.distributed import whole

        return {name: whole(parameter) for name, parameter in self._trainable.items()}

    def taught(self, sampler: Sampler) -> Sampler:
        """The sampler of a phase that begins or goes on: its teacher measured, and scored where it is frozen."""
        from ullme import teacher

        phase, number = sampler.phase, sampler.phase_index
        if not phase.objective.uses_teacher:
            return sampler
        self._encoder.model.eval()
        budget = self._section.runtime.chunk_tokens
        if self._memory.recalled(f"quality-{number}") is None:
            found = teacher.measure(self._encoder, sampler, chunk_tokens=budget)
            self._memory.remember(f"quality-{number}", {"phase": number, "score": phase.generation.score, **asdict(found)})
            teacher.report(found, phase.generation.score)
        if phase.generation.teacher == "live":
            return sampler
        name = f"teacher-{number}"
        stored = self._memory.recalled(name) or self._memory.remember(
            name, teacher.frozen(self._encoder, sampler, chunk_tokens=budget)
        )
        return replace(sampler, teacher=stored)

    def _checkpoint(self) -> None:
        from ullme.distributed import whole

        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._state.items():
            tensors[f"weight/{name}"] = whole(parameter).clone()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = whole(value).clone()
            if name in self._kept:
                tensors[f"kept/{name}"] = whole(self._kept[name]).clone()
        if self._together.leads:
            sync(self.metrics_file)
            self._checkpoints.save(Checkpoint(self._done, self.last_loss, tensors))

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps done."""
        from safetensors.torch import load_file

        from ullme.distributed import put

        found = self._checkpoints.newest()
        if found is None:
            if self._together.leads:
                self.metrics_file.unlink(missing_ok=True)
            return 0
        for phase in range(1, self._steps[found.done - 1][0] + 1):
            file = self._draft.scratch / f"before-{phase}.safetensors"
            self._enter(phase, load_file(file) if file.is_file() else {})
        tensors = found.tensors
        for name, parameter in self._state.items():
            if f"kept/{name}" in tensors:
                self._kept[name] = put(parameter, tensors[f"kept/{name}"].clone())
            parameter.data.copy_(put(parameter, tensors[f"weight/{name}"]))
            self._optimizer.state[parameter] = {
                key: value.clone() if key == "step" else put(parameter, value.clone())
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (value := tensors.get(f"{key}/{name}")) is not None
            }
        self.last_loss = found.loss
        rows = [json.loads(row) for row in self._together.agreed(lambda: self._trimmed(found.done))]
        self._measured = [(row["step"], row["development_mrr"]) for row in rows if "development_mrr" in row]
        return found.done

    def _trimmed(self, steps: int) -> list[str]:
        """The rows of the first steps, all that is left in the file of metrics."""
        rows = self.metrics_file.read_text(encoding="utf-8").splitlines() if self.metrics_file.is_file() else []
        write_atomic(self.metrics_file, "".join(f"{row}\n" for row in rows[:steps]))
        return rows[:steps]


def _peak_memory_gb() -> float:
    """Most memory held so far, in 10^9 bytes: of the GPU, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _scores(encoder: Encoder, examples: Sequence[Example], runtime: TrainRuntime) -> dict[str, list[float]]:
    """Cosine of each example's query with its first positive and its first negatives: what a plot shows before and after."""

    def encode(texts: Sequence[str], role: Role, datasets: Sequence[str], instructions: Sequence[str] | None = None) -> np.ndarray:
        return encoder.encode(texts, prompt=role, dataset=datasets, instructions=instructions, batch_tokens=runtime.chunk_tokens)

    datasets = [example.dataset for example in examples]
    queries = encode([e.query for e in examples], "query", datasets, [e.instruction for e in examples])
    positives = encode([example.positives[0] for example in examples], "document", datasets)
    pairs = [(row, text) for row, example in enumerate(examples) for text in example.negatives[:1]]
    negatives = encode([text for _, text in pairs], "document", [datasets[row] for row, _ in pairs])
    return {
        "positive": [float(value) for value in (queries * positives).sum(1)],
        "negative": [float(queries[row] @ vector) for (row, _), vector in zip(pairs, negatives, strict=True)],
    }
