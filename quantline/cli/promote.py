"""`quantline promote`: a variant becomes the registered champion of its target."""

import os
from typing import Annotated

import typer

from quantline.cli.program import app, stop
from quantline.config.compose import project_root
from quantline.errors import ConfigError, Failure, Reason, StageError
from quantline.files import read_json
from quantline.messages import say
from quantline.paths import EXPORTS, REFERENCE
from quantline.run.project_lock import project_lock
from quantline.run.stage import StageRun


@app.command()
def promote(
    variant: Annotated[
        str | None, typer.Argument(help="The variant; without it, the pick", show_default=False)
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also in place of a champion that is better or cannot be compared"
        ),
    ] = False,
) -> None:
    """Register the pick, or the named variant, and make it the champion, unless it is worse.

    It has to meet the target, with every required gate decided. It is compared with the present
    champion by what the target optimizes and by its gates: quantline promote gguf-q4_k_m
    """
    try:
        os.chdir(project_root())
        with project_lock("quantline promote"):
            say(f"promoted: {_promote(variant, force)}")
    except (ConfigError, StageError) as error:
        raise stop(error) from None


def _promote(variant: str | None, force: bool) -> str:
    """Promote a variant of the project of the working folder; return what it is now, in words."""
    from quantline.report.build import collect_report
    from quantline.report.promotion import promote as promote_row
    from quantline.report.tracked_comparison import log_variant
    from quantline.tracking.run_content import evaluation_datasets

    run = StageRun("promote", None)
    run.load_params()
    params = run.params
    if variant is not None and variant not in params.variants:
        names = ", ".join(params.variants)
        raise ConfigError(f"expected a variant among {names}, found {variant}")
    report = collect_report(params)
    name = variant or report.pick
    try:
        if name is None:
            raise StageError(
                Failure.PROMOTION_REFUSED,
                f"no variant meets the target {params.target.name}; `quantline pick` says why",
            )
        row = next(row for row in report.variants if row.variant == name)
        truth = REFERENCE / "reference.json"
        datasets = []
        if truth.is_file():
            datasets = evaluation_datasets(params.evaluation, read_json(truth))
        run_id = None
        if row.is_measured:
            run_id = log_variant(run, report, row, EXPORTS, datasets)
        reasons = report.reasons if name == report.pick else row.why_not
        return promote_row(run, row, reasons, EXPORTS, run_id, datasets, force)
    except StageError as error:
        run.event(
            "warning",
            f"no model is promoted: {error}",
            Reason.MODEL_NOT_REGISTERED,
            {"variant": name},
            error.failure,
        )
        raise
