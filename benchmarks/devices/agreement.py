"""How far two devices agree on statistics and on quantized models."""

from pathlib import Path

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.quantized.store import QuantizedModel


def relative_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return |second - first| / |first|, by the Euclidean norm of all values."""
    distance = np.linalg.norm(second.astype(np.float64) - first)
    return float(distance / np.linalg.norm(first.astype(np.float64)))


def compare_calibrations(cpu: Path, gpu: Path) -> dict[str, float]:
    """Return the largest relative difference of a layer between two folders of statistics.

    Returns:
        By the keys of benchmarks/results: {moment: of the hessian H, peak: of input_peak, factors:
        of fisher_out G}.
    """
    first = CalibrationStore(cpu)
    second = CalibrationStore(gpu)
    readers = {
        "moment": CalibrationStore.hessian,
        "peak": CalibrationStore.input_peak,
        "factors": CalibrationStore.fisher_out,
    }
    return {
        key: max(
            relative_difference(read(first, layer), read(second, layer)) for layer in first.layers
        )
        for key, read in readers.items()
    }


def compare_quantized(cpu: Path, gpu: Path) -> dict[str, float]:
    """Return how far two quantized models agree.

    Returns:
        {alike: share of integers or floats that are equal, error_over_cpu: the sum of the layers'
        output errors on the GPU over that on the CPU}.
    """
    first = QuantizedModel(cpu)
    second = QuantizedModel(gpu)
    equal = 0
    count = 0
    for layer in first.linears:
        values = next(iter(first.linear(layer).parts().values()))
        others = next(iter(second.linear(layer).parts().values()))
        equal += int(np.sum(values == others))
        count += values.size
    return {
        "alike": equal / count,
        "error_over_cpu": _output_error(second) / _output_error(first),
    }


def _output_error(quantized: QuantizedModel) -> float:
    """Return the sum of the layers' output errors."""
    return sum(layer["error"] for layer in quantized.report["layers"].values())
