"""What people are told of a model that was read from a quantized source."""

from collections.abc import Iterable, Mapping
from typing import Any


def said_of(transforms: Iterable[Mapping[str, Any]]) -> str:
    """Return a sentence on the reference of a model; "" for one that came in unquantized.

    Args:
        transforms: The steps of a manifest.
    """
    for step in transforms:
        if step["step"] == "dequantize":
            return (
                f"The source is quantized by {step['method']}. What it stands for in "
                f"{step['dtype']} is the reference of every figure, not the model that it was "
                "made of."
            )
    return ""
