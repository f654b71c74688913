"""A project in which no stage has run."""

from pathlib import Path

import pytest

from tests.helpers.project import Conf, begin_project, composed


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project without a model: conf/, dvc.yaml and params.yaml of the quick suite."""
    root = begin_project(tmp_path / "project")
    monkeypatch.chdir(root)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (root / "params.yaml").write_text(composed(Conf(root), ("suite=quick",)))
    return root
