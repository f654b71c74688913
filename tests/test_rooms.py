"""Stages are thin, and what a stage's result depends on is what DVC and the resume keys watch."""

import pytest
import yaml

from quantline.run.code_digest import ROOMS
from tests.helpers.imports import closure
from tests.helpers.project import ROOT

# What frames every stage. Parameters are compared by value, and files by their content.
FRAME = (
    "causes",
    "config",
    "durable",
    "errors",
    "executor",
    "files",
    "folders",
    "freed_memory",
    "links",
    "messages",
    "paths",
    "registry",
    "run",
    "torch_import",
    "tracking",
)
MOST_LINES = 60
SCRIPTS = sorted(path for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")


def room_of(module: str, stage: str) -> str | None:
    """Return the room of a stage that holds a module."""
    path = "/".join(module.split(".")[1:])
    for room in ROOMS[stage]:
        if path == room.removesuffix(".py") or path.startswith(f"{room}/"):
            return room
    return None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_stage_scripts_are_thin(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("stage", ROOMS)
def test_rooms_hold_all_code_that_a_stage_reaches(stage):
    used = set()
    for module in closure(f"stages.{stage}"):
        top, _, rest = module.partition(".")
        if top == "stages" or not rest or rest.split(".")[0] in FRAME:
            continue
        path = rest.replace(".", "/")
        if any(room.startswith(f"{path}/") for room in ROOMS[stage]):
            continue  # a package, of which the stage needs a part
        room = room_of(module, stage)
        assert room, f"{stage} reaches {module}, which is in none of {ROOMS[stage]}"
        used.add(room)
    assert used == set(ROOMS[stage])  # none of them is there for nothing


@pytest.mark.parametrize("stage", ROOMS)
def test_dvc_depends_on_the_same_rooms(stage):
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    deps = definition.get("do", definition)["deps"]
    code = {dep for dep in deps if dep.startswith(("quantline/", "stages/"))}
    scripts = {f"stages/{stage}.py"}
    for module in closure(f"stages.{stage}"):
        if module.startswith("stages."):
            scripts.add(module.replace(".", "/") + ".py")
    assert code == scripts | {f"quantline/{room}" for room in ROOMS[stage]}


def test_closure_follows_names_registries_and_functions_named_by_strings():
    reached = closure("stages.export")
    assert "quantline.runtimes.smoke.smoke_test" in reached  # named by a string
    assert "quantline.formats.gguf.container" in reached  # loaded by name
    assert "quantline.formats.safetensors.layouts.gptq" in reached
    assert "quantline.methods.integer.gptq" in closure("stages.quantize")
    assert "quantline.report.page" not in reached
