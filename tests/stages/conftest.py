"""Projects in which the stages before the one under test have run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantline.paths import MODEL, QUANTIZED
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


@pytest.fixture(scope="session")
def quantized_artifacts(tmp_path_factory) -> Path:
    """What the first test that needs a recipe's result made, recipe by recipe."""
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture
def quantize_once(calibrated_project, quantized_artifacts) -> Callable[[str], None]:
    """quantize_once(name) quantizes, or brings what an earlier test made in a project like this."""

    def run(name: str) -> None:
        made = quantized_artifacts / name
        if made.exists():
            shutil.copytree(made, QUANTIZED / name)
        else:
            calibrated_project.stage("quantize", name)
            shutil.copytree(QUANTIZED / name, made)

    return run
