"""The codes of a quantized source, kept beside the plain tensors that they stand for.

Where a recipe gives a tensor the very form that the source has it in, rounding the plain tensor
again could only lose; the source's own codes are taken as they are.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import safe_open

from quantline.quantized.tensors import GroupedLinear, QuantizedTensor

FILE = "source_codes.bin"  # safetensors, but none of the model's weights
BETWEEN = "/"  # the form of the codes, the name of the tensor, and the part
GROUPED_PARTS = ("integers", "scales", "zeros")


def form_of(linear: GroupedLinear) -> str:
    """Name the form of integers in groups."""
    symmetry = "symmetric" if linear.symmetric else "asymmetric"
    return f"{linear.kind}-g{linear.group_size}-{symmetry}"


def blocks_key(name: str, ggml_type: str) -> str:
    """Return what ggml's blocks of a tensor are called in the file."""
    return f"{ggml_type}{BETWEEN}{name}"


def grouped_key(layer: str, linear: GroupedLinear, part: str) -> str:
    """Return what a part of a layer's integers is called in the file."""
    return BETWEEN.join((form_of(linear), layer, part))


class SourceCodes:
    """The codes in a model's folder, if there are any."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self.path = folder / FILE

    @cached_property
    def keys(self) -> frozenset[str]:
        """What the file holds."""
        if not self.path.is_file():
            return frozenset()
        with safe_open(self.path, "np") as file:
            return frozenset(file.keys())

    def _read(self, key: str) -> np.ndarray:
        with safe_open(self.path, "np") as file:
            values: np.ndarray = file.get_tensor(key)
        return values

    def blocks(self, name: str, ggml_type: str) -> np.ndarray | None:
        """Return the source's blocks of a tensor, in the checkpoint's order of rows.

        Args:
            name: Of the tensor.
            ggml_type: The type that is wanted.

        Returns:
            uint8 [rows, bytes per row]; None if the source has the tensor in another type.
        """
        key = blocks_key(name, ggml_type)
        return self._read(key) if key in self.keys else None

    def grouped(self, layer: str, wanted: QuantizedTensor) -> GroupedLinear | None:
        """Return the source's integers of a layer.

        Args:
            layer: The module's name.
            wanted: A rounding of the layer in the form that is wanted.

        Returns:
            None if the source has the layer in another form.
        """
        if not isinstance(wanted, GroupedLinear):
            return None
        if grouped_key(layer, wanted, GROUPED_PARTS[0]) not in self.keys:
            return None
        return GroupedLinear.from_parts(
            lambda part: self._read(grouped_key(layer, wanted, part)), wanted.describe()
        )
