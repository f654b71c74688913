"""Promotion: a variant becomes a version of the registered model, and the champion."""

from collections.abc import Sequence
from pathlib import Path

from quantline.config.params import Params
from quantline.config.targets import Gate
from quantline.errors import Failure, Reason, StageError
from quantline.files import read_json
from quantline.formats.bundle.manifest import MANIFEST
from quantline.messages import in_markdown
from quantline.metrics.figure import columns_of
from quantline.report.build import Report
from quantline.report.champion import figure_tags, why_not_instead
from quantline.report.gates import PASSES
from quantline.report.tracked_comparison import describe_bundle
from quantline.report.variant import VariantRow
from quantline.run.stage import StageRun
from quantline.tracking.model_registry import (
    SHA256,
    Candidate,
    Champion,
    NoRegistryError,
    NotPromotedError,
    in_queued_copy,
    register,
)
from quantline.tracking.run_content import Dataset, variant_run
from quantline.tracking.run_origin import git_commit
from quantline.tracking.store import TrackingError

LATER = "`quantline track` delivers the runs, and promotes the pick"


def after_comparison(
    run: StageRun,
    report: Report,
    exports: Path,
    run_ids: dict[str, str | None],
    datasets: list[Dataset],
) -> str:
    """Promote the pick if `tracking.registry.promote` is auto; else say how it is promoted.

    Args:
        run: Of the stage compare.
        report: With the pick.
        exports: Folder of the bundles.
        run_ids: Variant → its MLflow run, from `log_comparison`.
        datasets: What the figures were measured on.

    Returns:
        What was done, in words.
    """
    registry = run.params.tracking.registry
    picked = report.picked
    if registry is None:
        return _say_not_promoted(run, "info", "tracking.registry is null", report.pick)
    if picked is None:
        reason = f"no variant meets the target {run.params.target.name}; the alias stays"
        return _say_not_promoted(run, "warning", reason, None)
    if registry.promote == "explicit":
        reason = obstacle(run.params, picked) or "`quantline promote` does that"
        return _say_not_promoted(run, "info", reason, report.pick)
    try:
        version = promote(run, picked, report.reasons, exports, run_ids[picked.variant], datasets)
    except StageError as error:
        reason = f"{error}; {LATER}" if isinstance(error, TrackingError) else str(error)
        return _say_not_promoted(run, "warning", reason, report.pick)
    return f"promoted: {version}"


def _say_not_promoted(run: StageRun, severity: str, reason: str, variant: str | None) -> str:
    summary = f"no model is promoted: {reason}"
    run.event(severity, summary, Reason.MODEL_NOT_REGISTERED, {"variant": variant})
    return f"not promoted: {reason}"


def obstacle(params: Params, row: VariantRow) -> str | None:
    """Return why a variant is not to be promoted, whatever is the champion; None if it may be.

    A required gate has to pass on all of its interval: one that was not checked, or cannot tell,
    has not passed, also where the target counts it as passed.
    """
    target = params.target
    if not row.is_measured:
        return f"{row.variant} has no figures: {row.message}"
    if row.objections:
        return f"{row.variant} does not meet the target {target.name}: {'; '.join(row.objections)}"
    for gate in target.gates:
        if gate.required and (said := _not_passed(gate, row)):
            return f"a required gate of the target {target.name} does not pass: {said}"
    if in_queued_copy():
        return "this is a queued experiment; apply it, and run `quantline promote`"
    return None


def _not_passed(gate: Gate, row: VariantRow) -> str:
    """Return what this very gate said, if it did not pass; "" if it did."""
    wanted = gate.model_dump()
    for checked in row.gates:
        if {key: checked[key] for key in wanted} == wanted:
            return "" if checked["verdict"] == PASSES else str(checked["said"])
    return f"{gate.metric} {gate.operator} {gate.threshold:g} was not checked"


def promote(
    run: StageRun,
    row: VariantRow,
    reasons: Sequence[str],
    exports: Path,
    run_id: str | None,
    datasets: list[Dataset],
    force: bool = False,
) -> str:
    """Make a variant a version of the registered model, and give it the alias.

    Args:
        run: Of whoever promotes.
        row: Of the variant, among the others of its report.
        reasons: Why this one, in sentences.
        exports: Folder of the bundles.
        run_id: Of the variant's run in MLflow; None if MLflow does not take it now.
        datasets: What its figures were measured on.
        force: Whether it may take the place of a version that is better, or cannot be compared.

    Returns:
        Name, number and alias of the version, in words.

    Raises:
        StageError: promotion_refused, if the variant is not to be promoted.
        TrackingError: If MLflow does not take it now.
    """
    params = run.params
    registry = params.tracking.registry
    if registry is None:
        raise StageError(
            Failure.PROMOTION_REFUSED,
            "expected the name of a registered model, found tracking.registry=null; set it in "
            "conf/tracking/",
        )
    if reason := obstacle(params, row):
        raise StageError(Failure.PROMOTION_REFUSED, reason)
    if run_id is None:
        raise TrackingError(Failure.NETWORK_UNAVAILABLE, "MLflow does not take the runs now")
    tags = _version_tags(params, row) | figure_tags(row, datasets)
    description = "\n".join(f"- {in_markdown(line)}" for line in reasons)
    description += "\n\n" + row.lineage["serve"]
    bundle = exports / row.variant
    manifest = read_json(bundle / MANIFEST)
    model = describe_bundle(bundle, manifest, copied=True)
    key = variant_run(manifest)["key"]
    candidate = Candidate(run_id, key, model, tags, description.strip())

    def objections(champion: Champion) -> list[str]:
        return [] if force else why_not_instead(row, tags, champion, params.target)

    try:
        version = register(params.tracking, candidate, objections)
    except NotPromotedError as error:
        raise StageError(
            Failure.PROMOTION_REFUSED, f"{registry.alias} of {registry.name} stays: {error}"
        ) from None
    except NoRegistryError as error:
        raise StageError(
            Failure.PROMOTION_REFUSED, f"the MLflow server keeps no models: {error}"
        ) from None
    name = f"{row.variant} is {registry.name} version {version.number}, {registry.alias}"
    before = f" in place of version {version.replaced}" if version.replaced else ""
    if not version.is_new and not version.replaced:
        before = ", as before"
    run.event(
        "info",
        f"{name}{before}{', by force' if force else ''}",
        Reason.MODEL_REGISTERED,
        {
            "variant": row.variant,
            SHA256: row.metrics[SHA256],
            "name": registry.name,
            "version": version.number,
            "alias": registry.alias,
            "new": version.is_new,
            "replaced": version.replaced,
            "force": force,
        },
    )
    return f"{name}{before}"


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
