"""Experiments side by side, with DVC's part played by a script."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from quantline.sweeps import run
from quantline.sweeps.experiments import Outcome, expected_params
from quantline.sweeps.plan import Plan, Point
from quantline.sweeps.run import Experiments, exp_run
from tests.helpers.sweeps import begin_git, git, small_plan

# What an experiment leaves: run events, and a commit under its name.
SCRIPT = """
import json, os, subprocess, sys, time
name, base, kind = sys.argv[1:]
def event(severity, reason, failure=None):
    payload = {"experiment": name, "instance": "gptq-w4g128"}
    payload |= {"failure": failure} if failure else {}
    line = {"stage": "check", "severity": severity, "summary": f"{kind} of {name}",
            "reason_code": reason, "payload": payload, "pid": os.getpid(), "time": time.time()}
    descriptor = os.open("events.jsonl", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, json.dumps(line).encode() + b"\\n")
time.sleep(0.1)  # in the workspace
if kind == "refused":
    sys.exit("ERROR: no such stage")
event("info", "stage_started")
if kind == "hangs":
    time.sleep(60)
time.sleep(0.1)
if kind == "fails":
    event("error", "export_quantization_failed", "unsupported_width")
    sys.exit(1)
event("info", "stage_finished")
subprocess.run(["git", "update-ref", f"{base}/{name}", f"refs/made/{name}"], check=True)
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan("recipes.gptq.bits=2,3,4", "recipes.gptq.group_size=32")


class Project:
    """A repository in which experiments are scripts, of which each does as it is told."""

    def __init__(self, root: Path, plan: Plan, monkeypatch) -> None:
        self.root = root
        self.plan = plan
        self.kinds: dict[str, str] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.commands: list[str] = []
        begin_git(root)
        head = git(root, "rev-parse", "HEAD").strip()
        self.base = f"refs/exps/{head[:2]}/{head[2:]}"
        for point in plan.points:
            self.add_commit(point, expected_params(point, root))
        git(root, "checkout", "--quiet", head)
        monkeypatch.setattr(run, "exp_run", self.command)
        monkeypatch.setattr(run, "POLL_S", 0.02)

    def add_commit(self, point: Point, params: dict) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))
        git(self.root, "add", "params.yaml")
        git(self.root, "commit", "--quiet", "-m", point.label)
        git(self.root, "update-ref", f"refs/made/{point.label}", "HEAD")

    def command(self, point: Point, experiment: str, variants, root: Path) -> list[str]:
        self.commands.append(experiment)
        kind = self.kinds.get(point.label, "done")
        return [sys.executable, "-c", SCRIPT, experiment, self.base, kind]

    def sweep(self, jobs: int) -> dict[str, Outcome]:
        points = iter(self.plan.points)
        self.outcomes.clear()

        def tell(point: Point, outcome: Outcome) -> None:
            self.outcomes[point.label] = outcome

        Experiments(self.plan, "s", self.root, jobs).run(lambda: next(points, None), tell)
        return self.outcomes

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.root / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def project(tmp_path, plan, monkeypatch) -> Project:
    (tmp_path / ".gitignore").write_text(".quantline/\nevents.jsonl\n")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, plan, monkeypatch)


LABELS = [f"gptq-bits{bits}" for bits in (2, 3, 4)]


def test_one_that_fails_takes_no_other_along_and_alone_runs_again(project):
    project.kinds[LABELS[1]] = "fails"
    outcomes = project.sweep(2)
    assert [outcomes[label].failure for label in LABELS] == [None, "unsupported_width", None]
    assert outcomes[LABELS[1]].message == f"fails of {LABELS[1]}"
    made = git(project.root, "rev-parse", f"refs/made/{LABELS[0]}").strip()
    assert outcomes[LABELS[0]].rev == made
    project.kinds.clear()
    project.commands.clear()
    outcomes = project.sweep(2)
    assert project.commands == [LABELS[1]]
    assert all(outcome.failure is None for outcome in outcomes.values())
    assert len(outcomes) == 3


def test_the_next_starts_when_the_one_before_has_left_the_workspace(project):
    project.sweep(2)
    times = {}
    for event in project.events():
        times.setdefault((event["payload"]["experiment"], event["reason_code"]), event["time"])
    first = times[LABELS[0], "stage_started"]
    second = times[LABELS[1], "stage_started"]
    assert second - first >= 0.1  # as long as an experiment is in the workspace
    assert times[LABELS[1], "stage_started"] < times[LABELS[2], "stage_started"]


def test_what_dvc_refuses_is_named_with_its_words(project):
    project.kinds[LABELS[2]] = "refused"
    outcome = project.sweep(1)[LABELS[2]]
    assert outcome.failure == "pipeline_refused"
    assert "no such stage" in outcome.message
    assert f".quantline/sweeps/s/logs/{LABELS[2]}.txt" in outcome.message


def test_an_experiment_that_ran_with_other_parameters_is_a_failure(project):
    point = project.plan.points[0]
    git(project.root, "checkout", "--quiet", f"refs/made/{LABELS[0]}")
    project.add_commit(point, expected_params(point, project.root) | {"suite": "full"})
    git(
        project.root,
        "checkout",
        "--quiet",
        project.base.removeprefix("refs/exps/").replace("/", ""),
    )
    outcomes = project.sweep(2)
    assert outcomes[LABELS[0]].failure == "config_stale"
    assert outcomes[LABELS[1]].failure is None


def test_nothing_goes_on_after_the_end(project, monkeypatch):
    project.kinds |= dict.fromkeys(LABELS, "hangs")
    began = time.monotonic()

    def follow(self, tell):
        self._read_events()
        if len(self._begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Experiments, "_follow", follow)
    with pytest.raises(KeyboardInterrupt):
        project.sweep(2)
    assert time.monotonic() - began < 30
    assert not [event["pid"] for event in project.events() if psutil.pid_exists(event["pid"])]


def test_an_experiment_is_not_killed_while_it_has_the_workspace(project, monkeypatch):
    """Uncommitted changes are in git's stash then, and it puts them back."""
    project.kinds |= dict.fromkeys(LABELS, "hangs")

    def follow(self, tell):
        if self._running:
            raise KeyboardInterrupt  # at once

    monkeypatch.setattr(Experiments, "_follow", follow)
    with pytest.raises(KeyboardInterrupt):
        project.sweep(1)
    assert [event["reason_code"] for event in project.events()] == ["stage_started"]


def test_of_one_calibration_the_first_computes_it(project, plan, monkeypatch):
    monkeypatch.setattr(Plan, "shares_calibration", False)
    project.sweep(2)
    events = [(event["payload"]["experiment"], event["reason_code"]) for event in project.events()]
    finished = events.index((LABELS[0], "stage_finished"))
    assert finished < events.index((LABELS[1], "stage_started"))


def test_exp_run_names_all_that_dvc_has_to_know(project, plan, monkeypatch):
    (project.root / "conf").mkdir()
    (project.root / "conf/mine.yaml").touch()
    command = exp_run(plan.points[0], "name", plan.variants, project.root)
    text = " ".join(command[1:])
    assert text.startswith("-m dvc --wait-for-lock exp run --temp --name name")
    assert "--set-param recipes.gptq-w4g128.bits=2" in text
    assert "--copy-paths conf" in text
    assert text.endswith("evaluate@gptq-w4g128")
    assert "--ignore-errors" not in text
    several = exp_run(plan.points[0], "name", ("bf16", "gptq-w4g128"), project.root)
    assert several[-3:] == ["--ignore-errors", "evaluate@bf16", "evaluate@gptq-w4g128"]
