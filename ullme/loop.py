"""The loop of a training run: optimizer, position, phases, metrics, checkpoints and what is kept of the weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.artifacts import Draft, digest_of, sync, write_atomic
from ullme.checkpoints import Checkpoint, Checkpoints, write_tensors
from ullme.data import Example
from ullme.development import reciprocal_rank
from ullme.errors import ConfigError, LimitExceeded, NotFinite
from ullme.objectives import LEARNED_RANGE, Objective
from ullme.progress import Progress
from ullme.sampling import Sampler

if TYPE_CHECKING:
    import torch

    from ullme.encoder import Encoder
    from ullme.gradcache import StepReport, TrainBatch
    from ullme.training import PhaseConfig, TrainConfig

__all__ = ["Loop", "Memory"]

logger = logging.getLogger(__name__)


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
        identity = digest_of([section.identity(), draft.seed])
        self._checkpoints = Checkpoints(draft.scratch, identity, keep=section.runtime.keep_checkpoints)
        self.metrics_file = draft.scratch / "metrics.jsonl"
        self.last_loss = float("nan")
        self._kept: dict[str, torch.Tensor] = {}  # the mean of the last weights, or the best
        self._aside = aside
        self._measured: list[tuple[int, float]] = []
        self._phase = 0
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self._state: dict[str, torch.nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer
        self._take_what_learns()
        self._done = self._resume()

    def _take_what_learns(self) -> None:

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
        self._optimizer = _optimizer(self._section.optimizer, groups, self._encoder.device)

    def begin(self, phase: int) -> None:
        """Enter a phase, if this is not where the run is already: its adapter, and what its preference terms compare with."""
        from safetensors.torch import load_file

        if phase <= self._phase:
            return
        settings = self._section.phases[phase]
        compares = self._compares(settings) and settings.adapter == "continue"
        if compares or settings.adapter == "merge_then_new":  # kept, because the checkpoints of this phase no longer hold it
            file = self._draft.scratch / f"before-{phase}.safetensors"
            weights = self.weights()
            self._together.agreed(lambda: write_tensors(file, weights))
            self._enter(phase, load_file(file))
        else:
            self._enter(phase, {})

    @staticmethod
    def _compares(phase: PhaseConfig) -> bool:
        """Whether the reference model is run beside the one that learns."""
        return phase.objective.uses_reference and phase.generation.reference == "live"

    def _enter(self, phase: int, before: dict[str, torch.Tensor]) -> None:
        """Begin a phase whose predecessor ended with the weights `before`."""
        import torch

        settings, encoder = self._section.phases[phase], self._encoder
        self._phase = phase
        encoder.keep_reference(None)
        if settings.adapter == "continue":
            if self._compares(settings):
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
            report = self._step(settings.objective.at(step), batch, learned)
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
        from ullme.attention import attention_dropout
        from ullme.engine import out_of_memory

        share = objective.attention_dropout
        dropping = attention_dropout(self._encoder.model, share) if share else nullcontext()
        try:
            with dropping:
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
        """The sampler of a phase that begins or goes on: its teacher measured, and what is read from storage stored."""
        from ullme import teacher

        phase, number = sampler.phase, sampler.phase_index
        self._encoder.model.eval()
        budget = self._section.runtime.chunk_tokens

        def stored(name: str, make: Callable[..., dict[str, float]]) -> dict[str, float]:
            found = self._memory.recalled(f"{name}-{number}")
            return found or self._memory.remember(f"{name}-{number}", make(self._encoder, sampler, chunk_tokens=budget))

        if phase.objective.uses_reference and phase.generation.reference == "stored":
            sampler = replace(sampler, reference=stored("reference", teacher.reference))
        if not phase.objective.uses_teacher:
            return sampler
        if self._memory.recalled(f"quality-{number}") is None:
            found = teacher.measure(self._encoder, sampler, chunk_tokens=budget)
            self._memory.remember(f"quality-{number}", {"phase": number, "score": phase.generation.score, **asdict(found)})
            teacher.report(found, phase.generation.score)
        return sampler if phase.generation.teacher == "live" else replace(sampler, teacher=stored("teacher", teacher.frozen))

    def _checkpoint(self) -> None:
        import torch

        from ullme.distributed import whole

        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._state.items():
            tensors[f"weight/{name}"] = whole(parameter).clone()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = whole(torch.as_tensor(value)).clone()
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
        states: dict[str, dict[str, torch.Tensor]] = {}
        for full, value in tensors.items():
            key, _, name = full.partition("/")
            if key not in ("weight", "kept"):
                states.setdefault(name, {})[key] = value
        for name, parameter in self._state.items():
            if f"kept/{name}" in tensors:
                self._kept[name] = put(parameter, tensors[f"kept/{name}"].clone())
            parameter.data.copy_(put(parameter, tensors[f"weight/{name}"]))
            self._optimizer.state[parameter] = {
                key: self._step_count(value) if key == "step" else put(parameter, value.clone())
                for key, value in states.get(name, {}).items()
            }
        self.last_loss = found.loss
        rows = [json.loads(row) for row in self._together.agreed(lambda: self._trimmed(found.done))]
        self._measured = [(row["step"], row["development_mrr"]) for row in rows if "development_mrr" in row]
        return found.done

    def _step_count(self, value: torch.Tensor) -> Any:
        """As the optimizer counts: torch's with a tensor, bitsandbytes' with a number."""
        return value.clone() if self._section.optimizer == "adamw" else int(value)

    def _trimmed(self, steps: int) -> list[str]:
        """The rows of the first steps, all that is left in the file of metrics."""
        rows = self.metrics_file.read_text(encoding="utf-8").splitlines() if self.metrics_file.is_file() else []
        write_atomic(self.metrics_file, "".join(f"{row}\n" for row in rows[:steps]))
        return rows[:steps]


def _optimizer(kind: str, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), its state in float32 or in 8 bits, block by block (arXiv 2110.02861).

    Raises:
        ConfigError: 8 bits without a GPU, or without the package.
    """
    import torch

    settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999)}
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if device.type != "cuda":
        raise ConfigError("training.optimizer: adamw_8bit runs on a GPU, and this model is on the CPU; set optimizer: adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("training.optimizer: adamw_8bit needs bitsandbytes, which is not installed: pip install 'ullme[qlora]'")
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def _peak_memory_gb() -> float:
    """Most memory held so far, in 10^9 bytes: of the GPU, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
