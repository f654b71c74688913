"""A Hub of one repository on the loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAME = "you/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(content: bytes) -> str:
    """Return the name that git gives a content; here any digest will do."""
    return sha1(content, usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves the repository NAME, with the branch main at COMMIT.

    Attributes:
        folder: The repository's files; a test may change them.
        downloads: Names of the files whose content was sent, in order.
        environment: What a process needs to take this server for the Hub.
    """

    daemon_threads = True

    def __init__(self, folder: Path, home: Path, handler: "type[Handler] | None" = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.folder = folder
        self.downloads: list[str] = []
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            # Some packages set it for their own process, and it goes before HF_HOME.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self) -> list[Path]:
        """Return the repository's files."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def describe(self, file: Path) -> dict[str, Any]:
        """Return a file's entry in the repository's tree."""
        content = file.read_bytes()
        name = file.relative_to(self.folder).as_posix()
        return {"type": "file", "path": name, "size": len(content), "oid": digest(content)}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        if path in (f"/api/models/{NAME}/revision/{revision}" for revision in ("main", COMMIT)):
            names = [file.relative_to(hub.folder).as_posix() for file in hub.files()]
            siblings = [{"rfilename": name} for name in names]
            self._send_json({"id": NAME, "sha": COMMIT, "siblings": siblings}, with_body)
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self._send_json([hub.describe(file) for file in hub.files()], with_body)
        else:
            path = path.replace("/resolve/main/", f"/resolve/{COMMIT}/")
            prefix = f"/{NAME}/resolve/{COMMIT}/"
            file = hub.folder / path.removeprefix(prefix)
            if not (path.startswith(prefix) and file.is_file()):
                self._send(b"{}", with_body, 404, {"X-Error-Code": "RepoNotFound"})
                return
            if with_body:
                hub.downloads.append(file.name)
            self._send(file.read_bytes(), with_body)

    def _send_json(self, value: Any, with_body: bool) -> None:
        self._send(json.dumps(value).encode(), with_body)

    def _send(
        self, content: bytes, with_body: bool, status: int = 200, more: dict[str, str] | None = None
    ) -> None:
        headers = {
            "Content-Length": str(len(content)),
            "ETag": f'"{digest(content)}"',
            "X-Repo-Commit": COMMIT,
            "Content-Type": "application/json",
        }
        self.send_response(status)
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve_hub(folder: Path, home: Path, handler: type[Handler] | None = None) -> Iterator[Hub]:
    """Serve a folder as the repository NAME; `home` is the client's cache."""
    hub = Hub(folder, home, handler)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()
