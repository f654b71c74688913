"""Projects in which the stages before the one under test have run."""

import shutil
from pathlib import Path

import pytest

from quantline.paths import MODEL
from tests.helpers.models import place_model
from tests.helpers.project import Project
from tests.helpers.recipes import CHOOSE_RECIPES


@pytest.fixture(scope="session")
def calibrated_artifacts(tmp_path_factory) -> Path:
    """artifacts/ with the model and a calibration, made by the first test that needs it."""
    return tmp_path_factory.mktemp("calibrated") / "artifacts"


@pytest.fixture
def calibrated_project(project, calibrated_artifacts, tiny_model) -> Project:
    """The project with everything before quantize done."""
    project.compose(CHOOSE_RECIPES)
    if calibrated_artifacts.exists():
        shutil.copytree(calibrated_artifacts, "artifacts")
    else:
        place_model(tiny_model, MODEL)
        project.stage("calibrate")
        shutil.copytree("artifacts", calibrated_artifacts)
    return project
