"""What several files of this folder begin with: an empty store, and a small data set in it. Nothing is imported for the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ullme.artifacts import ArtifactRef, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    from ullme.artifacts import Store

    return Store(tmp_path / "store")


@pytest.fixture
def dates(store: Store, tmp_path: Path) -> ArtifactRef:
    from small_runs import beir_data, write_beir

    return beir_data(store, write_beir(tmp_path / "beir"))
