"""Running a sweep's experiments side by side, each as a `dvc exp run --temp` of its own.

DVC takes an experiment's changes out of the workspace when it starts, so starts follow one after
the other; the next one waits for the first run event of the one before. All of them end with this
process.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.overrides import for_hydra
from quantline.errors import Failure
from quantline.messages import plain, say, shortened
from quantline.paths import EVENTS
from quantline.run.events import read_events
from quantline.run.leash import leashed
from quantline.run.process_tree import end_tree
from quantline.sweeps.experiments import (
    SWEEPS,
    Finished,
    Outcome,
    check_params,
    find_rev,
    free_name,
    names_taken,
    untracked_sources,
)
from quantline.sweeps.plan import Plan, Point

POLL_S = 0.25
LEAVE_S = 120.0  # that an experiment has to leave the workspace
LOGS = "logs"
Ask = Callable[[], Point | None]
Tell = Callable[[Point, Outcome], None]


class Job(NamedTuple):
    """An experiment that runs."""

    point: Point
    experiment: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started: float


class Experiments:
    """Runs experiments, at most so many at a time."""

    def __init__(self, plan: Plan, sweep: str, root: Path, jobs: int) -> None:
        """Look which have run before.

        Args:
            plan: Of the sweep.
            sweep: Its name.
            root: The project's.
            jobs: How many run at a time.
        """
        self._plan = plan
        self._root = root
        self._jobs = jobs
        self._finished = Finished(sweep, root)
        self._logs = root / SWEEPS / sweep / LOGS
        self._taken = names_taken(root)
        self._running: list[Job] = []
        self._events = root / EVENTS
        self._seen = len(read_events(self._events))
        self._size = 0  # of the file when it was read last
        self._begun: set[str] = set()  # experiments that have left the workspace
        self._errors: dict[str, list[dict[str, Any]]] = {}
        self._calibrated: set[str] = set()

    def run(self, ask: Ask, tell: Tell) -> None:
        """Run what is asked for.

        Args:
            ask: Returns the next experiment; None if there is none now.
            tell: Is told each outcome, as soon as it is known.
        """
        if self._plan.shares_calibration:
            self._calibrated.update(point.calibration_key for point in self._plan.points)
        waiting: Point | None = None
        try:
            while True:
                self._follow(tell)
                if waiting is None and len(self._running) < self._jobs:
                    waiting = ask()
                if waiting is None and not self._running:
                    return
                if waiting is not None and self._may_start(waiting):
                    known = self._finished.find(waiting, self._plan.variants)
                    if known is not None:
                        say(f"{known.experiment}: as before")
                        tell(waiting, known)
                    else:
                        self._start(waiting)
                    waiting = None
                    continue
                time.sleep(POLL_S)
        finally:
            self._end()

    def _end(self) -> None:
        """End what runs, though not while it has the workspace.

        DVC keeps uncommitted changes in git's stash for the seconds in which it makes an
        experiment, and who is killed then does not put them back.
        """
        deadline = time.monotonic() + LEAVE_S
        for job in self._running:
            while time.monotonic() < deadline and job.process.poll() is None:
                self._read_events()
                if job.experiment in self._begun:
                    break
                time.sleep(POLL_S)
        for job in self._running:
            end_tree(job.process)

    def _may_start(self, point: Point) -> bool:
        """Whether an experiment may start beside those that run.

        Of those with one calibration the first computes it, and the others find it in DVC's cache.
        """
        if len(self._running) >= self._jobs:
            return False
        if any(job.experiment not in self._begun for job in self._running):
            return False
        key = point.calibration_key
        return key in self._calibrated or all(
            job.point.calibration_key != key for job in self._running
        )

    def _start(self, point: Point) -> None:
        experiment = free_name(point.label, self._taken)
        self._taken.add(experiment)
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{experiment}.txt"
        command = exp_run(point, experiment, self._plan.variants, self._root)
        folder = str(Path(sys.executable).parent)
        path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env=os.environ | {"PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=leashed(),  # noqa: PLW1509  the commands have one thread
            )
        say(f"{experiment}: started")
        self._running.append(Job(point, experiment, process, log, time.monotonic()))

    def _follow(self, tell: Tell) -> None:
        """Say what the experiments have done since the last look, and tell of those that ended."""
        ended = [job for job in self._running if job.process.poll() is not None]
        self._read_events()
        for job in ended:
            self._running.remove(job)
            outcome = self._outcome(job)
            if outcome.failure is None:
                self._calibrated.add(job.point.calibration_key)
                if not outcome.failures:
                    self._finished.add(job.point, self._plan.variants, outcome)
                say(f"{job.experiment}: done, {outcome.seconds:.0f} s")
            for failure, message in [
                *([(outcome.failure, outcome.message)] if outcome.failure else []),
                *outcome.failures.values(),
            ]:
                say(f"{job.experiment}: {failure}: {message}", error=True)
            tell(job.point, outcome)

    def _read_events(self) -> None:
        size = self._events.stat().st_size if self._events.is_file() else 0
        if size == self._size:
            return
        self._size = size
        events = read_events(self._events)
        names = {job.experiment for job in self._running}
        for event in events[self._seen :]:
            name = event["payload"].get("experiment")
            if name not in names:
                continue
            self._begun.add(name)
            if event["severity"] in ("error", "critical"):
                self._errors.setdefault(name, []).append(event)
            elif event["reason_code"] == "stage_finished":
                say(f"{name}: {plain(event['summary'])}")
        self._seen = len(events)

    def _outcome(self, job: Job) -> Outcome:
        """Return what became of an experiment that has ended."""
        outcome = Outcome(job.experiment, seconds=round(time.monotonic() - job.started, 1))
        errors = self._errors.get(job.experiment, [])
        rev = find_rev(self._root, job.experiment)
        if job.process.returncode == 0 and rev is not None:
            wrong = check_params(job.point, rev, self._root)
            if wrong is not None:
                return replace(outcome, failure=wrong.failure, message=wrong.message)
            return replace(outcome, rev=rev, failures=_failures(errors))
        for failure, message in map(_failure, errors[:1]):
            return replace(outcome, failure=failure, message=message)
        said = refusal(job.log)
        message = f"DVC did not run it: {said}; all that it said is in {_shown(job.log)}"
        return replace(outcome, failure=Failure.PIPELINE_REFUSED, message=message)


def _failure(event: dict[str, Any]) -> tuple[str, str]:
    """Return the name and the message of an error."""
    name = event["payload"].get("failure") or Failure.INTERNAL_ERROR
    return str(name), plain(event["summary"])


def _failures(errors: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the first error of each recipe and variant."""
    found: dict[str, tuple[str, str]] = {}
    for event in errors:
        found.setdefault(str(event["payload"].get("instance")), _failure(event))
    return found


def exp_run(point: Point, experiment: str, variants: Sequence[str], root: Path) -> list[str]:
    """Return the command that runs an experiment in a copy of the workspace.

    Args:
        point: What it runs with.
        experiment: Its name.
        variants: Those that it measures.
        root: The project's.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp"]
    command += ["--name", experiment]
    for override in for_hydra(point.overrides, root / "conf"):
        command += ["--set-param", override]
    for path in untracked_sources(root):
        command += ["--copy-paths", path]
    measured = [name for name in variants if name in point.composed["variants"]]
    if len(measured) > 1:
        command.append("--ignore-errors")  # one that fails does not take the others along
    return [*command, *(f"evaluate@{name}" for name in measured)]


def refusal(log: Path) -> str:
    """Return what DVC gave as its reason, as far as it gave one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = [line for line in lines if line.strip()]
    return shortened(plain((reasons or last or ["it ended without a word"])[-1]))


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
