"""A project for commands that need no model."""

from pathlib import Path

import pytest

from tests.helpers.command_line import write_empty_project


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project whose inputs are there, empty."""
    write_empty_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
