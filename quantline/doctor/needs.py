"""What a whole run will take: seconds, memory and disk, from a model's sizes and a machine's speed.

Seconds follow from the operations of each stage and from what one second of this machine does; of a
stage that has run with the same parameters before, they are those of then. The constants are good
for a factor of two or three.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from quantline.config.ggml_recipes import GgmlRecipe
from quantline.config.params import Params
from quantline.config.recipes import Recipe
from quantline.doctor.refinement import (
    refinement_bytes,
    refinement_disk,
    refinement_operations,
)
from quantline.doctor.sizes import ModelSizes
from quantline.run.events import read_events
from quantline.run.memory import allowed_bytes
from quantline.run.stage_names import run_name

EFFICIENCY = 0.5  # of a stage's products, beside one large product after another
REFERENCE_FLOPS = 1.5e11  # a second, of the machine that the seconds below were measured on
# Method → seconds for a million weights there.
SECONDS = {
    **{"none": 0.0, "rtn": 0.05, "int8": 0.05, "fp8": 0.1, "smoothquant": 0.1},
    **{"gptq": 0.35, "awq": 0.35, "kquant": 0.15, "kquant-curvature": 0.8},
}
OF_ANOTHER_METHOD = 0.35  # a plugin's
WITH_CURVATURE = 2.0  # times as long
WITH_BUDGET = 6.0  # times as long: every tensor is rounded in all ways that it could have
START_S = 8.0  # of a stage: imports
EXPORT_S = 0.1  # for a million parameters: writing, reading back, trying
TO_ONNX = 3.0  # times as long
FIXED_BYTES = 700 << 20  # of a process with torch
LIGHT_BYTES = 300 << 20  # of one without
CALIBRATION_BLOCKS = 8  # times one block's float32 weights, with gradients
QUANTIZE_BLOCKS = 10
RESIDENT_STATES = 1 << 30  # of hidden states in memory; larger ones lie in a file
CALIBRATION_SHARE = 1.4  # bytes of the statistics for each parameter
# Of the calibration by workers, whose modules import torch (a test compares them).
BATCH_TOKENS = 4096
PARTS = 8
FISHER_BLOCK = 512
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Needs(NamedTuple):
    """What a run takes.

    Attributes:
        seconds: Stage, with its recipe or variant → seconds.
        measured: The stages whose seconds are those of an earlier run.
        memory_bytes: The most that a process holds.
        memory_of: The stage that holds it.
        disk_bytes: What is on the disk at the end.
        peak_disk_bytes: The most that is there at once.
    """

    seconds: dict[str, float]
    measured: frozenset[str]
    memory_bytes: float
    memory_of: str
    disk_bytes: float
    peak_disk_bytes: float


def needs_of(params: Params, sizes: ModelSizes, flops: float, before: Mapping[str, float]) -> Needs:
    """Return what a whole run takes from nothing.

    Args:
        params: What is configured.
        sizes: Of the model.
        flops: Operations a second of this machine in float32 products.
        before: Id of a run → the seconds that it took, of earlier runs.
    """
    seconds: dict[str, float] = {"load": START_S + sizes.file_bytes / 2e8}
    seconds["calibrate"] = START_S + calibration_operations(params, sizes) / flops / EFFICIENCY
    tokens = params.evaluation.sequences * params.evaluation.length
    pass_s = 2 * tokens * (sizes.weights + sizes.head_weights) / flops / EFFICIENCY
    seconds["reference"] = START_S + pass_s
    slower = REFERENCE_FLOPS / flops
    for name, recipe in params.recipes.items():
        refined_s = refinement_operations(recipe, params.calibration, sizes) / flops / EFFICIENCY
        seconds[f"quantize {name}"] = START_S + slower * recipe_seconds(recipe, sizes) + refined_s
    speed = params.evaluation.speed
    decoded = (speed.repetitions + 1) * (speed.new_tokens + speed.prompt_tokens / 8)
    for name, variant in params.variants.items():
        times = TO_ONNX if variant.format == "onnx" else 1.0
        exported = times * EXPORT_S * slower * sizes.parameters / 1e6
        seconds[f"export {name}"] = 2 * START_S + exported
        head_s = 2 * tokens * sizes.head_weights / flops / EFFICIENCY
        # Decoding reads all weights for each token.
        decode_s = decoded * 2 * sizes.parameters / flops * 8
        seconds[f"evaluate {name}"] = START_S + pass_s + head_s + decode_s
    seconds["compare"] = START_S
    measured = set()
    for stage in seconds:
        kind, _, instance = stage.partition(" ")
        run_id = run_name(kind, instance or None, params)
        if run_id in before:
            seconds[stage] = before[run_id]
            measured.add(stage)
    memory = memory_of_stages(params, sizes)
    most = max(memory, key=lambda stage: memory[stage])
    disk = disk_bytes(params, sizes)
    passing: float = states_bytes(params, sizes) * (
        sizes.blocks + 5 if params.calibration.curvature else 2
    )
    passing += parts_bytes(params, sizes)
    refined = [
        refinement_disk(recipe, params.calibration, sizes) for recipe in params.recipes.values()
    ]
    passing = max(passing, *refined)
    return Needs(seconds, frozenset(measured), memory[most], most, disk, disk + passing)


def memory_of_stages(params: Params, sizes: ModelSizes) -> dict[str, float]:
    """Return the bytes that each stage holds at most; of those that hold little, none.

    Workers of this machine hold as much each.
    """
    workers = params.executor.workers if params.executor.kind == "local" else 1
    calibrated = (
        FIXED_BYTES
        + CALIBRATION_BLOCKS * 4 * sizes.block_weights
        + min(2 * RESIDENT_STATES, 2 * states_bytes(params, sizes))
    )
    memory: dict[str, float] = {"calibrate": workers * calibrated}
    for name, recipe in params.recipes.items():
        quantized = FIXED_BYTES + QUANTIZE_BLOCKS * 4 * sizes.block_weights
        # Refinement is the stage's own, after its workers are done.
        refined = FIXED_BYTES + refinement_bytes(recipe, params.calibration, sizes)
        memory[f"quantize {name}"] = max(workers * quantized, refined)
    for name, variant in params.variants.items():
        fixed, held = _held_by_runtime(variant.runtime, variant_bytes(params, name, sizes), sizes)
        memory[f"evaluate {name}"] = workers * (fixed + held)
        # The bundle is tried in a process of its own, while the stage waits for it.
        memory[f"export {name}"] = 2 * fixed + held
    return memory


def _held_by_runtime(runtime: str, size: float, sizes: ModelSizes) -> tuple[int, float]:
    """Return the bytes of a runtime's process without a model, and those of the model in it.

    Args:
        runtime: Its name.
        size: Of the bundle.
        sizes: Of the model.
    """
    if runtime == "llama.cpp":
        # It leaves a file in place that is larger than memory.
        return LIGHT_BYTES, size if size <= allowed_bytes() else 0
    if runtime == "transformers":
        return FIXED_BYTES, 4 * sizes.parameters
    return FIXED_BYTES, 2 * size


def parts_bytes(params: Params, sizes: ModelSizes) -> float:
    """Return the bytes of the sums over parts of the text, while workers calibrate."""
    if not params.executor.divides:
        return 0.0
    calibration = params.calibration
    batches = -(-calibration.sequences // max(1, BATCH_TOKENS // calibration.length))
    # Most inputs are those of several layers; of a symmetric matrix half is stored.
    numbers = 4 / 7 * sum(columns**2 / 2 for _, columns in sizes.matrices)
    if calibration.curvature:
        numbers += sum(min(rows, FISHER_BLOCK) * rows for rows, _ in sizes.matrices)
    return 4.0 * numbers * min(batches, PARTS)


def calibration_operations(params: Params, sizes: ModelSizes) -> float:
    """Return the operations of the calibration: passes, and second moments."""
    calibration = params.calibration
    tokens = calibration.sequences * calibration.length
    moments = sum(2 * columns**2 for _, columns in sizes.matrices)
    total = 2 * sizes.weights + 4 / 7 * moments  # most inputs are those of several layers
    if calibration.curvature:
        total += 6 * sizes.weights + 4 * sizes.head_weights + moments
        total += sum(2 * rows * min(rows, 512) for rows, _ in sizes.matrices)
    return tokens * total


def recipe_seconds(recipe: Recipe, sizes: ModelSizes) -> float:
    """Return the seconds in which the reference machine rounds a model by a recipe."""
    seconds = SECONDS.get(recipe.method, OF_ANOTHER_METHOD) * sizes.weights / 1e6
    if getattr(recipe, "curvature", False):
        seconds *= WITH_CURVATURE
    return seconds * WITH_BUDGET if recipe.size_budget is not None else seconds


def bits_of(recipe: Recipe) -> float | None:
    """Return about how many bits a rounded weight has; None if weights stay as they are."""
    if recipe.storage == "none":
        return None
    if isinstance(recipe, GgmlRecipe):
        digit = re.search(r"\d", str(getattr(recipe, "mix", "")))
        return int(digit[0]) + 0.85 if digit else 8.5
    return float(getattr(recipe, "bits", 8)) + 0.3


def variant_bytes(params: Params, name: str, sizes: ModelSizes) -> float:
    """Return about how large a variant's bundle is."""
    variant = params.variants[name]
    plain = sizes.file_bytes / sizes.parameters  # bytes of a parameter as it comes
    if variant.format == "onnx":
        plain = 4.0
    if variant.dtype:
        plain = FLOAT_BYTES[variant.dtype]
    bits = bits_of(params.recipes[variant.recipe])
    if bits is None:
        return plain * sizes.parameters
    rest = sizes.parameters - sizes.weights
    return sizes.weights * bits / 8 + rest * (bits / 8 if variant.format == "gguf" else plain)


