"""Quantize the model's weights by one recipe, from the shared calibration.

python -m stages.quantize gptq-w4g128     # → artifacts/quantized/gptq-w4g128/
"""

import sys

from quantline.calibration.store import CalibrationStore
from quantline.files import sha256_json
from quantline.formats.gguf.source import source_for_gguf
from quantline.model.checkpoint import Checkpoint
from quantline.paths import CALIBRATION, MODEL, QUANTIZED
from quantline.recipes.inputs_key import inputs_key
from quantline.recipes.quantize import quantize_model, summarize
from quantline.run.stage import StageRun, stage_run


def quantize(run: StageRun) -> None:
    """Run the stage."""
    name = run.name
    recipe = run.params.recipes[name]
    calibration = CalibrationStore(CALIBRATION)
    # ggml's types are rounded from what GGUF files are made of, which may be a converter's file.
    source = source_for_gguf(MODEL) if recipe.storage == "ggml" else Checkpoint(MODEL)
    key = inputs_key(name, recipe, source, calibration)
    with run.resumable_output(QUANTIZED / name, key) as folder:
        report = quantize_model(name, recipe, source, calibration, folder, run.params.executor)
        run.inputs.record(folder)
    summary = summarize(report, recipe)
    for layer, how in summary.fell_back.items():
        run.event("warning", f"{layer}: {how}", payload={"layer": layer})
    run.track(
        key=f"recipe:{name}:{sha256_json(report)}",
        name=f"quantize {name}",
        params=report["recipe"],
        metrics=summary.metrics,
        files=[QUANTIZED / name / "quantized.json"],
    )
    run.set_summary(summary.text)


if __name__ == "__main__":
    with stage_run("quantize", sys.argv[1]) as run:
        quantize(run)
