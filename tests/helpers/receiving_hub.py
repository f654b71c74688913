"""A Hub on the loopback that takes uploads: what is sent becomes files of a folder."""

import base64
import json
from typing import Any

from huggingface_hub import ModelCard

from tests.helpers.hub import COMMIT, NAME, Handler

TOKEN = "hf_" + "a" * 24
LARGE = (".gguf", ".safetensors")


class ReceivingHandler(Handler):
    """Takes one repository, NAME, from whoever has TOKEN."""

    uploads: dict[str, bytes]  # of the class: sha256 → content
    messages: list[str]  # of the class: those of the commits

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(b'{"error": "who are you"}', True, 401)
        elif path == "/api/repos/create":
            address = f"{self.server.environment['HF_ENDPOINT']}/{NAME}"
            self._send_json({"url": address, "name": NAME, "id": "1"}, True)
        elif path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            self._send_json({"errors": [], "warnings": []}, True)
        elif path == f"/api/models/{NAME}/preupload/main":
            self._send_json({"files": [_mode(file) for file in json.loads(body)["files"]]}, True)
        elif path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = [self._place(entry) for entry in json.loads(body)["objects"]]
            self._send_json({"transfer": "basic", "objects": objects}, True)
        elif path == f"/api/models/{NAME}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
            address = f"{self.server.environment['HF_ENDPOINT']}/{NAME}/commit/{COMMIT}"
            self._send_json({"commitUrl": address, "commitOid": COMMIT}, True)
        else:
            self._send(b"{}", True, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.uploads[self.path.removeprefix("/lfs/")] = content
        self._send(b"", True)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _place(self, entry: dict[str, Any]) -> dict[str, Any]:
        address = f"{self.server.environment['HF_ENDPOINT']}/lfs/{entry['oid']}"
        return entry | {"actions": {"upload": {"href": address}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
                continue
            path = self.server.folder / value["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                path.write_bytes(self.uploads[value["oid"]])
            else:
                path.write_bytes(base64.b64decode(value["content"]))


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    """Return how a file is to be uploaded, as the Hub says it."""
    large = file["path"].endswith(LARGE)
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


def receiving_handler() -> type[ReceivingHandler]:
    """Return a handler with a memory of its own."""
    return type("OwnHandler", (ReceivingHandler,), {"uploads": {}, "messages": []})
