"""Compare all variants and say which one to ship for the target.

python -m stages.compare     # metrics/, artifacts/exports/ → reports/compression.{html,md,json}

A variant that failed in an earlier stage stands in the report with its named failure. Sentences
about what DVC refused can follow as arguments, and stand in the report too.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from quantline.files import read_json
from quantline.paths import EXPORTS, REFERENCE, REPORTS
from quantline.report.build import collect_report
from quantline.report.promotion import after_comparison
from quantline.report.registered import registered_versions
from quantline.report.tracked_comparison import log_comparison
from quantline.report.write import PAGE, write_report
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.run_content import evaluation_datasets


def compare(run: StageRun, refused: Sequence[str] = ()) -> None:
    """Run the stage; the report also says what DVC refused before."""
    report = collect_report(run.params, refused)
    files = write_report(report, REPORTS)
    measured = len(report.measured)
    failed = len(report.variants) - measured
    truth = REFERENCE / "reference.json"
    datasets = []
    if truth.is_file():
        datasets = evaluation_datasets(run.params.evaluation, read_json(truth))
    run_ids = log_comparison(run, report, files, EXPORTS, datasets)
    promoted = after_comparison(run, report, EXPORTS, run_ids, datasets)
    registered = registered_versions(report.variants)
    if registered != report.registered:  # the page names the version that was just made
        write_report(replace(report, registered=registered), REPORTS)
    run.set_summary(
        f"{measured} variants measured, {failed} failed{_and_refused(refused)}; "
        f"for {report.target['name']} ship "
        f"{report.pick or 'none of them'}, {promoted}; page: {REPORTS / PAGE}"
    )


def _and_refused(refused: Sequence[str]) -> str:
    """Return how often DVC refused, for figures may be those of an earlier run then."""
    return f", {len(refused)} refused by DVC" if refused else ""


if __name__ == "__main__":
    with stage_run("compare") as run:
        compare(run, sys.argv[1:])
