"""A sweep from its experiments to its page."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.compose import load_params
from quantline.errors import StageError
from quantline.paths import MODEL
from quantline.report.memory import read_architecture
from quantline.sweeps.experiments import SWEEPS, Outcome
from quantline.sweeps.grid_report import GridReport, make_report
from quantline.sweeps.page import write_pages
from quantline.sweeps.plan import Plan, Point
from quantline.sweeps.results import Result, read_experiment, read_workspace
from quantline.sweeps.run import Experiments
from quantline.sweeps.tracked import log_sweep
from quantline.tracking.run_origin import git_commit
from quantline.tracking.store import TrackingError


@dataclass(frozen=True)
class Done:
    """A finished sweep.

    Attributes:
        report: What is on its page.
        page: The page.
        failed: The experiments that failed, and variants of others that did.
        untracked: Why MLflow did not take its runs; None if it did.
    """

    report: GridReport
    page: Path
    failed: list[Result]
    untracked: TrackingError | None


class Sweep:
    """Runs the experiments of a plan, collects their figures and writes the page."""

    def __init__(self, plan: Plan, name: str, root: Path, jobs: int) -> None:
        """Begin a sweep.

        Args:
            plan: Its experiments.
            name: Of the sweep, and of its page.
            root: The project's, which is the working folder.
            jobs: Experiments at a time.
        """
        self.plan = plan
        self.name = name
        self._root = root
        self._started = time.time()
        self._experiments = Experiments(plan, name, root, jobs)
        self._ran: list[tuple[Point, Outcome]] = []

    def run_grid(self) -> None:
        """Run every point of the plan."""
        points = iter(self.plan.points)
        self._experiments.run(lambda: next(points, None), self._tell)
        order = {point.label: place for place, point in enumerate(self.plan.points)}
        self._ran.sort(key=lambda ran: order[ran[0].label])

    def run_search(self, search: Any) -> None:
        """Run what a search asks for; it is told the results (see quantline.sweeps.study)."""

        def tell(point: Point, outcome: Outcome) -> None:
            self._tell(point, outcome)
            search.tell(point, self.results_of(point, outcome))

        self._experiments.run(search.ask, tell)

    def _tell(self, point: Point, outcome: Outcome) -> None:
        self._ran.append((point, outcome))

    def results_of(self, point: Point, outcome: Outcome) -> list[Result]:
        """Return the figures of an experiment."""
        folder = self._root / SWEEPS / self.name / "results" / outcome.experiment
        return read_experiment(self.plan, point, outcome, folder, self._architecture())

    def _architecture(self) -> Any:
        try:
            return read_architecture(MODEL)
        except StageError:
            return None

    def finish(self, command: str, search: Mapping[str, Any] | None = None) -> Done:
        """Write the page, and log the sweep to MLflow.

        Args:
            command: What makes the sweep again.
            search: What a search looked for.
        """
        arch = self._architecture()
        results: list[Result] = []
        outcomes = unique(self._ran)
        for point, outcome in outcomes:
            results += self.results_of(point, outcome)
        failed = [result for result in results if not result.row.is_measured]
        results += read_workspace(self.plan, load_params(), arch)
        report = make_report(self.plan, self.name, results, command, git_commit(), arch, search)
        files = write_pages(report, self._root)
        untracked = log_sweep(
            self.plan.base.tracking,
            self.plan,
            report,
            [outcome for _, outcome in outcomes],
            files,
            self._started,
        )
        return Done(report, files[0], failed, untracked)


def unique(ran: Iterable[tuple[Point, Outcome]]) -> list[tuple[Point, Outcome]]:
    """Return what ran without what a search asked for again."""
    kept = {}
    for point, outcome in ran:
        kept[outcome.experiment] = (point, outcome)
    return list(kept.values())
