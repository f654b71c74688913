"""Does a container hold what it was asked to hold? Every tensor is read back."""

from pathlib import Path
from typing import Any

import numpy as np

from quantline.errors import Failure, StageError
from quantline.formats.container import Container
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel
from quantline.run.progress import progress


def check_container(
    container: Container[Any],
    folder: Path,
    source: TensorSource,
    quantized: QuantizedModel,
    requested: dict[str, str],
    fail_on_substitution: bool,
) -> dict[str, dict[str, Any]]:
    """Read every tensor back and compare it, exactly, with what it has to be.

    Args:
        container: The container of the bundle.
        folder: The bundle.
        source: The unquantized model.
        quantized: The quantized weights.
        requested: Source tensor → the type that was asked for.
        fail_on_substitution: Whether another type than that is a failure.

    Returns:
        The manifest's `tensors`: name → {requested, actual, bits_per_weight, bytes, weights}.

    Raises:
        StageError: readback_mismatch, type_substituted.
    """
    stored = container.read_back(folder, source)
    tensors: dict[str, dict[str, Any]] = {}
    for name in progress((*source.names, *source.passed), "reading back", "tensor"):
        if name not in requested or name not in stored:
            raise StageError(
                Failure.READBACK_MISMATCH,
                f"expected {name} in the container, found no such tensor; please report it",
            )
        tensor = stored[name]
        if tensor.shape != source.shape(name):
            raise StageError(
                Failure.READBACK_MISMATCH,
                f"expected {name} to be {source.shape(name)}, found {tensor.shape}; please report "
                "it",
            )
        # array_equal is false for NaN, which no tensor may hold.
        expected = container.expected(source, quantized, name, tensor.type)
        if not np.array_equal(tensor.dequantize(), expected):
            raise StageError(
                Failure.READBACK_MISMATCH,
                f"{name} reads back with other values than were written; the {tensor.type} in the "
                "container does not hold them",
            )
        tensors[name] = {
            "requested": requested[name],
            "actual": tensor.type,
            "bits_per_weight": round(tensor.bits, 4),
            "bytes": tensor.bytes,
            "weights": tensor.weights,
        }
    if fail_on_substitution:
        _refuse_substitutions(source, tensors)
    return tensors


def _refuse_substitutions(source: TensorSource, tensors: dict[str, dict[str, Any]]) -> None:
    """Raise StageError(type_substituted) if a tensor has another type than was asked for."""
    substituted = [
        name for name, tensor in tensors.items() if tensor["requested"] != tensor["actual"]
    ]
    if not substituted:
        return
    name = substituted[0]
    requested = tensors[name]["requested"]
    raise StageError(
        Failure.TYPE_SUBSTITUTED,
        f"expected {requested} for {name} and {len(substituted) - 1} more, found "
        f"{tensors[name]['actual']}: the container has no {requested} for rows of "
        f"{source.shape(name)[-1]} weights; choose another type, or substitution: report",
    )


def substitutions(tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarize which types were stored in place of those that were asked for.

    Args:
        tensors: The manifest's `tensors`.

    Returns:
        Per pair of types {requested, actual, tensors, share}, where `share` is that of the
        model's weights.
    """
    weights = sum(tensor["weights"] for tensor in tensors.values())
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, tensor in tensors.items():
        pair = (tensor["requested"], tensor["actual"])
        if pair[0] != pair[1]:
            pairs.setdefault(pair, []).append(name)
    return [
        {
            "requested": requested,
            "actual": actual,
            "tensors": names,
            "share": sum(tensors[name]["weights"] for name in names) / weights,
        }
        for (requested, actual), names in sorted(pairs.items())
    ]
