"""A project in which no stage has run."""

from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose
from tests.helpers.project import begin_project


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project without a model: conf/, dvc.yaml and params.yaml of the quick suite."""
    root = begin_project(tmp_path / "project")
    monkeypatch.chdir(root)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (root / "params.yaml").write_text(as_yaml(compose(["suite=quick"])))
    return root
