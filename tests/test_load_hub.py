"""load from a Hub on the loopback: pinned to a commit, only what is needed, and refused before weights travel."""

import json
import shutil
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_model, tmp_path):
    """A server of one repository, you/tiny, with the branch main; `requests` lists the files that it gave out."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_model, folder)
    (folder / "extra.safetensors").write_bytes(b"not needed")
    given = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.split("?")[0]
            if path in (f"/api/models/you/tiny/revision/{name}" for name in ("main", COMMIT)):
                files = [{"rfilename": one.name} for one in sorted(folder.iterdir())]
                return self.send(json.dumps({"id": "you/tiny", "sha": COMMIT, "siblings": files}).encode(), body)
            if path.startswith(f"/api/models/you/tiny/tree/{COMMIT}"):
                tree = [{"type": "file", "path": one.name, "size": one.stat().st_size,
                         "oid": sha1(one.read_bytes()).hexdigest()} for one in sorted(folder.iterdir())]
                return self.send(json.dumps(tree).encode(), body)
            file = folder / path.removeprefix(f"/you/tiny/resolve/{COMMIT}/")
            if path.startswith(f"/you/tiny/resolve/{COMMIT}/") and file.is_file():
                if body:
                    given.append(file.name)
                return self.send(file.read_bytes(), body)
            return self.send(b"{}", body, 404, {"X-Error-Code": "RepoNotFound"})

        def send(self, content, body, status=200, headers=None):
            self.send_response(status)
            about = {"Content-Length": str(len(content)), "ETag": f'"{sha1(content).hexdigest()}"',
                     "X-Repo-Commit": COMMIT, "Content-Type": "application/json"}
            for name, value in (about | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.folder, server.given = folder, given
    server.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                          "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    yield server
    server.shutdown()
    server.server_close()


def from_hub(project, name="you/tiny", revision="main"):
    project.base = [one for one in project.base if not one.startswith("model")]
    project.compose("model=hub", f"model.id={name}", f"model.revision={revision}")


def test_load_pins_the_revision_and_fetches_only_what_it_needs(project, hub, tiny_model):
    from_hub(project)
    done = project.command("load", **hub.environment)
    assert done.returncode == 0, done.stderr
    made = project.root / "artifacts/model"
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "hub", "id": "you/tiny", "revision": COMMIT, "adapter": None}
    assert (made / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert not any(path.is_symlink() for path in made.iterdir())
    assert sorted(hub.given) == sorted(path.name for path in tiny_model.iterdir())

    offline = project.command("load", **hub.environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1 and "network_unavailable" in offline.stderr  # a branch is not a commit
    from_hub(project, revision=COMMIT)
    again = project.command("load", **hub.environment | {"HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0, again.stderr


def test_custom_code_is_refused_before_weights_are_fetched(project, hub):
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "a.B"}}))
    from_hub(project)
    done = project.command("load", **hub.environment)
    assert done.returncode == 1 and "load_rejected (custom_code)" in done.stderr
    assert "model.safetensors" not in hub.given and not (project.root / "artifacts/model").exists()


def test_a_repository_with_pickles_alone_is_refused_before_they_are_fetched(project, hub):
    for path in hub.folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    from_hub(project)
    done = project.command("load", **hub.environment)
    assert done.returncode == 1 and "load_rejected (unsafe_checkpoint)" in done.stderr
    assert not [name for name in hub.given if name.endswith(".bin")]


def test_an_unknown_repository_and_an_absent_hub_have_their_own_names(project, hub):
    from_hub(project, name="you/other")
    done = project.command("load", **hub.environment)
    assert done.returncode == 1 and "load_rejected (missing_file)" in done.stderr and "you/other" in done.stderr
    from_hub(project)
    done = project.command("load", **hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 1 and "load_rejected (network_unavailable)" in done.stderr
    assert project.events()[-1]["payload"]["failure"] == "network_unavailable"
