"""The digest of the code that a stage's result depends on."""

import shutil
import sys
from pathlib import Path

import pytest

from quantline.run import code_digest as module
from quantline.run.code_digest import ROOMS, code_digest
from tests.helpers.project import ROOT


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package, whose code a test may edit."""
    ignored = shutil.ignore_patterns("__pycache__")
    copy = Path(shutil.copytree(ROOT / "quantline", tmp_path / "quantline", ignore=ignored))
    monkeypatch.setattr(module, "PACKAGE", copy)
    return copy


def edit(path: Path) -> None:
    """Edit a file, or the first file of a folder."""
    file = path if path.is_file() else path / "__init__.py"
    file.write_text(file.read_text() + "\n# edited\n")


def is_part_of(path: Path, room: Path) -> bool:
    return path.is_relative_to(room) or room.is_relative_to(path)


@pytest.mark.parametrize("stage", ROOMS)
def test_code_digest_changes_with_each_room_of_the_stage_and_with_no_other(package, stage):
    digests = {code_digest(stage)}
    assert digests == {code_digest(stage)}
    rooms = [package / room for room in ROOMS[stage]]
    others = []
    for folder in package.iterdir():
        if folder.is_dir() and not any(is_part_of(folder, room) for room in rooms):
            others.append(folder)
    assert others
    for folder in others:
        edit(folder)
    assert {code_digest(stage)} == digests
    for room in rooms:
        edit(room)
        digests.add(code_digest(stage))
    assert len(digests) == 1 + len(rooms)


def test_code_digest_counts_the_file_of_a_plugins_method(tmp_path, monkeypatch):
    plugin = tmp_path / "plugin_of_the_test.py"
    plugin.write_text("class Method: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    without = code_digest("quantize")
    first = code_digest("quantize", "plugin_of_the_test:Method")
    edit(plugin)
    assert len({without, first, code_digest("quantize", "plugin_of_the_test:Method")}) == 3
    own = "quantline.methods.integer.gptq:Gptq"
    assert code_digest("quantize", own) == without
    assert "plugin_of_the_test" not in sys.modules
