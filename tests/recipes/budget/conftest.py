"""A project that is calibrated once for all tests of budgets."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.budget import compose
from tests.helpers.models import place_model
from tests.helpers.project import Project


@pytest.fixture(scope="session")
def calibrated_artifacts(tmp_path_factory) -> Path:
    """artifacts/ with the model and a calibration, from the first test that uses `ready`."""
    return tmp_path_factory.mktemp("calibrated") / "artifacts"


@pytest.fixture
def ready(project, calibrated_artifacts, tiny_model) -> Project:
    """The project with everything before quantize done."""
    compose(project)
    artifacts = project.root / "artifacts"
    if calibrated_artifacts.exists():
        shutil.copytree(calibrated_artifacts, artifacts)
    else:
        place_model(tiny_model, artifacts / "model")
        project.stage("calibrate")
        shutil.copytree(artifacts, calibrated_artifacts)
    return project
