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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ullme.artifacts import Draft, Inputs, Stage, write_atomic
from ullme.checkpoints import training_space
from ullme.components import Section, component
from ullme.data import Example, read_examples, read_texts
from ullme.development import DevelopmentConfig, set_aside
from ullme.errors import ConfigError
from ullme.guide import GuideConfig, guides
from ullme.loop import Loop, Memory
from ullme.mixture import MixtureConfig
from ullme.objectives import Objective
from ullme.sampling import Sampler
from ullme.scoring import ScoreConfig

if TYPE_CHECKING:
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


class GenerationConfig(ScoreConfig):
    """How the language model scores a candidate: log pi(passage | template with the query). `score` is what the alignment reads."""

    teacher: Literal["live", "frozen"] = "live"
    """live: the model scores as it is at that step; frozen: as it was when the phase began, once per candidate, stored."""
    reference: Literal["live", "stored", "none"] = "live"
    """What preferences compare with. live: the model as the phase began, run beside the one that learns; stored: the same,
    scored once per candidate, so that every weight may be trained; none: nothing, the policy's own log-probabilities."""
    queries: int | None = Field(default=None, ge=1)
    """Queries of each batch whose candidates are scored (seeded choice); null: all. Fewer cost less and are noisier."""


class PhaseConfig(Section):
    """One objective for a number of steps."""

    objective: Annotated[Objective, component("ullme.objectives")]
    steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=2)
    """Queries per optimisation step. Each learns from one of its positives, drawn anew every time; the others are no negatives."""
    num_negatives: int = Field(default=1, ge=0)
    """Mined hard negatives beside each positive, drawn from those the miner kept."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest text of this phase, prompt included; null: as long as the model takes (`backbone.max_tokens`)."""
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
    def _kto_has_a_live_reference(self) -> PhaseConfig:
        if self.objective.uses_mismatched and self.generation.reference != "live":
            raise ValueError(
                f"generation.reference: {self.generation.reference}: kto measures its baseline with a live reference; leave it live"
            )
        return self

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
    keep_checkpoints: int = Field(default=1, ge=1)
    """How many stay. A damaged one is passed over, so that with two a run goes on from the one before."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """How many train together, each with a part of every batch; auto: one per GPU, or one."""
    shard: bool = False
    """Each process holds a piece of the layers' weights (FSDP2): for models that do not fit on one GPU."""


