"""faiss itself: which package, reading and writing an index, its parameters, its copy on a GPU, a search among some rows."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ullme.artifacts import settle
from ullme.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from indexes.kind import IndexKind

__all__ = [
    "add_to_lists",
    "gpu_copy",
    "last_line",
    "load_faiss",
    "read_index",
    "selecting",
    "set_parameters",
    "stored_vectors",
    "write_index",
]

log = logging.getLogger(__name__)


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        ConfigError: no faiss package, two of them (they overwrite each other's files), or one that does not load.
    """
    installed = [name for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs") if _is_installed(name)]
    if len(installed) > 1:
        raise ConfigError(
            f"{' and '.join(installed)} are both installed and overwrite each other: uninstall both, "
            "then install ullme[cpu] or ullme[gpu]"
        )
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"faiss cannot be imported ({last_line(error)}): install ullme[cpu] or ullme[gpu]") from error
    except RuntimeError as error:  # what faiss-gpu raises without the CUDA libraries
        raise ConfigError(
            f"faiss does not load ({last_line(error)}): install ullme[cpu], or ullme[gpu] with its CUDA wheels"
        ) from error
    return faiss


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def set_parameters(faiss: Any, index: Any, parameters: Mapping[str, float]) -> None:
    space = faiss.ParameterSpace()
    for name, value in parameters.items():
        space.set_index_parameter(index, name, value)


def write_index(faiss: Any, index: Any, file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    faiss.write_index(index, str(partial))
    settle(partial, file)


def read_index(faiss: Any, file: Path, beside: int, *, mapped: bool = True) -> Any:
    """The index, mapped into memory. No array may be larger than the file: a forged length cannot exhaust the memory."""
    limit = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(2 * file.stat().st_size + beside + 2**20)
    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise ArtifactError(f"{file}: faiss cannot read it ({last_line(error)}); build the index again") from error
    finally:
        faiss.set_deserialization_vector_byte_limit(limit)


def add_to_lists(inverted: Any, vectors: np.ndarray, lists: np.ndarray) -> None:
    """Add Float32[n D] to an index of inverted lists, each to the list of its number in Int64[n]."""
    from faiss.contrib.ivf_tools import add_preassigned

    add_preassigned(inverted, vectors, lists)


def gpu_copy(faiss: Any, index: Any, kind: IndexKind, device: str) -> Any:
    """A copy of the index on the GPU, or a part of it on each; None to search on the CPU."""
    if device not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"device: expected auto, cpu or gpu, got '{device}'")
    if device == "cpu":
        return None
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        reason = "faiss sees no GPU (a GPU needs ullme[gpu] in place of ullme[cpu])"
    elif not kind.gpu_search:
        reason = f"faiss cannot search '{kind.kind}' with these fields on a GPU"
    else:
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        return faiss.index_cpu_to_all_gpus(index, options)
    if device == "gpu":
        raise ConfigError(f"device: gpu was asked for, but {reason}; use device cpu or auto")
    log.info("searching on the CPU: %s", reason)
    return None


def selecting(index: Any, rows: np.ndarray) -> Any:
    """Search parameters of an index that finds nothing but these rows, and looks the further the fewer they are.

    rows: Int64[n], ascending. What a graph or lists are searched with grows by the share that the others have.
    """
    faiss = load_faiss()
    selector = faiss.IDSelectorBitmap(np.packbits(_marks(index.ntotal, rows), bitorder="little"))
    wider = index.ntotal / len(rows)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=min(index.ntotal, round(index.hnsw.efSearch * wider)))
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nlist, round(index.nprobe * wider)))
    return faiss.SearchParameters(sel=selector)


def _marks(count: int, rows: np.ndarray) -> np.ndarray:
    marks = np.zeros(count, dtype=bool)
    marks[rows] = True
    return marks


def stored_vectors(index: Any, rows: np.ndarray) -> np.ndarray:
    """Float32[n D]: what the index has kept of the vectors at these rows."""
    inverted = load_faiss().try_extract_index_ivf(index)
    if inverted is not None:
        inverted.make_direct_map()
    return index.reconstruct_batch(rows)
