"""Which experiments of a sweep there are, and that they ran with what was asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from quantline.errors import ConfigError
from quantline.sweeps import experiments
from quantline.sweeps.experiments import Finished, Outcome, keep_space, sweep_called
from quantline.sweeps.plan import Plan
from quantline.sweeps.space import read_space
from tests.helpers.sweeps import begin_git, git, small_plan

VARIANTS = ("gptq-w4g128",)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with a little of what experiments run."""
    for name in ("conf/config.yaml", "demo/model/config.json", "demo/data/a.txt", "dvc.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text(".quantline/\nignored*\n")
    begin_git(tmp_path)
    return tmp_path


def test_free_name_numbers_what_is_taken():
    assert experiments.free_name("a", ["b"]) == "a"
    assert experiments.free_name("a", ["a", "a-2"]) == "a-3"


def test_experiments_are_found_by_name_on_the_present_commit(root):
    head = git(root, "rev-parse", "HEAD").strip()
    git(root, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/gptq-bits3", head)
    assert experiments.names_taken(root) == {"gptq-bits3"}
    assert experiments.find_rev(root, "gptq-bits3") == head
    assert experiments.find_rev(root, "gptq-bits4") is None


def test_finished_experiments_need_not_run_again(root, plan):
    head = git(root, "rev-parse", "HEAD").strip()
    outcome = Outcome("gptq-bits2", rev=head, seconds=3.0)
    Finished("s", root).add(plan.points[0], VARIANTS, outcome)
    found = Finished("s", root)
    assert found.find(plan.points[0], VARIANTS) == outcome
    assert found.find(plan.points[1], VARIANTS) is None  # other parameters
    assert found.find(plan.points[0], ("gptq-w4g128", "rtn-w4g128")) is None
    assert Finished("t", root).find(plan.points[0], VARIANTS) is None


@pytest.mark.parametrize("change", ["code", "new file", "model", "commit is gone", "torn file"])
def test_experiments_run_again_after(change, root, plan):
    head = git(root, "rev-parse", "HEAD").strip()
    rev = "1" * 40 if change == "commit is gone" else head
    Finished("s", root).add(plan.points[0], VARIANTS, Outcome("gptq-bits2", rev=rev))
    if change == "code":
        (root / "dvc.yaml").write_text("other")
    elif change == "new file":
        (root / "conf/mine.yaml").write_text("other")
    elif change == "model":
        (root / "demo/model/weights").write_text("other")
    elif change == "torn file":
        (root / ".quantline/sweeps/s/experiments.json").write_text('{"a": ')
    assert Finished("s", root).find(plan.points[0], VARIANTS) is None


def test_untracked_sources_are_the_files_and_folders_that_a_copy_lacks(root):
    (root / "conf/mine.yaml").write_text("a")
    (root / "conf/suite").mkdir()
    (root / "conf/suite/mine.yaml").write_text("a")
    (root / "conf/ignored.yaml").write_text("a")
    (root / "notes.txt").write_text("a")
    assert experiments.untracked_sources(root) == ["conf/mine.yaml", "conf/suite"]


def test_an_experiment_on_another_model_than_was_asked_for_is_a_failure(root, plan):
    """As once, when DVC composed anew and a sweep went back to the repository's own model."""
    point = plan.points[0]
    values = experiments.expected_params(point, root)
    for model, failure in ((values["model"], None), ({"source": "hub"}, "config_stale")):
        (root / "params.yaml").write_text(yaml.safe_dump(values | {"model": model}))
        git(root, "add", "params.yaml")
        git(root, "commit", "--quiet", "-m", "an experiment")
        outcome = experiments.check_params(point, "HEAD", root)
        assert (outcome and outcome.failure) == failure
    assert outcome is not None and "in model" in outcome.message


def test_expected_params_find_the_users_files_from_a_copy(root, plan):
    (root / "ignored-model").mkdir()
    composed = plan.points[0].composed
    model = composed["model"] | {"path": "ignored-model", "watch": "ignored-model"}
    point = replace(plan.points[0], composed=composed | {"model": model})
    expected = experiments.expected_params(point, root)["model"]
    assert expected["path"] == expected["watch"] == str(root / "ignored-model")
    assert point.composed["model"]["path"] == "ignored-model"


def test_without_a_commit_there_are_no_experiments(tmp_path):
    with pytest.raises(ConfigError, match="git init"):
        experiments.check_git(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(ConfigError, match="git commit"):
        experiments.check_git(tmp_path)


def test_another_sweep_over_the_same_keys_has_a_name_of_its_own(tmp_path):
    first = read_space(["recipes.gptq.bits=3,4"])
    keep_space("gptq-bits", first, False, tmp_path)
    assert sweep_called("gptq-bits", first, False, tmp_path) == "gptq-bits"
    more = read_space(["recipes.gptq.bits=3,4,8"])
    assert sweep_called("gptq-bits", more, False, tmp_path) == "gptq-bits"
    assert sweep_called("gptq-bits", first, True, tmp_path) == "gptq-bits-2"
    other = read_space(["recipes.gptq.bits=3,4", "recipes.gptq.shrinkage=0.3"])
    assert sweep_called("gptq-bits", other, False, tmp_path) == "gptq-bits-2"
    keep_space("gptq-bits-2", other, False, tmp_path)
    assert sweep_called("gptq-bits", other, False, tmp_path) == "gptq-bits-2"
