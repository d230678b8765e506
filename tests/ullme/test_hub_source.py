"""The `hub` source against a hub on this machine, and without any."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import json, sys
from ullme.data import DataConfig
from ullme.errors import DataError
from ullme.records import Problems
import huggingface_hub.hf_api, time
started = time.monotonic()
try:
    config = DataConfig.model_validate({"source": json.loads(sys.argv[1])}).resolved()
    records = config.source.read(Problems())
except DataError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code, "seconds": time.monotonic() - started}))
else:
    queries = [[query.text, len(query.positives)] for query in records.queries]
    documents = [document.text for document in records.documents if document.searchable]
    print(json.dumps({"queries": queries, "documents": documents, "digest": config.source_digest}))
"""


def table(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


FILES = {
    "train.parquet": table(question=["one"], pos=[["a", "b"]]),
    "data/more/test.parquet": table(question=["two"], pos=[["b"]]),
    "data/pairs.jsonl": b'{"question": "three", "pos": "c"}\n',
    "corpus/part.parquet": table(text=["b", "z"]),
    "README.md": b"# A data set\n",
}


class Handler(BaseHTTPRequestHandler):
    """What the hub answers of one data set; every path that was asked for is kept in `server.asked`."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)  # type: ignore[attr-defined]
        api, files = "/api/datasets/org/name", f"/datasets/org/name/resolve/{COMMIT}/"
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            rows = [{"type": "file", "path": name, "size": len(data), "oid": digest(data)} for name, data in FILES.items()]
            self.answer(json.dumps(rows).encode())
        elif path.startswith(files) and path.removeprefix(files) in FILES:
            data = FILES[path.removeprefix(files)]
            self.answer(data, ETag=f'"{digest(data)}"', **{"X-Repo-Commit": COMMIT})
        else:
            self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound" if "revision" in path else "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 - a name of the standard library

    def answer(self, data: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read(home: Path, endpoint: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """What a process says that knows only this hub and this cache, and its standard error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    offline = {"HF_HUB_OFFLINE": "1"} if endpoint == "offline" else {"HF_ENDPOINT": endpoint}
    environment = {**kept, **offline, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    source = {"kind": "hub", "name": "org/name", "revision": COMMIT, "columns": {"query": "question"}, **fields}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(source)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_commit_is_downloaded_once_and_then_needs_no_network(hub, tmp_path):
    first, _ = read(tmp_path, address(hub), corpus_files="corpus/*")
    assert sorted(first["queries"]) == [["one", 2], ["two", 1]]
    assert sorted(first["documents"]) == ["a", "b", "z"]
    asked = hub.asked
    assert not [path for path in asked if path.endswith((".md", ".jsonl"))]
    hub.asked = []
    assert read(tmp_path, address(hub), corpus_files="corpus/*")[0] == first
    assert hub.asked == []
    assert read(tmp_path, "offline", corpus_files="corpus/*")[0] == first
    missing = read(tmp_path, "offline", files="**/*.jsonl")[0]
    assert "expected the data set 'org/name'" in missing["error"]


def test_a_branch_is_looked_up_and_what_it_stands_for_is_said(hub, tmp_path):
    by_commit, _ = read(tmp_path, address(hub), corpus_files="corpus/*")
    by_name, said = read(tmp_path, address(hub), corpus_files="corpus/*", revision="main")
    assert by_name["queries"]
    assert by_name == by_commit
    assert f"'main' may change; it is commit {COMMIT} now" in said


def test_files_are_chosen_by_a_glob_and_lines_are_read_too(hub, tmp_path):
    assert read(tmp_path, address(hub), files="data/*.jsonl")[0]["queries"] == [["three", 1]]
    assert read(tmp_path, address(hub), files="data/**/*.parquet")[0]["queries"] == [["two", 1]]
    alone = read(tmp_path, address(hub), files=None, corpus_files="corpus/*")[0]
    assert (alone["queries"], alone["documents"]) == ([], ["b", "z"])
    both = [read(tmp_path, address(hub), corpus_files="corpus/*", searchable=which)[0] for which in ("all", "corpus")]
    assert [sorted(answer["documents"]) for answer in both] == [["a", "b", "z"], ["b", "z"]]
    wrong = read(tmp_path, address(hub), files="*.csv")[0]
    assert wrong["error"].startswith("data.source (hub): expected files like '*.csv' in 'org/name', it has README.md, corpus/part")


def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path):
    for fields in ({"revision": "f" * 40}, {"revision": "other"}, {"name": "org/other"}):
        answer, _ = read(tmp_path, address(hub), **fields)
        assert answer["code"] == 2
        assert answer["error"].startswith("data.source (hub): expected the data set 'org/")
        assert len(answer["error"].splitlines()) == 1


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid", "offline"])
@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_without_a_network_there_is_one_line_within_seconds(tmp_path, endpoint, revision):
    answer, said = read(tmp_path, endpoint, revision=revision)
    assert answer["seconds"] < 10
    assert answer["code"] == 2
    assert len(answer["error"].splitlines()) == 1
    assert "run once with network access, or copy its files here and use kind: parquet" in answer["error"]
    assert "Retry" not in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_within_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer, _ = read(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer["seconds"] < 12
    assert "expected the data set 'org/name'" in answer["error"]
