"""`quantline sweep`, up to where experiments would run."""

import json
from pathlib import Path

import pytest

from quantline.cli import sweep
from quantline.sweeps.experiments import Outcome
from quantline.sweeps.run import Experiments
from tests.helpers.command_line import quantline
from tests.helpers.sweeps import begin_git

GRID = ["suite=quick", "target=any", "recipes.gptq.bits=3,4"]


@pytest.fixture
def repository(folder) -> Path:
    (folder / ".gitignore").write_text(".quantline/\nevents.jsonl\nreports/\n")
    begin_git(folder)
    return folder


def test_dry_run_says_which_experiments_and_changes_nothing(repository):
    done = quantline("sweep", *GRID, "--dry-run")
    assert done.exit_code == 0, done.output
    for words in ("2 experiments", "measures gptq-w4g128", "gptq-bits3", "gptq-bits4"):
        assert words in done.output
    assert not Path("params.yaml").exists()


def test_dry_run_over_suites_does_not_promise_what_one_of_them_lacks(repository):
    done = quantline("sweep", "suite=quick,narrow", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "each measures what its suite has of" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes.gptq.bits=3"], "several values"),
        (["recipes.gptq.bits=3,400"], "experiment gptq-bits400"),
        ([*GRID, "--name", "../x"], "expected a name"),
        ([*GRID, "--minimize", "mean_kld"], "--optuna"),
    ],
)
def test_a_wrong_sweep_changes_nothing(repository, arguments, words):
    done = quantline("sweep", *arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert "config_invalid" in done.output
    assert not Path("params.yaml").exists()


def test_a_sweep_does_not_leave_the_projects_model_unasked(repository):
    """`dvc exp run` starts from conf/: a model that conf/ does not name has to be named again."""
    Path("mine").mkdir()
    assert quantline("compose", "model=local", "model.path=mine", "suite=quick").exit_code == 0
    done = quantline("sweep", *GRID)
    assert done.exit_code == 1
    assert "model.source: 'local' -> 'demo'" in done.output


def test_a_sweep_without_git_says_what_to_do(folder):
    done = quantline("sweep", *GRID)
    assert done.exit_code == 1
    assert "git init" in done.output


def test_nothing_is_started_where_what_all_share_fails(repository, monkeypatch):
    calls = []

    def dvc(*arguments: str) -> tuple[int, list[str]]:
        calls.append(arguments)
        return 1, []

    monkeypatch.setattr(sweep, "run_dvc", dvc)
    done = quantline("sweep", *GRID)
    assert done.exit_code == 1
    assert calls == [("repro", "answer", "reference")]
    assert "none was started" in done.output


def test_a_sweep_with_failures_has_a_page_and_ends_with_1(repository, monkeypatch):
    monkeypatch.setattr(sweep, "run_dvc", lambda *arguments: (0, []))

    def run(self, ask, tell) -> None:
        while (point := ask()) is not None:
            tell(point, Outcome(point.label, failure="out_of_memory", message="no room"))

    monkeypatch.setattr(Experiments, "run", run)
    monkeypatch.setattr("quantline.sweeps.sweep.log_sweep", lambda *arguments: None)
    done = quantline("sweep", *GRID, "--name", "mine")
    assert done.exit_code == 1
    assert "gptq-bits3: out_of_memory: no room" in done.output
    page = Path("reports/sweeps/mine.html").read_text()
    assert "Nothing meets the target any" in page
    report = json.loads(Path("reports/sweeps/mine.json").read_text())
    assert (
        report["command"]
        == "quantline sweep suite=quick target=any recipes.gptq.bits=3,4 --name mine"
    )
    assert [row["failure"] for row in report["variants"]] == ["out_of_memory"] * 2
