"""A Hugging Face hub as huggingface_hub's client sees it when it uploads: repositories, branches, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_good"
READ_ONLY = "hf_read"


class FakeHub(ThreadingHTTPServer):
    """`repos` has each repository's privacy, and by branch its files; `requests` what was asked, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        data = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else None
        if data is None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self._send(200, {})

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if token == READ_ONLY and self.command == "POST":
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                status, document = answer(self.server, body, *match.groups())
                return self._send(status, document)
        return self._send(404, {"error": "not found"})


def _create(hub: FakeHub, body: bytes) -> tuple[int, dict[str, Any]]:
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    known = name in hub.repos
    hub.repos.setdefault(name, {"private": asked.get("visibility") == "private", "branches": {"main": {}}})
    return 409 if known else 200, {"url": f"{hub.endpoint}/{name}", "name": name}


def _branch(hub: FakeHub, body: bytes, repo: str, branch: str) -> tuple[int, dict[str, Any]]:
    known = branch in hub.repos[repo]["branches"]
    hub.repos[repo]["branches"].setdefault(branch, {})
    return 409 if known else 200, {}


def _info(hub: FakeHub, body: bytes, repo: str, revision: str | None = None) -> tuple[int, dict[str, Any]]:
    if repo not in hub.repos:
        return 404, {"error": "Repository not found"}
    return 200, {"id": repo, "private": hub.repos[repo]["private"], "sha": "0" * 40, "siblings": [], "tags": []}


def _preupload(hub: FakeHub, body: bytes, repo: str, branch: str) -> tuple[int, dict[str, Any]]:
    names = [file["path"] for file in json.loads(body)["files"]]
    modes = [{"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular"} for n in names]
    return 200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]}


def _batch(hub: FakeHub, body: bytes, repo: str) -> tuple[int, dict[str, Any]]:
    return 200, {
        "transfer": "basic",
        "objects": [
            {**o, "actions": {"upload": {"href": f"{hub.endpoint}/put/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ],
    }


def _commit(hub: FakeHub, body: bytes, repo: str, branch: str) -> tuple[int, dict[str, Any]]:
    files = hub.repos[repo]["branches"][branch]
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    url = f"{hub.endpoint}/{repo}/commit/{'1' * 40}"
    return 200, {"commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""}


def _valid(hub: FakeHub, body: bytes) -> tuple[int, dict[str, Any]]:
    content = json.loads(body)["content"]
    return (200, {}) if content.startswith("---\n") else (400, {"errors": [{"message": "no metadata"}]})


_ROUTES: list[tuple[str, Any]] = [
    ("/api/repos/create", _create),
    ("/api/validate-yaml", _valid),
    ("/api/models/([^/]+/[^/]+)/branch/(.+)", _branch),
    ("/api/models/([^/]+/[^/]+)/preupload/(.+)", _preupload),
    ("/api/models/([^/]+/[^/]+)/commit/(.+)", _commit),
    ("/api/models/([^/]+/[^/]+)/revision/(.+)", _info),
    ("/api/models/([^/]+/[^/]+)", _info),
    ("/([^/]+/[^/]+)\\.git/info/lfs/objects/batch", _batch),
]
