"""A guide: an embedding model that is not trained, and what it thinks of the training texts. Made once, before the first step.

    phase.guide      GuideConfig: which model
    guides(...)      phases + examples -> Guide per phase, each distinct text encoded once, kept across a crash
    Guide            examples and passages of a batch -> its vectors of them, which every `TrainBatch` carries

`contrastive.guided` leaves out what the guide takes for an answer (GISTEmbed, arXiv 2402.16829); `distill` learns its scores or
its embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ullme.backbone import MODEL_FILES
from ullme.checkpoints import write_tensors
from ullme.components import Section
from ullme.data import Example
from ullme.errors import ConfigError
from ullme.progress import Progress
from ullme.records import digest_files

if TYPE_CHECKING:
    from ullme.encoder import Encoder
    from ullme.training import PhaseConfig

__all__ = ["Guide", "GuideConfig", "guides"]

AT_ONCE = 512
Asked = tuple[str, str]
"""A query and its own instruction."""


class GuideConfig(Section):
    """Which model guides."""

    model: str
    """Folder of an embedding model: of sentence-transformers, ours, or any LLM or encoder of transformers."""
    source_digest: str = ""
    """Filled in by `resolved`: digest of the folder's weights and settings. Written by hand, it pins them."""

    def resolved(self) -> GuideConfig:
        """A copy whose `source_digest` names the model as it is now.

        Raises:
            ConfigError: no such folder, one without a model, or `source_digest` was given and the contents are others.
        """
        folder = Path(self.model).expanduser()
        inside = (file for file in folder.rglob("*") if file.suffix in MODEL_FILES and file.is_file())
        files = {file.relative_to(folder).as_posix(): file for file in inside}
        visible = [(name, file) for name, file in sorted(files.items()) if not name.startswith(".")]
        if not visible:
            raise ConfigError(f"guide.model: expected a folder of an embedding model, got '{self.model}', which is none")
        found = digest_files(visible)
        if self.source_digest not in ("", found):
            raise ConfigError(
                f"guide.model: expected contents {self.source_digest[:12]} in '{self.model}', got {found[:12]}; bring the old "
                "files back, or remove guide.source_digest to use the new ones"
            )
        return self.model_copy(update={"source_digest": found})


class Guide:
    """The guide's unit-norm vectors of all training texts. tables: `queries` Float32[N G] and `documents` Float32[M G], a row per
    distinct text in the order in which the examples bring them.
    """

    def __init__(self, examples: Sequence[Example], tables: Mapping[str, np.ndarray]) -> None:
        asked, texts = _distinct(examples)
        self._queries, self._documents = tables["queries"], tables["documents"]
        self._asked = {key: row for row, key in enumerate(asked)}
        self._texts = {text: row for row, text in enumerate(texts)}

    def queries(self, examples: Sequence[Example]) -> np.ndarray:
        """Float32[Q G] of the queries of these examples."""
        return self._queries[[self._asked[example.query, example.instruction] for example in examples]]

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Float32[C G] of these passages."""
        return self._documents[[self._texts[text] for text in texts]]


def guides(
    phases: Sequence[PhaseConfig], examples: Sequence[Example], *, folder: Path, dim: int, batch_tokens: int
) -> dict[int, Guide]:
    """The guide of each phase that has one, by the phase's position. Phases that name the same model share its vectors.

    folder: where vectors are kept across a crash. dim: length of the embeddings that are trained.

    Raises:
        ConfigError: no model there, other contents than the run was started with, or embeddings of another length where
        they are to be learned.
    """
    found: dict[int, Guide] = {}
    for number, phase in enumerate(phases):
        if phase.guide is None:
            continue
        config = phase.guide.resolved()
        wanted = dim if phase.objective.copies_guide else None
        file = folder / f"guide-{config.source_digest[:16]}.safetensors"
        found[number] = Guide(examples, _tables(config, examples, file=file, wanted=wanted, batch_tokens=batch_tokens))
    return found


def _tables(
    config: GuideConfig, examples: Sequence[Example], *, file: Path, wanted: int | None, batch_tokens: int
) -> dict[str, np.ndarray]:
    import torch
    from safetensors.numpy import load_file

    if file.is_file():
        tables = load_file(file)
        _require_length(tables["queries"].shape[1], wanted)
        return tables
    from ullme.encoder import Encoder

    encoder = Encoder.load(Path(config.model).expanduser())
    _require_length(encoder.dim, wanted)
    tables = _encoded(encoder, examples, batch_tokens=batch_tokens)
    write_tensors(file, {name: torch.from_numpy(table) for name, table in tables.items()})
    return tables


def _require_length(dim: int, wanted: int | None) -> None:
    if wanted not in (None, dim):
        raise ConfigError(
            f"guide.model: distill with target: embeddings needs embeddings of the trained model's length {wanted}, got {dim}; "
            "use target: scores, or another guide"
        )


def _encoded(encoder: Encoder, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, np.ndarray]:
    asked, texts = _distinct(examples)
    queries = np.empty((len(asked), encoder.dim), dtype=np.float32)
    documents = np.empty((len(texts), encoder.dim), dtype=np.float32)
    with Progress(len(asked) + len(texts), "encode with the guide", unit="text") as progress:
        for start in range(0, len(asked), AT_ONCE):
            part = list(asked)[start : start + AT_ONCE]
            queries[start : start + AT_ONCE] = encoder.encode(
                [query for query, _ in part],
                prompt="query",
                dataset=[asked[key] for key in part],
                instructions=[instruction for _, instruction in part],
                batch_tokens=batch_tokens,
            )
            progress.advance(len(part))
        for start in range(0, len(texts), AT_ONCE):
            part = list(texts)[start : start + AT_ONCE]
            vectors = encoder.encode(part, prompt="document", dataset=[texts[text] for text in part], batch_tokens=batch_tokens)
            documents[start : start + AT_ONCE] = vectors
            progress.advance(len(part))
    return {"queries": queries, "documents": documents}


def _distinct(examples: Sequence[Example]) -> tuple[dict[Asked, str], dict[str, str]]:
    """Each query (with its instruction) and each passage once, with the data set that brings it first."""
    asked: dict[Asked, str] = {}
    texts: dict[str, str] = {}
    for example in examples:
        asked.setdefault((example.query, example.instruction), example.dataset)
        for text in (*example.positives, *example.negatives):
            texts.setdefault(text, example.dataset)
    return asked, texts
