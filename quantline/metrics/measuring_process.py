"""The fresh process in which a bundle is measured, in the runtime that will serve it."""

from pathlib import Path
from typing import Any

from quantline.config.texts import Limits, Speed
from quantline.run.child_process import call_in_child

# Turns that a thread of a runtime waits for others before it gives up its core. Threads of stages
# give it up at once (quantline/__init__.py), which costs llama.cpp most of its speed on small
# models. The demo's Q8_0 on two cores decoded 1,540 to 1,900 tokens/s with 10,000 turns, 220 to 420
# with none, and 1,430 to 1,830 with libgomp's own 300,000; beside three busy processes 420 to 540,
# 140 to 700, and 130 to 230.
AS_SERVED = {"GOMP_SPINCOUNT": "10000"}


def measure_in_child(
    bundle: Path,
    runtime: str,
    reference: Path,
    speed: Speed,
    limits: Limits,
    python: str | None = None,
) -> dict[str, Any]:
    """Measure a bundle in a fresh process.

    Args:
        bundle: Its folder.
        runtime: Name of the runtime.
        reference: Folder of the reference stage.
        speed: How speed is measured.
        limits: Of time and memory.
        python: The interpreter; by default this one.

    Returns:
        {quality, items, speed, runtime_version}.

    Raises:
        StageError: As `measure_bundle` and `call_in_child` do.
    """
    arguments = {
        "bundle": str(bundle),
        "runtime": runtime,
        "reference": str(reference),
        **speed.model_dump(),
    }
    function = "quantline.metrics.measure:measure_bundle"
    label = f"the measuring process of {bundle.name}"
    return call_in_child(function, arguments, limits, label, python, AS_SERVED)
