"""One layer that a method cannot round as it should, or whose statistics are of no use.

It does not stop the others: it is rounded to nearest, or as if all its inputs mattered alike, and
its report says so under `fallback`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from quantline.errors import Failure, StageError
from quantline.recipes.context import QuantizationContext

KEY = "fallback"  # of a layer's report
FAILURE = "failure"  # the name of what the method could not do
# What goes wrong for one layer alone. All else stops the recipe.
CONTAINED = (Failure.HESSIAN_NOT_POSITIVE_DEFINITE, Failure.WORSE_THAN_ROUND_TO_NEAREST)

Result = TypeVar("Result")


def attempt(run: Callable[[], Result]) -> tuple[Result | None, StageError | None]:
    """Return what a call returns, or the failure if it is that of one layer alone.

    Raises:
        StageError: All other failures.
    """
    try:
        return run(), None
    except StageError as error:
        if error.failure not in CONTAINED:
            raise
        return None, error


def say_how(
    ctx: QuantizationContext, layer: str, report: dict[str, Any], failure: StageError | None
) -> None:
    """Say in a layer's report what it was rounded by instead, if anything.

    Args:
        ctx: With the recipe and the calibration.
        layer: The module's name.
        report: Of the layer.
        failure: Why the method's own rounding was not taken; None if it was.
    """
    said = []
    gradients = ctx.recipe.output_statistics != "none"
    for problem in ctx.calibration.problems(layer, gradients):
        said.append(f"rounded as if all mattered alike: {problem}")
    if failure is not None:
        said.append(f"rounded to nearest: {failure.failure}: {failure}")
        report[FAILURE] = str(failure.failure)
    if said:
        report[KEY] = "; ".join(said)


def fallbacks(layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what the reports of layers say under `fallback`."""
    return {name: report[KEY] for name, report in layers.items() if KEY in report}


def check_some_layer(layers: dict[str, dict[str, Any]]) -> None:
    """Check that the method rounded at least one of the layers that it compares with its baseline.

    Args:
        layers: The reports of all layers or tensors.

    Raises:
        StageError: The first failure, if all of those layers have one.
    """
    compared = [report for report in layers.values() if "error" in report]
    failed = [report for report in compared if FAILURE in report]
    if failed and len(failed) == len(compared):
        message = failed[0][KEY].partition(f"{failed[0][FAILURE]}: ")[2]
        raise StageError(Failure(failed[0][FAILURE]), message)
