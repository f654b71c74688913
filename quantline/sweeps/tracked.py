"""A sweep in MLflow: one run for the sweep with its page, and one below it for each experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.config.tracking import Tracking
from quantline.files import sha256_json
from quantline.metrics.figure import columns_of
from quantline.report.variant import VariantRow
from quantline.sweeps.experiments import Outcome
from quantline.sweeps.grid_report import GridReport
from quantline.sweeps.plan import Plan
from quantline.sweeps.results import Result
from quantline.tracking.mlflow_runs import FAILED, FINISHED
from quantline.tracking.store import TrackingError
from quantline.tracking.undelivered import Run, log_or_keep

PARENT = "mlflow.parentRunId"  # by which MLflow shows a run below another


def log_sweep(
    tracking: Tracking,
    plan: Plan,
    report: GridReport,
    outcomes: Sequence[Outcome],
    files: Sequence[Path],
    started: float,
) -> TrackingError | None:
    """Log a sweep and its experiments.

    Runs that MLflow does not take now are kept for `quantline track`.

    Args:
        tracking: The section of params.yaml.
        plan: Of the sweep.
        report: Its page.
        outcomes: Of all experiments.
        files: The page's.
        started: When the sweep began, in seconds since 1970.

    Returns:
        Why MLflow did not take a run; None if it took all.
    """
    base = plan.base.model_dump(mode="json")
    key = f"sweep:{report.name}:{sha256_json([base, report.axes])[:16]}"
    tags = {"model": report.model, "suite": plan.base.suite, "sweep": report.name}
    failed = sum(outcome.failure is not None for outcome in outcomes)
    parent = Run(
        key=key,
        name=report.name,
        params={"axes": {name: ", ".join(values) for name, values in report.axes.items()}},
        metrics={"experiments": len(outcomes), "failed": failed},
        tags=tags | {"stage": "sweep", "pick": report.pick or "", "command": report.command},
        files=list(files),
        started=started,
    )
    first = log_or_keep(tracking, parent)
    error = first.error
    below = {PARENT: first.run_id} if first.run_id else {}
    for outcome in outcomes:
        results = [each for each in report.results if each.experiment == outcome.experiment]
        run = _experiment(key, outcome, results, tags | below)
        error = log_or_keep(tracking, run).error or error
    return error


def _experiment(
    key: str, outcome: Outcome, results: Sequence[Result], tags: Mapping[str, str]
) -> Run:
    """Return the run of an experiment: what differs, and the chief figures of its variants."""
    choice: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for result in results:
        choice |= dict(result.choice)
        figures = chief_figures(result.row)
        metrics |= figures if len(results) == 1 else {result.variant: figures}
    own = {"stage": "experiment", "dvc.experiment": outcome.experiment}
    status = FINISHED
    if outcome.rev:
        own["dvc.rev"] = outcome.rev
    if outcome.failure is not None:
        status = FAILED
        own |= {"failure": outcome.failure, "message": outcome.message[:1000]}
    return Run(
        key=f"{key}:{outcome.experiment}:{outcome.rev or 'failed'}",
        name=outcome.experiment,
        params=choice,
        metrics=metrics,
        tags={**tags, **own},
        status=status,
    )


def chief_figures(row: VariantRow) -> dict[str, Any]:
    """Return the figures of a row that the table in the terminal has."""
    if not row.is_measured:
        return {}
    keys = [column.key for column in columns_of("cli")]
    return {key: row.figures[key] for key in keys if row.figures.get(key) is not None}
