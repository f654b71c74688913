"""Files come from a folder or from a Hub: pinned, only what is needed, refused before weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantline.config.params import Model
from quantline.errors import Failure, StageError
from quantline.ingest.fetch import bring, fetch, weight_files
from quantline.model.checkpoint_files import INDEX
from tests.helpers.hub import COMMIT, NAME, Hub, serve_hub
from tests.helpers.project import ROOT, Project
from tests.helpers.tensor_files import edit_json

MODEL = Path("artifacts/model")


@pytest.fixture
def hub(tiny_model, tmp_path):
    """A Hub that has the tiny model, with a file that nothing needs."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "repository"))
    (folder / "extra.safetensors").write_bytes(b"not needed")
    with serve_hub(folder, tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def from_hub(project):
    """from_hub(name, revision): the project, whose model is that of the Hub."""

    def compose(name: str = NAME, revision: str = "main") -> Project:
        project.base = [override for override in project.base if not override.startswith("model")]
        project.compose("model=hub", f"model.id={name}", f"model.revision={revision}")
        return project

    return compose


def load(project: Project, hub: Hub, **environment: str):
    return project.command("load", **hub.environment | environment)


def fetch_in_a_process(project: Project, hub: Hub, **environment: str) -> str:
    """Fetch the model of params.yaml in a fresh process; return the failure, if there is one."""
    code = """
from quantline.config.compose import load_params
from quantline.errors import StageError
from quantline.ingest.fetch import fetch

try:
    fetch(load_params().model)
except StageError as error:
    print(error.failure)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=project.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | hub.environment | environment,
    )
    return done.stdout.strip()


def test_fetch_pins_the_revision_and_downloads_only_what_it_needs(from_hub, hub, tiny_model):
    named = hub.folder / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("tools")
    (named / "notes.txt").write_text("not needed")
    project = from_hub()
    done = load(project, hub)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "hub", "id": NAME, "revision": COMMIT, "adapter": None}
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert (MODEL / "model.safetensors").read_bytes() == weights
    assert not any(path.is_symlink() for path in MODEL.iterdir())
    needed = [path.name for path in tiny_model.iterdir()]
    assert sorted(hub.downloads) == sorted([*needed, "tool_use.jinja"])
    assert (MODEL / "additional_chat_templates/tool_use.jinja").read_text() == "tools"


@pytest.mark.slow
def test_fetch_without_the_hub_knows_commits_alone(from_hub, hub):
    assert not fetch_in_a_process(from_hub(), hub)
    failure = fetch_in_a_process(from_hub(), hub, HF_HUB_OFFLINE="1")
    assert failure == Failure.NETWORK_UNAVAILABLE  # a branch is not a commit
    assert not fetch_in_a_process(from_hub(revision=COMMIT), hub, HF_HUB_OFFLINE="1")


def test_fetch_refuses_custom_code_before_weights_are_downloaded(from_hub, hub):
    edit_json(hub.folder / "config.json", auto_map={"AutoModelForCausalLM": "a.B"})
    done = load(from_hub(), hub)
    assert done.returncode == 1
    assert "load_rejected (custom_code)" in done.stderr
    assert hub.downloads
    assert "model.safetensors" not in hub.downloads
    assert not MODEL.exists()


@pytest.mark.slow
def test_fetch_refuses_pickles_before_they_are_downloaded(from_hub, hub):
    for path in hub.folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    done = load(from_hub(), hub)
    assert done.returncode == 1
    assert "load_rejected (unsafe_checkpoint)" in done.stderr
    assert hub.downloads
    assert not [name for name in hub.downloads if name.endswith(".bin")]


@pytest.mark.slow
def test_fetch_tells_an_unknown_repository_from_an_absent_hub(from_hub, hub):
    done = load(from_hub("you/other"), hub)
    assert done.returncode == 1
    assert "load_rejected (missing_file)" in done.stderr
    assert "you/other" in done.stderr
    project = from_hub()
    done = load(project, hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "load_rejected (network_unavailable)" in done.stderr
    assert project.events()[-1]["payload"]["failure"] == "network_unavailable"


def local(path: Path) -> Model:
    return Model(source="local", path=str(path), watch=str(path))


def test_fetch_takes_a_folder_as_it_is(tiny_model):
    folder, source = fetch(local(tiny_model))
    assert folder == tiny_model
    assert source == {"kind": "local", "path": str(tiny_model), "revision": None}


def test_fetch_asks_for_the_folder_of_a_file(tiny_model):
    with pytest.raises(StageError, match="found a file, not the folder that it lies in"):
        fetch(local(tiny_model / "model.safetensors"))


@pytest.mark.parametrize(("made", "found"), [(False, "no folder"), (True, "none in it")])
def test_fetch_says_what_is_missing_of_a_folder(tmp_path, made, found):
    folder = tmp_path / "model"
    if made:
        folder.mkdir()
    with pytest.raises(StageError, match=rf"with config\.json at .*, found {found}") as error:
        fetch(local(folder))
    assert error.value.failure == Failure.MISSING_FILE


def test_bring_copies_what_the_links_of_a_cache_snapshot_lead_to(project, tiny_model, tmp_path):
    """Inside huggingface_hub's cache a link may lead from snapshots/ to blobs/."""
    blobs = tmp_path / "models--a--b/blobs"
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    project.compose(f"model.path={snapshot}")
    project.stage("load")
    loaded = list(MODEL.iterdir())
    made = {"manifest.json", "lineage.json", "configuration.json", "special_tokens.json"}
    assert {path.name for path in loaded} == {path.name for path in tiny_model.iterdir()} | made
    assert not any(path.is_symlink() for path in loaded)


def test_bring_names_files_and_how_weights_are_linked(tiny_model, tmp_path):
    names, linked_by = bring(tiny_model, tmp_path)
    assert names == sorted(path.name for path in tiny_model.iterdir())
    assert linked_by in ("reflink", "hard link", "copy")
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny_model / name).read_bytes()


def test_weight_files_of_an_index_stay_inside_the_folder(tmp_path):
    assert weight_files(tmp_path) == ["model.safetensors"]
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert weight_files(tmp_path) == ["1.safetensors", "2.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../1.safetensors"}}))
    with pytest.raises(StageError) as error:
        weight_files(tmp_path)
    assert error.value.failure == Failure.PATH_ESCAPE
