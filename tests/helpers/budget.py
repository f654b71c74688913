"""Projects whose recipes have budgets, and what comes of them."""

from pathlib import Path
from typing import Any

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.errors import Failure, Reason
from quantline.formats.container import load_container
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel
from quantline.recipes.context import QuantizationContext
from tests.helpers.ggml_recipes import context_of, kquant
from tests.helpers.project import Project
from tests.helpers.variants import write_variant

RECIPES = (
    "none",
    "q4_k_m",
    "q4_k_m-budget",
    "q4_k_m-curvature-budget",
    "gptq-w4g128",
    "gptq-w4g128-budget",
)
MODEL = "artifacts/model"
CALIBRATION = "artifacts/calibration"


def compose(project: Project, *overrides: str) -> None:
    """Write params.yaml with the recipes of these tests."""
    project.compose(f"recipe=[{','.join(RECIPES)}]", "variant=[bf16]", *overrides)


def quantize(project: Project, name: str) -> QuantizedModel:
    """Run the stage for a recipe."""
    project.stage("quantize", name)
    return QuantizedModel(f"artifacts/quantized/{name}")


def budget_of(quantized: QuantizedModel) -> dict[str, Any]:
    """Return the step of the manifest that a budget adds."""
    steps = [step for step in quantized.report["transforms"] if step["step"] == "budget"]
    assert len(steps) == 1
    return steps[0]


def options_of(quantized: QuantizedModel) -> dict[str, str]:
    """Return item → the option that was chosen."""
    return {item: option["what"] for item, option in budget_of(quantized)["chosen"].items()}


def export(quantized: QuantizedModel, folder: Path, format: str = "gguf", **options: Any) -> Path:
    """Write a container into a new folder, and return the folder."""
    recipe = quantized.report["recipe"]["name"]
    write_variant(format, folder, Checkpoint(MODEL), quantized, recipe=recipe, **options)
    return folder


def bits_per_weight(bundle: Path, format: str) -> float:
    """Return the bits per weight of a container, as a manifest says them."""
    source = Checkpoint(MODEL)
    stored = load_container(format).read_back(bundle, source)
    bits = 8 * sum(stored[name].bytes for name in source.names)
    return bits / sum(int(np.prod(source.shape(name))) for name in source.names)


def context_in(artifacts: Path, gradients: bool = True) -> QuantizationContext:
    """Return a context for the costs of a project's model."""
    calibration = CalibrationStore(artifacts / "calibration")
    calibration.info["curvature"] = gradients
    return context_of(kquant("Q4_K_M"), Checkpoint(artifacts / "model"), calibration, artifacts)


def assert_refused(project: Project, capsys: Any, name: str, failure: Failure, words: str) -> str:
    """Assert that the stage fails with a named failure; return the event's summary."""
    stopped = None
    try:
        project.stage("quantize", name)
    except SystemExit as stop:
        stopped = stop.code
    assert stopped == 1
    error = capsys.readouterr().err
    assert f"quantize {name}: export_quantization_failed ({failure}): " in error
    assert words in error
    last = project.events()[-1]
    assert last["reason_code"] == Reason.EXPORT_QUANTIZATION_FAILED
    assert last["payload"]["failure"] == failure
    return last["summary"]
