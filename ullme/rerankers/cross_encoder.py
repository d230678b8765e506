"""By a cross-encoder: a model trained to read a question and a passage side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.backbone import fetch
from ullme.errors import ConfigError
from ullme.reranking import Reranker

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["CrossEncoderReranker"]


class CrossEncoderReranker(Reranker):
    """Any cross-encoder that sentence-transformers opens."""

    kind: str = "cross_encoder"
    model: str
    """A folder, or a hub id."""
    revision: str | None = None
    """Commit of the hub repository."""
    batch_size: int = 32

    def scores(self, encoder: Encoder | None, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """What the cross-encoder gives: logits, or what its own activation makes of them.

        Raises:
            ConfigError: it cannot be had, or gives more than one number for a pair.
        """
        pairs = [(query, text) for query, texts in zip(queries, passages, strict=True) for text in texts]
        if not pairs:
            return [np.empty(0, dtype=np.float32) for _ in queries]
        device = str(encoder.device) if encoder is not None else None
        found = np.asarray(_opened(self.model, self.revision, device).predict(pairs, batch_size=self.batch_size))
        if found.ndim != 1:
            raise ConfigError(
                f"cross-encoder {self.model}: expected one number for a question and a passage, got {found.shape[1]}; use a model "
                "trained to rank"
            )
        ends = np.cumsum([len(texts) for texts in passages])
        return np.split(found.astype(np.float32), ends[:-1])


@lru_cache(maxsize=2)
def _opened(model: str, revision: str | None, device: str | None) -> Any:
    from sentence_transformers import CrossEncoder

    folder = fetch(model, revision, what="cross-encoder")
    try:
        return CrossEncoder(str(folder), device=device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cross-encoder '{model}' cannot be opened ({reason}); expected a folder or hub id of one") from error
