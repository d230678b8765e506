"""Building in a fresh directory, for every test of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import in_shards, kind_of

from indexes.build import build
from indexes.index import Shards


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Path]:
    """Build `spec` over vectors (or ready shards) in a fresh directory."""

    def make(spec: Any, corpus: np.ndarray | Shards, *, seed: int = 7, fingerprint: str = "a" * 64) -> Path:
        out = tmp_path / f"index-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        shards = in_shards(corpus) if isinstance(corpus, np.ndarray) else corpus
        build(kind_of(spec), shards, out=out, fingerprint=fingerprint, seed=seed)
        return out

    return make
