"""A local HTTP server that answers like the Hugging Face Hub: model info, file trees, file contents, and refusals."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

SHA = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Repo:
    """A repository: path -> bytes. `refuse` is (status, X-Error-Code); `sizes` overrides what the listing says."""

    files: dict[str, bytes]
    refuse: tuple[int, str] | None = None
    revisions: tuple[str, ...] = ("main", "v1", SHA)
    sizes: dict[str, int] = field(default_factory=dict)
    cut: str | None = None  # this file's connection breaks halfway


@dataclass
class Hub:
    endpoint: str
    repos: dict[str, Repo]
    requests: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        return sorted(
            {line.split("/", 3)[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line}
        )


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server while the block lasts."""
    hub = Hub("", {})

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), body)
        elif "/resolve/" in path:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(name, revision, file, body)
        else:
            self._send(404, b"{}", body)

    def _repo(self, name: str, revision: str, body: bool) -> Repo | None:
        """The repository, or None after a refusal has been sent."""
        repo = self.state.repos.get(name)
        if repo is None:
            self._send(401, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})
        elif repo.refuse is not None:
            self._send(repo.refuse[0], b'{"error": "refused"}', body, {"X-Error-Code": repo.refuse[1]})
        elif revision not in repo.revisions:
            self._send(404, b'{"error": "no revision"}', body, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _api(self, rest: str, body: bool) -> None:
        for marker in ("/revision/", "/tree/"):
            if marker in rest:
                name, _, revision = rest.partition(marker)
                break
        else:
            name, marker, revision = rest, "", "main"
        repo = self._repo(name, revision.split("/")[0], body)
        if repo is None:
            return
        sizes = {path: repo.sizes.get(path, len(data)) for path, data in repo.files.items()}
        plain: Any = {"id": name, "sha": SHA, "siblings": [{"rfilename": p, "size": s} for p, s in sizes.items()]}
        if marker == "/tree/":
            plain = [{"type": "file", "path": p, "size": s, "oid": _etag(repo.files[p])} for p, s in sizes.items()]
        self._send(200, json.dumps(plain).encode(), body)

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        repo = self._repo(name, revision, body)
        if repo is None:
            return
        if file not in repo.files:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        data = repo.files[file]
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        if body and repo.cut == file:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return
        self._send(200, data, body, headers)

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
