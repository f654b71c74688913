"""The comparison in MLflow: what it adds to each variant's run, and the pick as a model version."""

from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.config.targets import Gate
from quantline.errors import Reason
from quantline.files import read_json
from quantline.messages import in_markdown
from quantline.metrics.figure import columns_of
from quantline.report.build import Report
from quantline.report.variant import VariantRow
from quantline.run.stage import StageRun
from quantline.tracking.mlflow_runs import Dataset, chart_figures, git_commit, variant_run
from quantline.tracking.model_registry import SHA256, NoRegistryError, in_queued_copy, register
from quantline.tracking.store import TrackingError

LATER = "once it does, `quantline track` delivers them and registers the pick"


def log_variants(
    run: StageRun, report: Report, exports: Path, datasets: list[Dataset]
) -> dict[str, str | None]:
    """Add figures, verdicts and data sets to the run of each measured variant.

    That includes variants whose figures DVC took from its cache, so that nothing was logged yet.

    Returns:
        The MLflow run id of each; None where MLflow does not take it now.
    """
    ids: dict[str, str | None] = {}
    target = report.target["name"]
    for row in report.measured:
        described = variant_run(read_json(exports / row.variant / "manifest.json"))
        tags = {
            "stage": "evaluate",
            "pareto": str(row.pareto).lower(),
            f"target.{target}": _verdict(row, report),
        }
        described["tags"] |= tags
        ids[row.variant] = run.track(**described, metrics=_logged_figures(row), datasets=datasets)
    return ids


def _verdict(row: VariantRow, report: Report) -> str:
    if row.variant == report.pick:
        return "pick"
    return "does not meet" if row.objections else "meets"


def _logged_figures(row: VariantRow) -> dict[str, Any]:
    """Return a row's figures as MLflow gets them: those of the report beside the measured ones."""
    made_here = {
        key: value
        for key, value in row.figures.items()
        if key not in row.metrics and key not in row.speed
    }
    return chart_figures(row.metrics) | made_here | {"speed": row.speed}


def obstacle(params: Params, report: Report) -> str | None:
    """Return why the pick is not to be registered; None if it is.

    A required gate that was not checked has not passed.
    """
    if params.tracking.registry is None:
        return "tracking.registry is null"
    picked = report.picked
    if picked is None:
        return f"no variant meets the target {params.target.name}; the alias stays where it is"
    for gate in params.target.gates:
        if gate.required and not _has_passed(gate, picked):
            return (
                f"the required gate {gate.metric} {gate.operator} {gate.threshold:g} was not "
                "checked or does not pass"
            )
    if in_queued_copy():
        return "this is a queued experiment; apply it, and run `python -m stages.compare`"
    return None


def _has_passed(gate: Gate, row: VariantRow) -> bool:
    """Whether this very gate was checked and passed."""
    wanted = gate.model_dump()
    return any(
        checked["passed"] and {key: checked[key] for key in wanted} == wanted
        for checked in row.gates
    )


def promote(run: StageRun, report: Report, exports: Path, run_ids: dict[str, str | None]) -> str:
    """Register the pick, or write an event that says why not.

    Args:
        run: Of the stage.
        report: With the pick.
        exports: Folder of the bundles.
        run_ids: Variant → its MLflow run, from `log_variants`.

    Returns:
        What was done, in words.
    """
    registry = run.params.tracking.registry
    reason = obstacle(run.params, report)
    picked = report.picked
    run_id = run_ids.get(picked.variant) if picked else None
    if reason is None and run_id is None:
        reason = f"MLflow does not take the runs now; {LATER}"
    if reason is None and picked and registry and run_id:
        description = "\n".join(f"- {in_markdown(line)}" for line in report.reasons)
        description += "\n\n" + picked.lineage["serve"]
        try:
            version, is_new = register(
                run.params.tracking,
                run_id,
                exports / picked.variant,
                _version_tags(run.params, picked),
                description,
            )
        except NoRegistryError as error:
            reason = f"the MLflow server keeps no models: {error}"
        except TrackingError as error:
            reason = f"{error}; {LATER}"
        else:
            version_name = f"{registry.name} version {version}, {registry.alias}"
            run.event(
                "info",
                f"{picked.variant} is {version_name}{'' if is_new else ', as before'}",
                Reason.MODEL_REGISTERED,
                {
                    "variant": picked.variant,
                    SHA256: picked.metrics[SHA256],
                    "name": registry.name,
                    "version": version,
                    "alias": registry.alias,
                    "new": is_new,
                },
            )
            return f"registered as {version_name}"
    run.event(
        "warning" if registry else "info",
        f"no model is registered: {reason}",
        Reason.MODEL_NOT_REGISTERED,
        {"variant": report.pick},
    )
    return f"not registered: {reason}"


def _version_tags(params: Params, row: VariantRow) -> dict[str, str]:
    """Return the tags of a model version: what it is, where it comes from, and its figures."""
    gates = []
    for gate in row.gates:
        if gate["required"]:
            limit = f"{gate['metric']} {gate['operator']} {gate['threshold']:g}"
            gates.append(f"{limit} {gate['verdict']}")
    tags = {
        "variant": row.variant,
        "recipe": row.recipe,
        "format": row.format,
        "runtime": row.runtime,
        SHA256: row.metrics[SHA256],
        "target": params.target.name,
        "git_commit": git_commit(),
        "gates": "; ".join(gates),
    }
    for column in columns_of("model registry"):
        if column.key in row.metrics:
            tags[column.heading] = column.text(row.metrics[column.key])
    return tags
