"""The comparison in MLflow: a run above those of its variants and of the stages before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.errors import StageError
from quantline.files import read_json, sha256_json
from quantline.formats.bundle.manifest import MANIFEST
from quantline.paths import METRICS, MODEL
from quantline.report.build import Report
from quantline.report.chain import chain_of
from quantline.report.variant import VariantRow
from quantline.run.lineage import read_lineage
from quantline.run.stage import StageRun
from quantline.run.stage_names import run_name
from quantline.run.stage_record import ARTIFACT_ID, failed_key
from quantline.text.special_tokens import read_special_tokens
from quantline.tracking.logged_models import BundleDescription
from quantline.tracking.mlflow_runs import KEY, put_below
from quantline.tracking.run_content import (
    Dataset,
    bundle_description,
    chart_figures,
    variant_run,
)
from quantline.tracking.store import TrackingError


def log_comparison(
    run: StageRun, report: Report, files: Sequence[Path], exports: Path, datasets: list[Dataset]
) -> dict[str, str | None]:
    """Log the comparison, and below it its variants and the stages that led to them.

    Variants whose figures DVC took from its cache are logged here for the first time.

    Args:
        run: Of the stage compare.
        report: What was compared.
        files: The report's files.
        exports: Folder of the bundles.
        datasets: What the figures were measured on.

    Returns:
        The MLflow run id of each measured variant; None where MLflow does not take it now.
    """
    key = f"compare:{sha256_json(report.to_json())}"
    measured = len(report.measured)
    run_id = run.track(
        key=key,
        name="compare",
        params={"target": report.target, "pick": report.pick},
        metrics={"variants": len(report.variants), "failed": len(report.variants) - measured},
        files=files,
        datasets=datasets,
        at_once=True,
    )
    ids = {}
    for row in report.measured:
        ids[row.variant] = log_variant(run, report, row, exports, datasets, key)
    if run_id is not None:
        try:
            put_below(run.params.tracking, run_id, stage_tags(report, run.params))
        except TrackingError as error:
            run.warn(f"MLflow does not show the stages below the comparison: {error}")
    return ids


def log_variant(
    run: StageRun,
    report: Report,
    row: VariantRow,
    exports: Path,
    datasets: list[Dataset],
    parent: str | None = None,
) -> str | None:
    """Add figures, verdicts, data sets and the model to the run of a measured variant.

    Args:
        run: Of whoever logs it.
        report: In which the variant is.
        row: Of the variant.
        exports: Folder of the bundles.
        datasets: What its figures were measured on.
        parent: Key of the comparison's run; None leaves the variant where it is.

    Returns:
        MLflow's id of the run; None where MLflow does not take it now.
    """
    bundle = exports / row.variant
    manifest = read_json(bundle / MANIFEST)
    described = variant_run(manifest)
    described["tags"] |= {
        "stage": "evaluate",
        "pareto": str(row.pareto).lower(),
        f"target.{report.target['name']}": _verdict(row, report),
    }
    models = run.params.tracking.models
    model = None
    if models is not None:
        model = describe_bundle(bundle, manifest, copied=models == "copied")
    figures = _logged_figures(row)
    described |= {"metrics": figures, "datasets": datasets, "parent": parent, "model": model}
    return run.track(**described, at_once=True)


def describe_bundle(bundle: Path, manifest: dict[str, Any], copied: bool) -> BundleDescription:
    """Return what MLflow's model of a variant is made from.

    Args:
        bundle: Its folder.
        manifest: Of the bundle.
        copied: Whether MLflow keeps a copy of the bundle.
    """
    special = read_special_tokens(bundle) or read_special_tokens(MODEL)
    begin = special.begin if special else None
    return bundle_description(bundle, manifest, begin, special.ends if special else None, copied)


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


def stage_tags(report: Report, params: Params) -> list[tuple[str, str]]:
    """Return the tags by which the runs of the stages before a comparison are found.

    Those that made something are found by the id of what they made, and those that failed by the
    stage, its parameters and the failure.
    """
    tags = []
    for row in report.variants:
        measured = f"{METRICS.name}/{row.variant}"
        try:
            lineage = read_lineage(measured) if row.is_measured else None
        except StageError:
            lineage = None
        for made in lineage.artifacts.values() if lineage else ():
            if made is not None:
                tags.append((ARTIFACT_ID, made))
        if row.status == "failed" and row.failure is not None:
            for stage, instance in chain_of(row.variant, params).values():
                tags.append((KEY, failed_key(run_name(stage, instance, params), row.failure)))
    return sorted(set(tags))
