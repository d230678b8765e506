"""What this machine and its Python offer: packages as required, clashes between them, GPUs, cores and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

__all__ = ["Gpu", "Loaded", "Loading", "cores", "has_nvidia_gpu", "memory_bytes", "package_problems", "required"]

DISTRIBUTION = "ullme"
WHY = {"fastapi": "; with a newer one Prefect's server does not start, and a run only says that it timed out"}
"""What is behind a requirement that looks arbitrary."""
PATIENCE_S = 120
LOADED = ("torch", "transformers", "peft", "faiss")
SCRIPT = f"""
import importlib, json
found = {{"versions": {{}}, "errors": {{}}, "gpus": [], "faiss_gpus": 0}}
for name in {LOADED!r}:
    try:
        found["versions"][name] = importlib.import_module(name).__version__
    except Exception as error:
        found["errors"][name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
if "torch" in found["versions"]:
    import torch
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found["gpus"].append([torch.cuda.get_device_name(number), free, total])
if "faiss" in found["versions"]:
    import faiss
    found["faiss_gpus"] = faiss.get_num_gpus()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Gpu:
    """One that torch can use; memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Loaded:
    """What importing the large packages gave. errors: last line of what each that cannot be imported said."""

    versions: Mapping[str, str]
    errors: Mapping[str, str]
    gpus: Sequence[Gpu] = ()
    faiss_gpus: int = 0


class Loading:
    """Imports the large packages in a process of its own: a broken one cannot end ours, and no GPU memory is held here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SCRIPT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"TRANSFORMERS_VERBOSITY": "error", **os.environ},
        )

    def result(self) -> Loaded:
        """Wait for it."""
        try:
            said, _ = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.end()
            return Loaded({}, {", ".join(LOADED): f"importing them takes more than {PATIENCE_S} s"})
        if self._process.returncode != 0:
            return Loaded({}, {", ".join(LOADED): f"importing them ends Python with exit code {self._process.returncode}"})
        found = json.loads(said.splitlines()[-1])
        return Loaded(found["versions"], found["errors"], [Gpu(*gpu) for gpu in found["gpus"]], found["faiss_gpus"])

    def end(self) -> None:
        """Stop, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def required() -> list[Requirement]:
    """What the installed package asks for here, its extras left out.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    return [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def package_problems() -> list[str]:
    """One line for each package that is missing, of a version that does not do, or in the way of another.

    Raises:
        PackageNotFoundError: this project is not installed.
    """
    found = []
    for requirement in required():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{requirement.name} is not installed; pip install -c constraints.txt '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(
                f"{requirement.name} {version} is installed, expected {requirement.specifier}{WHY.get(requirement.name, '')}; "
                f"pip install -c constraints.txt '{requirement}'"
            )
    names = {each.metadata["Name"].lower() for each in metadata.distributions()}
    builds = sorted(name for name in names if name.startswith("faiss-"))
    if len(builds) > 1:
        found.append(f"{' and '.join(builds)} overwrite each other; uninstall both, then install ullme[cpu] or ullme[gpu]")
    if not builds:
        found.append("no faiss is installed, so no index can be built; install ullme[cpu] or ullme[gpu]")
    return found


def has_nvidia_gpu() -> bool:
    """Whether the machine has one with its driver, whatever torch can do with it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Main memory of the machine."""
    return psutil.virtual_memory().total
