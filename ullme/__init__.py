"""Turn a decoder-only LLM into a text-embedding model and keep a searchable, evaluated index of a corpus built with it.

Importing this package imports no torch: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullme.artifacts import ArtifactRef, Store
    from ullme.encoder import Encoder
    from ullme.errors import UllmeError
    from ullme.precision import Calibration, dequantise, quantise, truncate

__all__ = ["ArtifactRef", "Calibration", "Encoder", "Store", "UllmeError", "dequantise", "quantise", "truncate"]

# bitsandbytes, which mteb and peft import where it is installed, advises a package of kernels for 4-bit inference; none is run here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "ArtifactRef": "artifacts",
    "Calibration": "precision",
    "Encoder": "encoder",
    "Store": "artifacts",
    "UllmeError": "errors",
    "dequantise": "precision",
    "quantise": "precision",
    "truncate": "precision",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ullme' has no attribute '{name}'; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ullme.{_HOMES[name]}"), name)
