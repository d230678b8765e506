"""A model hub on this machine: the part of the Hugging Face hub's HTTP interface that uploading and downloading a model takes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 20_000
"""From this size on a file goes through the large-file storage, as *.safetensors do whatever their size."""


@dataclass
class Repository:
    """branches: name -> commit; commits: id -> name -> content, whole."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        number = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = files, number
        return number

    def at(self, revision: str) -> str:
        return self.branches.get(revision, revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.at(revision)]


class Hub:
    """Repositories by name. token: what a request that changes something must bring; asked: method and path of every request."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse_files = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - http.server calls them so

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        address = urlsplit(self.path)
        path = [unquote(part) for part in address.path.strip("/").split("/")]
        self.hub.asked.append(f"{self.command} {address.path}")
        changes = self.command in ("POST", "PUT") and path[0] != "storage"
        if changes and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif path[:1] == ["storage"]:
            self.hub.storage[path[1]] = body
            self._send(200, {})
        elif path == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif path == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif path[-5:-3] == ["info", "lfs"] or path[-3:] == ["lfs", "objects", "batch"]:
            self._batch(json.loads(body))
        elif path[:2] == ["api", "models"]:
            self._api("/".join(path[2:4]), path[4:], body, parse_qs(address.query))
        elif path[2:3] == ["resolve"]:
            self._resolve("/".join(path[:2]), path[3], "/".join(path[4:]))
        else:
            self._send(404, {"error": f"this hub does not know {self.command} {self.path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        repository = self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _api(self, name: str, rest: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        what, revision = (rest[0] if rest else "revision"), (rest[1] if len(rest) > 1 else "main")
        if what == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, repository.at("main"))
            self._send(409 if known else 200, {"error": "Reference already exists"} if known else {})
        elif repository.at(revision) not in repository.commits:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            info = {"id": name, "sha": repository.at(revision), "private": repository.private, "tags": [], "downloads": 0}
            self._send(200, {**info, "siblings": [{"rfilename": file} for file in repository.files(revision)]})
        elif what == "preupload":
            self._send(200, {"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif what == "commit":
            self._commit(name, repository, revision, [json.loads(line) for line in body.splitlines()])
        elif what == "tree":
            self._tree(repository.files(revision), "/".join(rest[2:]))
        else:
            self._send(404, {"error": f"this hub does not know {rest}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors") or file["size"] >= LARGE_BYTES
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.refuse_files:
            self._send(400, {"error": "Your push was rejected: the file is not allowed here"})
            return
        files = dict(repository.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.storage[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        number = repository.commit(branch, files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number, "success": True})

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = {name: content for name, content in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            self._send(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, [_entry(name, content) for name, content in sorted(inside.items())])

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or file not in repository.files(revision):
            code = "RepoNotFound" if repository is None else "EntryNotFound"
            self._send(404, {"error": code}, {"X-Error-Code": code})
            return
        content = repository.files(revision)[file]
        self._send(200, content, {"ETag": f'"{_entry(file, content)["oid"]}"', "X-Repo-Commit": repository.at(revision)})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        message = {"X-Error-Message": content["error"]} if isinstance(content, dict) and "error" in content else {}
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **message, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on the terminal."""


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }


@contextlib.contextmanager
def local_hub(token: str = "hf_test") -> Iterator[Hub]:
    """A hub that listens as long as the block lasts."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
