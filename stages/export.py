"""Write one deliverable bundle, read it back, and try it in the runtime that will serve it.

python -m stages.export gguf-q4_k_m     # → artifacts/exports/gguf-q4_k_m/
"""

import sys
from pathlib import Path
from typing import Any

from quantline.formats.bundle.export import export_bundle, summarize
from quantline.paths import EXPORTS, MODEL, QUANTIZED
from quantline.quantized.store import open_quantized
from quantline.run.stage import StageRun, stage_run
from quantline.runtimes.converted_logits import check_logits
from quantline.tracking.run_content import variant_run
from stages.smoke import try_bundle

LOGGED = ("size_bytes", "bits_per_weight", "substituted_share")


def export(run: StageRun) -> None:
    """Run the stage."""
    name = run.name
    variant = run.params.variants[name]
    recipe = run.params.recipes[variant.recipe]
    quantized = open_quantized(QUANTIZED / variant.recipe, variant.recipe, recipe)

    def check(converted: Any) -> None:
        evaluation = run.params.evaluation
        check_logits(converted, evaluation.limits, evaluation.speed.threads)

    def smoke(folder: Path, rows: int) -> dict[str, Any]:
        return try_bundle(run, folder, rows)

    with run.output(EXPORTS / name) as folder:
        manifest = export_bundle(name, variant, MODEL, quantized, folder, check, smoke, run.run_id)
        run.inputs.record(folder)
    for limit in manifest["limits"]:
        run.event("warning", f"{name}: {limit}")
    run.track(
        **variant_run(manifest),
        metrics={key: manifest[key] for key in LOGGED},
        files=[EXPORTS / name / "manifest.json", EXPORTS / name / "smoke.json"],
    )
    run.set_summary(summarize(manifest))


if __name__ == "__main__":
    with stage_run("export", sys.argv[1]) as run:
        export(run)
