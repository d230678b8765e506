"""Shared by all tests: shapes in annotations are executed, and where real collections lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before any of these is imported: every call in a test then checks its jaxtyping annotations.
SHAPED = ["ullme.pooling", "ullme.losses", "ullme.batches", "ullme.gradcache", "ullme.encoder", "ullme.attention", "ullme.reach"]
install_import_hook(SHAPED, "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real collections beside the repository; a test that needs it is skipped where it is not there."""
    folder = Path(__file__).resolve().parents[1] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("needs the real collections in ../shared/data, which is not there")
    return folder.resolve()
