"""What quantized.json says of each layer, and the check that none is worse than plain rounding."""

from typing import Any

import torch

from quantline.errors import Failure, StageError
from quantline.methods.integer.curvature import error_and_divergence
from quantline.methods.method import LayerStatistics, Prepared
from quantline.quantized.tensors import QuantizedTensor
from quantline.recipes.baseline import BASELINES

TOLERANCE = 1e-6  # share by which two float32 sums of the same errors may differ
# What a recipe minimizes: the first of these that a layer's report has.
MEASURES = ("output_change", "divergence", "error")


class LayerJudge:
    """Compares what is to stand in a layer's place with its weight, and with plain rounding."""

    def __init__(
        self, weight: torch.Tensor, plain: torch.Tensor, statistics: LayerStatistics
    ) -> None:
        """Take a layer, and judge its plain rounding once for all that is compared with it.

        Args:
            weight: The unquantized weight, float32 [out, in].
            plain: The same after plain rounding, float32 [out, in].
            statistics: Of the layer.
        """
        self.weight = weight
        self.plain = plain
        self.statistics = statistics
        self.plain_errors = self._errors(plain)

    def _errors(self, stored: torch.Tensor) -> tuple[float, float | None]:
        difference = stored - self.weight
        return error_and_divergence(difference, self.statistics.hessian, self.statistics.fisher_out)

    def report(
        self,
        linear: QuantizedTensor,
        stored: torch.Tensor,
        coverage: dict[str, Any],
        prepared: Prepared | None,
    ) -> dict[str, Any]:
        """Return what the report says of a layer.

        Args:
            linear: The quantized layer.
            stored: The weight that stands in its place, float32 [out, in].
            coverage: What the calibration says of the tokens that the layer saw.
            prepared: What the method made of the Hessian.

        Returns:
            The error tr(Δ H Δᵀ), and with G the divergence tr(G Δ H Δᵀ) too, each also of plain
            rounding.
        """
        is_plain = torch.equal(stored, self.plain)
        error, divergence = self.plain_errors if is_plain else self._errors(stored)
        rtn_error, rtn_divergence = self.plain_errors
        report = {
            **linear.describe(),
            "shape": list(self.weight.shape),
            **coverage,
            "damping": None if prepared is None else prepared.damping,
            "error": error,
            "rtn_error": rtn_error,
        }
        if divergence is not None:
            report["divergence"] = divergence
            report["rtn_divergence"] = rtn_divergence
        return report


def check_gain(layer: str, report: dict[str, Any], baseline: str) -> None:
    """Check that a layer's figure is at most that of plain rounding; NaN is not.

    The figure is what the recipe minimizes. What lowers the divergence may well raise the error of
    outputs that the model's answer hardly depends on.

    Args:
        layer: The module's name.
        report: Of the layer.
        baseline: The plain rounding, a name in BASELINES.

    Raises:
        StageError: worse_than_round_to_nearest.
    """
    measure = next(name for name in MEASURES if name in report)
    plain = BASELINES[baseline]
    limit = report[f"{baseline}_{measure}"]
    if not report[measure] <= limit * (1 + TOLERANCE):
        raise StageError(
            Failure.WORSE_THAN_ROUND_TO_NEAREST,
            f"{layer} has the {measure} {report[measure]:.4g}, more than {plain.possessive} "
            f"{limit:.4g}; calibrate on more text, or use {plain.method}",
        )
