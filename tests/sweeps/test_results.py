"""The figures of experiments, and those of the workspace beside them."""

import shutil
from pathlib import Path

import pytest

from quantline.config.compose import load_params
from quantline.sweeps import results
from quantline.sweeps.experiments import Outcome
from quantline.sweeps.plan import Plan
from quantline.sweeps.results import read_experiment, read_workspace
from tests.helpers.report import ARCH, write_measured
from tests.helpers.sweeps import small_plan

DONE = Outcome("gptq-bits2", rev="1" * 40)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def folder(project, tmp_path, monkeypatch) -> Path:
    """What an experiment left, as it comes out of DVC's cache."""
    write_measured("gptq-w4g128", 2.0, 0.25)
    for name in ("metrics", "artifacts/exports"):
        shutil.move(project.root / name, tmp_path / "left" / name)
    monkeypatch.setattr(results, "_copy_files", lambda rev, variants, folder: None)
    return tmp_path / "left"


def test_read_experiment_judges_its_figures_for_the_target(plan, folder):
    (result,) = read_experiment(plan, plan.points[0], DONE, folder, ARCH)
    assert (result.row.variant, result.variant) == ("gptq-bits2", "gptq-w4g128")
    assert (result.method, result.rev) == ("gptq", "1" * 40)
    assert result.choice == {"recipes.gptq.bits": "2"}
    assert result.row.metrics["mean_kld"] == 0.25
    assert result.row.gates[0]["verdict"] == "fails"
    assert result.to_json()["in_params"] == "gptq-w4g128"


@pytest.mark.parametrize(
    ("outcome", "failure"),
    [
        (Outcome("gptq-bits2", failure="killed", message="by signal 9"), "killed"),
        (
            Outcome("a", rev="1" * 40, failures={"gptq-w4g128": ("non_finite", "NaN")}),
            "non_finite",
        ),
    ],
)
def test_read_experiment_names_what_failed(plan, folder, outcome, failure):
    (result,) = read_experiment(plan, plan.points[0], outcome, folder, ARCH)
    assert (result.row.status, result.row.failure) == ("failed", failure)


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("metrics/gptq-w4g128.json", "missing_file"),
        ("metrics/items/gptq-w4g128.json", "artifact_changed"),
        ("artifacts/exports/gptq-w4g128/smoke.json", "missing_file"),
    ],
)
def test_read_experiment_shows_no_figures_that_are_not_whole(plan, folder, name, failure):
    (folder / name).unlink()
    (result,) = read_experiment(plan, plan.points[0], DONE, folder, ARCH)
    assert (result.row.status, result.row.failure) == ("failed", failure)
    assert not result.row.metrics


def test_read_workspace_leaves_out_what_belongs_to_another_model(project, plan):
    write_measured("gptq-w4g128", 2.0, 0.25)
    assert read_workspace(plan, load_params(), ARCH) == []  # on the tests' own tiny model
