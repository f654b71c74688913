"""A finished project on a tiny model, to publish from."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.project import Project
from tests.report.conftest import measured

__all__ = ["measured"]


@pytest.fixture
def project(measured, tmp_path, monkeypatch) -> Project:
    """A copy of it, as the working folder."""
    root = tmp_path / "project"
    shutil.copytree(measured, root)
    monkeypatch.chdir(root)
    return Project(root, Path("mine/model"), Path("mine/texts"))
