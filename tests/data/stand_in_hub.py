"""A program: reads data sets from a local HTTP server that answers as the Hub does, and prints what came as JSON.

Run as a program of its own because `datasets` takes the Hub's address from the environment when it is imported.
"""

import http.server
import json
import os
import sys
import threading
from typing import Any

ROWS = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
CARD = b"""---
configs:
- config_name: default
  data_files: train.jsonl
dataset_info:
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {"0": bad, "1": good}}}
---
"""
COMMIT = "a" * 40
FILES = {"train.jsonl": ROWS, "README.md": CARD}


class Hub(http.server.BaseHTTPRequestHandler):
    """`o/good` has two files; `o/gated` and `o/missing` answer as the Hub does for such data sets."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def listing(self) -> bytes:
        found = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in FILES.items()]
        return json.dumps(found).encode()

    def do_GET(self) -> None:
        if "o/gated" in self.path and "/resolve/" in self.path:
            self.answer(403, b"restricted", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif "o/missing" in self.path:
            self.answer(401, b"not found", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
        elif "/tree/" in self.path or "/paths-info/" in self.path:
            self.answer(200, self.listing(), Content_Type="application/json")
        elif self.path.startswith("/api/datasets/"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "o/good", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif (name := self.path.rsplit("/", 1)[-1]) in FILES:
            self.answer(200, FILES[name], X_Repo_Commit=COMMIT, ETag=f'"{name}"')
        else:
            self.answer(404, b"no", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"

    from halfbyte.data.hub import read_hub
    from halfbyte.errors import UsageError

    result: dict[str, Any] = {}
    for dataset, name in (("o/good", None), ("o/gated", None), ("o/missing", None), ("o/good", "other")):
        key = f"{dataset} {name}" if name else dataset
        try:
            data = read_hub(dataset, name, None, False)
            result[key] = [[str(record.origin), record.values] for record in data.records], data.label_names
        except UsageError as error:
            result[key] = str(error)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