class TrainConfig(Section):
    """Phases run one after another on the same adapter; `adapter: null` trains every weight."""

    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    adapter: LoraConfig | None = LoraConfig()
    frozen_trunk: bool = False
    """Only what the pooling has of its own is trained (special tokens, latent attention), so that the LLM generates as before,
    bit for bit; with `adapter: null`."""
    keep_adapter: bool = False
    """The adapter stays apart from the weights: embeddings are made with it, language without, as the base model writes it."""
    generation_adapter: LoraConfig | None = None
    """An adapter of the language model's own; `adapter` then serves embeddings alone. The trained model keeps both, unmerged."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its state in a quarter of the memory: where every weight is trained on a GPU (extra `qlora`)."""
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
        if self.keep_adapter and (self.adapter is None or self.generation_adapter is not None):
            raise ValueError("keep_adapter keeps the one adapter there is; set adapter, and leave generation_adapter out")
        if self.optimizer == "adamw_8bit" and self.runtime.shard:
            raise ValueError("optimizer: adamw_8bit and runtime.shard do not go together: leave one of them out")
        if self.frozen_trunk and self.adapter is not None:
            raise ValueError("frozen_trunk trains no adapter; set adapter: null")
        for number, phase in enumerate(self.phases):
            if self.frozen_trunk and phase.objective.trains_generation:
                raise ValueError(
                    f"phases.{number}: objective '{phase.objective.kind}' trains what the LLM writes, and frozen_trunk keeps it; "
                    "use contrastive, simcse or gem"
                )
            if self.adapter is None and phase.objective.uses_reference and phase.generation.reference == "live":
                raise ValueError(
                    f"phases.{number}: objective '{phase.objective.kind}' compares with the model as it was when the phase began, "
                    f"and every weight is trained; set phases.{number}.generation.reference: stored, or adapter"
                )
        if self.development is not None and (self.average_last or self.runtime.shard):
            other = "average_last" if self.average_last else "runtime.shard"
            raise ValueError(f"development and {other} do not go together: leave one of them out")
        if self.development is not None and self.phases[-1].objective.reads_texts:
            raise ValueError("development measures on queries set aside, and the last phase reads documents alone; leave it out")
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

    @property
    def reads_pairs(self) -> bool:
        """Whether a phase learns from queries and their passages; otherwise documents are all it takes."""
        return not all(phase.objective.reads_texts for phase in self.phases)

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
    from ullme.attention import check_attention_dropout
    from ullme.encoder import Encoder

    together = distributed.current()
    negatives = inputs["negatives"] if "negatives" in inputs else None  # noqa: SIM401 - Inputs is no mapping
    pairs = section.reads_pairs
    examples, aside = read_examples(inputs["data"], negatives) if pairs else [], []
    texts = read_texts(inputs["data"]) if any(phase.objective.reads_texts for phase in section.phases) else []
    if section.development is not None:
        examples, aside = set_aside(examples, section.development.queries, draft.seed)
    torch.manual_seed(draft.seed)
    encoder = Encoder.load(inputs["model"], base_bits=section.adapter.base_bits if section.adapter is not None else None)
    _add_adapters(encoder, section)
    if any(phase.objective.attention_dropout for phase in section.phases):
        check_attention_dropout(encoder.model)
    started = time.monotonic()
    budget = section.runtime.chunk_tokens
    with together.leader_first():  # the others read what it has made
        guide = guides(section.phases, [*examples, *texts], folder=draft.scratch, dim=encoder.dim, batch_tokens=budget)
    sample = examples[:: max(1, len(examples) // SCORED_BEFORE_AND_AFTER)][:SCORED_BEFORE_AND_AFTER]
    memory = Memory(draft.scratch)
    before = memory.recalled("before") if pairs else {}
    if before is None:
        before = memory.remember("before", _scores(encoder, sample, section.runtime))
    if section.runtime.shard and together.count > 1:
        distributed.shard(encoder.model)
    loop = Loop(encoder, section, draft, memory, aside)
    samplers: dict[int, Sampler] = {}
    for phase, step in loop.positions():
        if phase not in samplers:
            loop.begin(phase)
            own = texts if section.phases[phase].objective.reads_texts else examples
            sampler = Sampler(own, section.phases[phase], draft.seed, phase, guide=guide.get(phase))
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
        "texts": len(texts),
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
            plain = Encoder.load(inputs["model"])
            encoder = Encoder(plain.model, plain.tokenizer, plain.config, pooler=encoder.pooler)
            encoder.read_adapter(draft.path / "adapter")
        if section.keep_adapter:
            encoder.config = encoder.config.model_copy(update={"language": "base"})
        else:
            encoder.merge_adapter()
    encoder.save(draft.path)
    if pairs:
        write_atomic(logs / "scores.json", json.dumps({"before": before, "after": _scores(encoder, sample, section.runtime)}))
    qualities = [memory.read(f"quality-{phase}") for phase in range(len(section.phases))]
    write_atomic(logs / "teacher.json", json.dumps([quality for quality in qualities if quality is not None]))
    shutil.copy(loop.metrics_file, logs / "metrics.jsonl")
    return meta


def _add_adapters(encoder: Encoder, section: TrainConfig) -> None:
    if section.frozen_trunk:
        encoder.model.requires_grad_(False)
    if (section.keep_adapter or section.generation_adapter is not None) and len(encoder.special_ids) > 1:
        raise ConfigError(
            "training: a model with adapters that are kept has at most one special token; set backbone.special.count: 1, or leave "
            "keep_adapter and generation_adapter out"
        )
    if section.adapter is not None:
        encoder.add_lora(section.adapter)
    if section.generation_adapter is not None:
        encoder.add_lora(section.generation_adapter, "generation")


TRAIN = Stage("train", "model", 2, train, training_space)


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
