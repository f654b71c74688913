"""`quantline repro --jobs`: which stages run side by side, with DVC's part played by a stand-in."""

from pathlib import Path

import pytest

from quantline.cli import repro, side_by_side
from quantline.cli.side_by_side import SideBySide, Task, changed_stages, tasks_of
from quantline.config.compose import compose
from quantline.config.validation import validate
from quantline.run.project_lock import FOLDER
from tests.helpers.project import ROOT

# Notes in a folder when it begins and ends, and does what the stage's name says.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
refusals, arguments = Path(sys.argv[1]), sys.argv[2:]
if "status" in arguments:
    print(json.dumps({"export@b": []}))
    sys.exit(os.path.exists("broken"))
stage = arguments[-1]
log = Path("log")
log.mkdir(exist_ok=True)
(log / f"{time.monotonic_ns()} begin {stage}").touch()
print(f"{stage}: " + "x" * 100_000)
print(f"{stage} complains", file=sys.stderr)
time.sleep(0.2)
(log / f"{time.monotonic_ns()} end {stage}").touch()
refusals.write_text(json.dumps([[None, "it is locked"]] if "refused" in stage else []))
print(f"{stage}: no line's end", end="")
sys.exit("fails" in stage or "refused" in stage)
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder in which the stand-in is DVC."""
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(side_by_side, "PROGRAM", "stand_in")
    FOLDER.mkdir()
    return tmp_path


def moments() -> list[tuple[str, str]]:
    """Return what began and ended, in order."""
    names = sorted((path.name for path in Path("log").iterdir()), key=lambda n: int(n.split()[0]))
    return [(name.split()[1], name.split()[2]) for name in names]


def most_at_once() -> int:
    """Return how many stages ran at once at most."""
    running = most = 0
    for moment, _ in moments():
        running += 1 if moment == "begin" else -1
        most = max(most, running)
    return most


def run(tasks: list[Task], jobs: int, memory: float = 1e9) -> SideBySide:
    beside = SideBySide(tasks, jobs, memory)
    beside.run()
    return beside


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_stages_run_at_once_as_may(project, jobs):
    run([Task(f"quantize@{name}", None, 1.0) for name in "abcd"], jobs)
    assert most_at_once() == jobs
    assert {stage for _, stage in moments()} == {f"quantize@{name}" for name in "abcd"}


def test_an_export_waits_for_its_recipe(project):
    run([Task("quantize@a", None, 1.0), Task("export@a", "quantize@a", 1.0)], 2)
    stages = [stage for moment, stage in moments() if moment == "begin"]
    assert stages == ["quantize@a", "export@a"]
    assert most_at_once() == 1


def test_stages_that_do_not_fit_into_memory_run_alone(project):
    tasks = [Task("quantize@a", None, 3.0), Task("quantize@b", None, 3.0)]
    run([*tasks, Task("quantize@huge", None, 99.0)], 3, memory=5.0)
    assert most_at_once() == 1
    assert len(moments()) == 6


def test_what_needs_a_stage_that_failed_does_not_run(project):
    tasks = [Task("quantize@fails", None, 1.0), Task("export@x", "quantize@fails", 1.0)]
    beside = run([*tasks, Task("quantize@a", None, 1.0), Task("export@a", "quantize@a", 1.0)], 2)
    assert beside.failed == {"quantize@fails", "export@x"}
    assert beside.refused == []
    assert {stage for _, stage in moments()} == {"quantize@fails", "quantize@a", "export@a"}


def test_what_dvc_refuses_is_told(project, capsys):
    beside = run([Task("quantize@refused", None, 1.0)], 2)
    assert beside.failed == {"quantize@refused"}
    (sentence,) = beside.refused
    assert "it is locked" in sentence
    assert "it is locked" in capsys.readouterr().err


def test_lines_come_whole_and_to_where_they_belong(project, capsys):
    run([Task("quantize@a", None, 1.0), Task("quantize@b", None, 1.0)], 2)
    said = capsys.readouterr()
    for name in "ab":
        assert f"quantize@{name}: {'x' * 1000}" in said.out
        assert f"quantize@{name}: no line's end" in said.out.splitlines()
        assert f"quantize@{name} complains" in said.err.splitlines()
    assert len(said.out.splitlines()) == 4


def test_changed_stages_are_those_that_dvc_names(project):
    assert changed_stages(["export@a", "export@b"]) == {"export@b"}
    Path("broken").touch()
    assert changed_stages(["export@a", "export@b"]) == {"export@a", "export@b"}


def test_an_export_runs_where_it_or_its_recipe_changed():
    params = validate(compose(["suite=quick"], root=ROOT))
    recipe, *others = params.recipes
    of_recipe = [f"export@{n}" for n, v in params.variants.items() if v.recipe == recipe]
    other = next(f"export@{n}" for n, v in params.variants.items() if v.recipe == others[0])
    memory = {f"quantize {recipe}": 5.0}
    found = {task.stage: task for task in tasks_of(params, {f"quantize@{recipe}", other}, memory)}
    assert set(found) == {f"quantize@{recipe}", *of_recipe, other}
    assert found[f"quantize@{recipe}"].memory == 5.0
    assert {found[stage].after for stage in of_recipe} == {f"quantize@{recipe}"}
    assert found[other].after is None
    assert tasks_of(params, set(), memory) == []


def test_only_variants_whose_export_is_there_are_evaluated_after_a_failure(monkeypatch):
    params = validate(compose(["suite=quick"], root=ROOT))
    failed, *rest = params.variants
    beside = SideBySide([], 2, 1.0)
    beside.failed = {f"export@{failed}"}
    beside.refused = ["that"]
    calls = []

    def run_dvc(*arguments: str) -> tuple[int, list[str]]:
        calls.append(arguments)
        return 0, []

    monkeypatch.setattr(repro, "run_dvc", run_dvc)
    monkeypatch.setattr(repro, "run_side_by_side", lambda *_: beside)
    assert repro._run_side_by_side(params, 2, None) == (1, ["that"])
    targets = [f"evaluate@{name}" for name in rest]
    assert calls == [("repro", *side_by_side.SHARED), ("repro", "--keep-going", *targets)]
