"""A local HTTP server that takes uploads as the Hugging Face Hub does, at the endpoints of huggingface_hub's client.

GET  /api/whoami-v2                          who the token belongs to, and 401 for another one
GET  /api/models/NAME[/revision/BRANCH]      files with size, git id and LFS hash
POST /api/repos/create, /api/models/NAME/branch/BRANCH
POST /api/validate-yaml                      the card's front matter; a `base_model` that is no id is refused
POST /api/models/NAME/preupload/BRANCH       which files go through LFS
POST /NAME.git/info/lfs/objects/batch        upload instructions, none for what is in the storage
PUT  /storage/SHA256                         a file's bytes, kept only if the hash is right
POST /api/models/NAME/commit/BRANCH          newline-delimited JSON: header, file, lfsFile, deletedFile
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

TOKEN = "hf_of_the_stand_in"
LARGE = (".safetensors", ".gguf", ".bin", "tokenizer.json")


@dataclass
class Repo:
    """A repository: branch -> path -> bytes."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


@dataclass
class Hub:
    """The server's state. `fail` holds, by "METHOD path prefix", what happens to the next such requests: a status
    to answer with, or "die" for a connection that breaks in the middle of the body."""

    endpoint: str = ""
    user: str = "me"
    may_write: bool = True
    repos: dict[str, Repo] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, list[int | str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bytes_put: int = 0

    def count(self, prefix: str) -> int:
        return sum(request.startswith(prefix) for request in self.requests)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server while the block lasts."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(None)

    do_PUT = do_POST

    def _handle(self, body: bytes | None) -> None:
        path = unquote(urlparse(self.path).path)
        request = f"{self.command} {path}"
        self.state.requests.append(request)
        planned = next((left for prefix, left in self.state.fail.items() if left and request.startswith(prefix)), None)
        fault = planned.pop(0) if planned else None
        length = int(self.headers.get("Content-Length", 0))
        if fault == "die":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = self.rfile.read(length) if body is None else body
        if isinstance(fault, int):
            self._send(fault, {"error": "the stand-in was told to fail"})
        elif path.startswith("/storage/"):
            self._put(path.removeprefix("/storage/"), data)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials in Authorization header"}, "InvalidToken")
        elif path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": self.state.user})
        elif path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(data)["content"])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(match[1], json.loads(data))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|branch|preupload|commit)/(.+))?", path):
            self._model(match[1], match[2], match[3] or "main", data)
        else:
            self._send(404, {"error": "not found"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or self.state.user}/{asked['name']}"
        if not self.state.may_write:
            self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.state.repos:
            self._send(409, {"error": "You already created this model repo", "url": self._url(name)})
        else:
            self.state.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self._send(200, {"url": self._url(name)})

    def _validate(self, content: str) -> None:
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else {}
        bases = front.get("base_model", [])
        wrong = [
            b for b in ([bases] if isinstance(bases, str) else bases) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", b)
        ]
        if wrong:
            self._send(400, {"errors": [{"message": '"base_model" with value "' + wrong[0] + '" is not valid'}]})
        else:
            self._send(200, {"errors": [], "warnings": []})

    def _model(self, name: str, what: str | None, branch: str, data: bytes) -> None:
        repo = self.state.repos.get(name)
        if repo is None:
            self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        elif what == "branch":
            if branch in repo.branches:
                self._send(409, {"error": "Reference already exists"})
            else:
                repo.branches[branch] = dict(repo.files)
                self._send(200, {})
        elif branch not in repo.branches:
            self._send(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        elif what == "preupload":
            files = [file["path"] for file in json.loads(data)["files"]]
            self._send(200, {"files": [self._mode(repo.branches[branch], path) for path in files]})
        elif what == "commit":
            self._commit(name, repo, branch, data)
        else:
            self._send(200, self._info(name, repo, branch))

    def _mode(self, there: dict[str, bytes], path: str) -> dict[str, Any]:
        large = path.endswith(LARGE)
        known = _sha256(there[path]) if path in there and large else _git(there[path]) if path in there else None
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": known}

    def _info(self, name: str, repo: Repo, branch: str) -> dict[str, Any]:
        siblings = []
        for path, content in repo.branches[branch].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _git(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": name, "sha": "a" * 40, "private": repo.private, "siblings": siblings}

    def _batch(self, name: str, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.state.storage:
                entry["actions"] = {"upload": {"href": f"{self.state.endpoint}/storage/{item['oid']}"}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, data: bytes) -> None:
        self.state.bytes_put += len(data)
        if _sha256(data) != oid:
            self._send(400, {"error": "hash mismatch"})
            return
        self.state.storage[oid] = data
        self._send(200, {})

    def _commit(self, name: str, repo: Repo, branch: str, data: bytes) -> None:
        if not self.state.may_write:
            self._send(403, {"error": "Forbidden: you must use a write token to upload to a repository."})
            return
        lines = [json.loads(line) for line in data.splitlines()]
        files = dict(repo.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.storage:
                    self._send(400, {"error": f"LFS object {value['oid']} is missing"})
                    return
                files[value["path"]] = self.state.storage[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[branch] = files
        repo.commits.append({"branch": branch, **lines[0]["value"]})
        oid = hashlib.sha1(data).hexdigest()
        self._send(200, {"commitUrl": f"{self._url(name)}/commit/{oid}", "commitOid": oid})

    def _url(self, name: str) -> str:
        return f"{self.state.endpoint}/{name}"

    def _send(self, status: int, value: Any, code: str | None = None) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        if "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(raw)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
