"""A sweep in MLflow: a run for it, and one below it for each experiment."""

import shutil

import pytest

from quantline.config.compose import load_params
from quantline.sweeps.experiments import Outcome
from quantline.sweeps.tracked import PARENT, log_sweep
from quantline.tracking.undelivered import kept
from tests.helpers.sweeps import grid_report, small_plan

OUTCOMES = [
    Outcome("gptq-bits4-group_size32", rev="1" * 40),
    Outcome("gptq-bits3-group_size32", rev="2" * 40),
    Outcome("gptq-bits3-group_size128", rev="3" * 40),
    Outcome("gptq-bits4-group_size128", failure="unsupported_width", message="too narrow"),
]


@pytest.fixture(scope="module")
def plan():
    return small_plan("recipes.gptq.bits=3,4", "recipes.gptq.group_size=32,128")


def log(plan, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("page")
    return log_sweep(load_params().tracking, plan, grid_report(), OUTCOMES, [page], 1e9)


def test_log_sweep_puts_its_experiments_below_it_and_logs_nothing_twice(project, plan, tmp_path):
    from mlflow.tracking import MlflowClient

    for _ in range(2):
        assert log(plan, tmp_path) is None
    client = MlflowClient(tracking_uri=f"sqlite:///{project.root}/mlflow.db")
    experiment = client.get_experiment_by_name(load_params().tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["stage"] == "sweep"]
    children = {run.info.run_name: run for run in runs if run.data.tags["stage"] == "experiment"}
    assert (len(parents), len(runs)) == (1, 5)
    assert {run.data.tags[PARENT] for run in children.values()} == {parents[0].info.run_id}
    assert parents[0].data.metrics == {"experiments": 4.0, "failed": 1.0}
    assert [file.path for file in client.list_artifacts(parents[0].info.run_id)] == ["page.html"]
    made = children["gptq-bits3-group_size32"].data
    assert made.params == {"recipes.gptq.bits": "3", "recipes.gptq.group_size": "32"}
    assert made.metrics["mean_kld"] == 0.03
    failed = children["gptq-bits4-group_size128"]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "unsupported_width"


def test_log_sweep_keeps_what_mlflow_does_not_take(project, plan, tmp_path):
    (project.root / "mlflow.db").write_text("no database")
    shutil.rmtree(project.root / ".quantline", ignore_errors=True)
    assert log(plan, tmp_path) is not None
    assert [run.name for _, run in kept()][:1] == ["gptq-bits-group_size"]
    assert len(list(kept())) == 5
