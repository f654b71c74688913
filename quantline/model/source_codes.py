"""The codes of a quantized source, kept beside the plain tensors that they stand for.

Where a recipe gives a tensor the type that the source has it in, rounding the plain tensor again
could only lose; the source's own blocks are taken as they are.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import safe_open

FILE = "source_codes.ggml"  # safetensors, but none of the model's weights
BETWEEN = "/"  # the type of the blocks and the name of the tensor


def key_of(name: str, ggml_type: str) -> str:
    """Return what the blocks of a tensor are called in the file."""
    return f"{ggml_type}{BETWEEN}{name}"


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

    def blocks(self, name: str, ggml_type: str) -> np.ndarray | None:
        """Return the source's blocks of a tensor, in the checkpoint's order of rows.

        Args:
            name: Of the tensor.
            ggml_type: The type that is wanted.

        Returns:
            uint8 [rows, bytes per row]; None if the source has the tensor in another type.
        """
        key = key_of(name, ggml_type)
        if key not in self.keys:
            return None
        with safe_open(self.path, "np") as file:
            return file.get_tensor(key)