def states_bytes(params: Params, sizes: ModelSizes) -> int:
    """Return the bytes of all calibration tokens' hidden states between two blocks."""
    return params.calibration.sequences * params.calibration.length * sizes.hidden * 4


def disk_bytes(params: Params, sizes: ModelSizes) -> float:
    """Return the bytes of all that the stages keep."""
    total = CALIBRATION_SHARE * sizes.parameters
    total += params.evaluation.sequences * params.evaluation.length * sizes.hidden * 4
    total += 2 * sizes.head_weights
    if params.model.source == "hub":
        total += sizes.file_bytes
    for recipe in params.recipes.values():
        total += sizes.weights * (bits_of(recipe) or 0) / 8
    return total + sum(variant_bytes(params, name, sizes) for name in params.variants)


def seconds_before(events: Path) -> dict[str, float]:
    """Return id of a run → its seconds, of the stages that have finished in this project."""
    found = {}
    for event in read_events(events):
        seconds = event["payload"].get("seconds")
        if event["reason_code"] == "stage_finished" and isinstance(seconds, int | float):
            found[str(event.get("run_id"))] = float(seconds)
    return found


def machine_flops() -> float:
    """Return the float32 operations a second of products on what the stages compute on."""
    import time

    import torch

    from quantline.model.device import device

    matrix = torch.rand(1024, 1024, device=device())
    matrix @ matrix
    count = 0
    started = time.perf_counter()
    while count < 4 or time.perf_counter() - started < 0.5:
        float((matrix @ matrix)[0, 0])  # waits for the result
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)
