"""docs/operations.md: every command on the page works, in its order, in a fresh copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from flows.limits import LimitsConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PORT = "4200"
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.strip().splitlines()]
SAYS = {
    "ullme run train-and-index --config configs/smoke.yaml": "ullme-smoke version 1",
    "ullme history": "newest first",
    "ullme search": "answers",
    "prefect deploy --all": "weekly-train-and-index",
    "prefect deployment run": "Completed",
    "ullme run refresh": "new champion: not worse than champion version 1",
    "ullme run mine": "negatives/",
    "ullme run evaluate": "tuned on retrieval",
    "ullme rollback --config": "version 1",
    "ullme gc": "kept",
}
"""What a command must have printed, by its beginning."""


Place = tuple[Path, dict[str, str], list[subprocess.Popen[bytes]]]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A copy of what is committed, an environment of its own with a port that is free, and what runs in the background."""
    folder = tmp_path / "ullme"
    for name in ("configs", "flows", "ullme", "indexes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "COV_", "ULLME_"))}
    env = {
        **mine,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    started: list[subprocess.Popen[bytes]] = []
    yield folder, env, started
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == env["PREFECT_HOME"]:
                process.kill()
        except (psutil.Error, OSError):
            continue
    for background_process in started:
        background_process.wait()


def adapted(command: str, port: str) -> str:
    """The same command on a port that is free."""
    return command.replace(PORT, port)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_page_runs(place: Place) -> None:
    folder, env, started = place
    assert len(COMMANDS) >= 20
    for command in COMMANDS:
        if command.endswith("&"):
            words = ["bash", "-c", "exec " + adapted(command.removesuffix("&"), env["PREFECT_SERVER_API_PORT"])]
            with (folder / "background.log").open("ab") as log:
                started.append(subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            if "server start" in command:
                wait_for(f"http://127.0.0.1:{env['PREFECT_SERVER_API_PORT']}/api/health")
                continue
            time.sleep(8)
            assert started[-1].poll() is None, f"$ {command}\n{background(folder)}"
            continue
        done = subprocess.run(
            ["bash", "-c", adapted(command, env["PREFECT_SERVER_API_PORT"])],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-4000:]}\n{background(folder)}"
        assert "Traceback" not in done.stdout, f"$ {command}\n{done.stdout[-4000:]}"
        for start, words in SAYS.items():
            if command.startswith(start):
                assert words in done.stdout, f"$ {command}\n{done.stdout[-4000:]}"


def background(folder: Path) -> str:
    file = folder / "background.log"
    return file.read_text(errors="replace")[-2000:] if file.is_file() else ""


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            assert time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.5)


def test_the_limits_on_the_page_are_valid() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
    limits = LimitsConfig.model_validate(next(block["limits"] for block in blocks if "limits" in block))
    assert (limits.seconds("train"), limits.memory_bytes("encode"), limits.retries) == (36000, 64 * 10**9, 1)


def test_the_page_names_the_deployments_that_there_are() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert all(f"/{deployment['name']}`" in PAGE for deployment in deployments)
    assert {deployment["name"] for deployment in deployments} == {"nightly-refresh", "weekly-train-and-index", "evaluate"}
