"""The figures of a sweep's experiments, read from DVC's cache, beside what the workspace has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.formats.bundle.manifest import MANIFEST, README, SMOKE
from quantline.metrics.results import ResultFiles, read_results
from quantline.model.architecture import Architecture
from quantline.paths import EXPORTS, METRICS
from quantline.report.rows import fill_in, read_row
from quantline.report.variant import VariantRow
from quantline.sweeps.experiments import Outcome
from quantline.sweeps.plan import Plan, Point

MISSING = "it left no figures; the files of its experiment are gone from DVC's cache: run it again"


@dataclass
class Result:
    """A variant of an experiment, or one of the workspace that it is compared with.

    Attributes:
        row: Its figures, as reports/compression.json has them; `variant` is the name on the page.
        variant: What it is called in params.yaml.
        method: Of its recipe.
        choice: The values of the axes; empty for one of the workspace.
        overrides: With which `quantline repro` makes it the project's own.
        experiment: Its name in DVC; "" for one of the workspace.
        rev: Its commit.
    """

    row: VariantRow
    variant: str
    method: str
    choice: Mapping[str, str]
    overrides: Sequence[str] = ()
    experiment: str = ""
    rev: str = ""

    @property
    def series(self) -> str:
        """What it is one point of: its method, and its format where that is another's too."""
        return f"{self.method} · {self.row.format}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as the sweep's JSON has it."""
        named = {"method": self.method, "choice": dict(self.choice), "in_params": self.variant}
        kept = {"experiment": self.experiment, "rev": self.rev, "overrides": list(self.overrides)}
        return self.row.to_json() | named | kept


def read_experiment(
    plan: Plan, point: Point, outcome: Outcome, folder: Path, arch: Architecture | None
) -> list[Result]:
    """Return the figures of an experiment, a result for each variant that it measures.

    Args:
        plan: Of the sweep.
        point: The experiment.
        outcome: What became of it.
        folder: Where its small files are copied to.
        arch: Of the unquantized model; None leaves what is made from it unknown.
    """
    measured = [name for name in plan.variants if name in point.params.variants]
    if outcome.rev is not None:
        _copy_files(outcome.rev, measured, folder)
    results = []
    for name in measured:
        shown = outcome.experiment if len(measured) == 1 else f"{outcome.experiment}/{name}"
        row = _read(plan, point, outcome, name, folder, arch)
        row.variant = shown
        method = point.params.recipes[row.recipe].method
        overrides = point.overrides
        kept = (point.choice, overrides, outcome.experiment, outcome.rev or "")
        results.append(Result(row, name, method, *kept))
    return results


def _read(
    plan: Plan,
    point: Point,
    outcome: Outcome,
    name: str,
    folder: Path,
    arch: Architecture | None,
) -> VariantRow:
    """Return the row of a variant of an experiment; a failed one where there are no figures."""
    variant = point.params.variants[name]
    row = VariantRow(name, variant.recipe, variant.format, variant.runtime)
    bundle = folder / EXPORTS / name
    files = ResultFiles.of(folder / METRICS, name)
    failed = outcome.failures.get(variant.recipe) or outcome.failures.get(name)
    if outcome.failure is not None:
        failed = (outcome.failure, outcome.message)
    if failed is None and not (files.quality.is_file() and (bundle / MANIFEST).is_file()):
        failed = next(iter(outcome.failures.values()), (str(Failure.MISSING_FILE), MISSING))
    if failed is None:
        try:
            manifest = read_json(bundle / MANIFEST)
            results = read_results(files, manifest)
            fill_in(row, bundle, manifest, results, plan.base.target, arch)
            return row
        except StageError as error:
            failed = (error.failure, str(error))
        except (AttributeError, KeyError, TypeError) as error:
            failed = (Failure.ARTIFACT_CHANGED, f"{type(error).__name__} {error} in {folder}")
    names = (name, variant.recipe, variant.format, variant.runtime)
    failure, message = failed
    return VariantRow(*names, status="failed", failure=str(failure), message=message)


def _copy_files(rev: str, variants: Sequence[str], folder: Path) -> None:
    """Copy the small files of an experiment's variants out of DVC's cache."""
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=rev)
    for name in variants:
        paths = [METRICS / f"{name}.json", METRICS / f"{name}.speed.json"]
        paths.append(METRICS / "items" / f"{name}.json")
        paths += [EXPORTS / name / each for each in (MANIFEST, SMOKE, README)]
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                (folder / path).write_bytes(files.read_bytes(path.as_posix()))
            except (FileNotFoundError, IsADirectoryError):
                (folder / path).unlink(missing_ok=True)


def read_workspace(plan: Plan, present: Params, arch: Architecture | None) -> list[Result]:
    """Return the measured variants of the workspace that can stand beside the experiments.

    Those are left out that are stale or not measured, and all of them where the workspace has
    another model, calibration or evaluation.

    Args:
        plan: Of the sweep.
        present: The content of params.yaml.
        arch: Of the unquantized model.
    """
    for section in ("model", "calibration", "evaluation", "seed"):
        if getattr(present, section) != getattr(plan.base, section):
            return []
    results = []
    for name in present.variants:
        row = read_row(name, present, arch)
        if row.is_measured:
            results.append(Result(row, name, present.recipes[row.recipe].method, {}))
    return results


def without_twins(results: Sequence[Result]) -> list[Result]:
    """Return results without those of the workspace that an experiment has the same bytes of."""
    made = {_identity(result) for result in results if result.experiment}
    return [result for result in results if result.experiment or _identity(result) not in made]


def _identity(result: Result) -> tuple[str, str | None]:
    row = result.row
    return row.runtime, row.metrics.get("artifact_sha256") if row.is_measured else None
