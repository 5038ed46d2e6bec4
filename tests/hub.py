"""A hub of one's own: the part of the Hugging Face hub's HTTP interface that downloading a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves folders as repositories.

    Attributes:
        endpoint: For ``HF_ENDPOINT``.
        asked: The paths that were asked for.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
                hub.asked.append(self.path)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="hub")
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Hub]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        parts = handler.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api(handler, "/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(handler, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            _send(handler, 404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _api(self, handler: Any, name: str, rest: list[str], body: bool) -> None:
        folder = self.repositories.get(name)
        if folder is None:
            _send(handler, 404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            return
        if len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
            _send(handler, 404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            answer: Any = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _etag(f)}
                for f in files
            ]
        else:
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        _send(handler, 200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

    def _file(self, handler: Any, name: str, revision: str, path: str, body: bool) -> None:
        folder = self.repositories.get(name)
        code = "RepoNotFound" if folder is None else "EntryNotFound"
        if folder is not None and revision not in ("main", "v1", COMMIT):
            code = "RevisionNotFound"
        file = None if folder is None or code == "RevisionNotFound" else folder / path
        if file is None or not file.is_file():
            _send(handler, 404, b"", body, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        _send(handler, 200, content, body, headers)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


def _send(handler: Any, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if body:
        handler.wfile.write(content)
