"""Measure one bundle from its files on disk, in a fresh process, in the runtime that will serve it.

python -m stages.evaluate gguf-q4_k_m     # → metrics/gguf-q4_k_m.json, gguf-q4_k_m.speed.json

If native code brings the measuring process down, or it goes over evaluation.limits, that is a
named failure of this variant.
"""

import shutil
import sys

from quantline.formats.bundle.manifest import check_bundle
from quantline.metrics.measure_items import measure_by_workers
from quantline.metrics.measuring_process import Measuring, measure_in_child
from quantline.metrics.results import ResultFiles, write_results
from quantline.paths import EXPORTS, MEASURING, METRICS, REFERENCE
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.run_content import chart_figures, variant_run


def evaluate(run: StageRun) -> None:
    """Run the stage."""
    name = run.name
    runtime = run.params.variants[name].runtime
    evaluation = run.params.evaluation
    manifest = check_bundle(EXPORTS / name)
    python = evaluation.pythons.get(runtime)
    measuring = Measuring(EXPORTS / name, runtime, REFERENCE, evaluation.limits, python)
    executor = run.params.executor
    folder = MEASURING / name
    if executor.divides:
        measured = measure_by_workers(measuring, evaluation.speed, executor, folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of workers that were killed
        measured = measure_in_child(measuring, evaluation.speed)
    files = ResultFiles.of(METRICS, name)
    results = write_results(files, manifest, runtime, measured)
    run.inputs.record_figures((files.quality, files.speed, files.answers))
    run.track(
        **variant_run(manifest),
        metrics=chart_figures(results.quality) | {"speed": results.speed},
        files=[files.answers],
    )
    run.set_summary(results.summary())


if __name__ == "__main__":
    with stage_run("evaluate", sys.argv[1]) as run:
        evaluate(run)
