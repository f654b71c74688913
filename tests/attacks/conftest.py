"""What no hostile input may do: run code, write outside, or bring a private file along."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.attacks import tree

PRIVATE = "the content of a private file"


@pytest.fixture(autouse=True)
def guarded(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a private file, and the place of a mark that hostile code would leave."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.txt").write_text(PRIVATE)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    before = tree(outside)
    yield outside
    assert tree(outside) == before, "a file outside was changed"
    assert not (tmp_path / "mark").exists(), "code of the input was run"


@pytest.fixture
def checkpoint(tiny_narrow, tmp_path) -> Path:
    """A copy of a checkpoint, to be made hostile."""
    return Path(shutil.copytree(tiny_narrow, tmp_path / "model"))
