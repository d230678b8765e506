"""Shared by all tests: shapes in annotations are executed, and where real collections lie."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before any of these is imported: every call in a test then checks its jaxtyping annotations.
SHAPED = [
    "ullme.pooling",
    "ullme.losses",
    "ullme.batches",
    "ullme.gradcache",
    "ullme.representations",
    "ullme.encoder",
    "ullme.attention",
    "ullme.reach",
]
install_import_hook(SHAPED, "beartype.beartype")

BEGAN = time.monotonic()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real collections beside the repository; a test that needs it is skipped where it is not there."""
    folder = Path(__file__).resolve().parents[1] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("needs the real collections in ../shared/data, which is not there")
    return folder.resolve()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=float("inf"), help="start no slow test after so long: skip it, and say so")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where time is short, another file comes first each day, so that in the course of days all of them are run."""
    if config.getoption("--minutes") < float("inf") and items:
        files = list(dict.fromkeys(item.path for item in items))
        first = int(time.time() // 86_400) % len(files)
        items.sort(key=lambda item: (files.index(item.path) - first) % len(files))


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if item.get_closest_marker("slow") and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes for slow tests are over")
