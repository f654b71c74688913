"""The bytes that a container takes for a model of grouped integers, as a budget counts them."""

import math
from typing import Protocol

from quantline.config.recipes import Bits
from quantline.formats.onnx.sizes import ALIGNMENT, fits_inside, is_large, rounded_bytes
from quantline.model.dtypes import NUMPY_DTYPES
from quantline.model.tensor_source import TensorSource
from quantline.recipes.budget.grid_labels import parse_grid

# Bytes at most, besides the name: of a tensor in the header of a safetensors file; of a layer that
# is listed in config.json, with larger numbers in the header; of a grid in config.json.
HEADER_BYTES = 120
LISTED_BYTES = 40
GRID_BYTES = 400
# Reserved for the nodes of a graph, a layer's share of them: SmolLM2's takes 7,100 bytes for each.
NODE_BYTES = 12 << 10
GRID_NODE_BYTES = 160  # by which a layer's nodes on one grid are larger than on another, at most
PARTS_OF_LAYER = 3  # tensors of a rounded layer


class ContainerSizes(Protocol):
    """Sizes in one container.

    Attributes:
        rounds_outside: Whether it holds the embedding and the head in integers.
    """

    rounds_outside: bool

    def worthwhile_bits(self, bits: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """Return those bits of a layer that save room."""

    def layer(self, name: str, grid: str, symmetric: bool) -> int:
        """Return the bytes of a weight on a grid, such as w4g128."""

    def other(self, name: str) -> int:
        """Return the bytes of a tensor that is not rounded."""

    def overhead(self, weights: set[str]) -> int:
        """Return the bytes besides tensors, at most, where these weights are rounded."""

    def extra_overhead(self, weights: set[str], grids: int) -> int:
        """Return by how many bytes that is more with so many grids than with one, at most."""


class SafetensorsSizes:
    """Sizes in the layout compressed-tensors."""

    rounds_outside = False

    def __init__(self, source: TensorSource) -> None:
        """Take the unquantized model."""
        self.source = source

    def worthwhile_bits(self, bits: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """Return all of them."""
        return bits

    def layer(self, name: str, grid: str, symmetric: bool) -> int:
        """Return the bytes of a weight on a grid."""
        return packed_bytes(
            self.source.shape(name), *parse_grid(grid), symmetric, self._bytes_per_number(name)
        )

    def other(self, name: str) -> int:
        """Return the bytes of a tensor that is not rounded."""
        return math.prod(self.source.shape(name)) * self._bytes_per_number(name)

    def _bytes_per_number(self, name: str) -> int:
        """Return the bytes of a number of a source tensor, which its scales have too."""
        return NUMPY_DTYPES[self.source.stored_dtype(name)].itemsize

    def overhead(self, weights: set[str]) -> int:
        """Return the bytes of the header."""
        total = sum(len(name) + HEADER_BYTES for name in self.source.names)
        return total + sum(3 * (len(name) + HEADER_BYTES) for name in weights)

    def extra_overhead(self, weights: set[str], grids: int) -> int:
        """Return the bytes of grids in config.json and of larger numbers in the header."""
        return GRID_BYTES * grids + sum(len(name) + LISTED_BYTES for name in weights)


class OnnxSizes:
    """Sizes in a graph for onnxruntime."""

    rounds_outside = True

    def __init__(self, source: TensorSource) -> None:
        """Take the unquantized model."""
        self.source = source

    def worthwhile_bits(self, bits: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """Return those without 3, if 4 is among them, which takes the same slot."""
        return tuple(number for number in bits if number != 3 or 4 not in bits)

    def layer(self, name: str, grid: str, symmetric: bool) -> int:
        """Return the bytes of a weight on a grid."""
        return rounded_bytes(self.source.shape(name), *parse_grid(grid), symmetric)

    def other(self, name: str) -> int:
        """Return the bytes of a tensor that is not rounded."""
        shape = self.source.shape(name)
        stored = self.source.stored_dtype(name)
        if not stored.startswith(("F", "BF")):
            return math.prod(shape) * NUMPY_DTYPES[stored].itemsize
        return math.prod(shape) * (2 if is_large(shape) else 4)

    def overhead(self, weights: set[str]) -> int:
        """Return what is reserved for nodes and for the ends of pages."""
        return NODE_BYTES * len(weights) + self._page_ends(weights)

    def _page_ends(self, weights: set[str]) -> int:
        """Return the bytes before tensors that begin at a page of a data file, at most."""
        if fits_inside(self.source, weights):
            return 0
        return ALIGNMENT * (len(self.source.names) + PARTS_OF_LAYER * len(weights))

    def extra_overhead(self, weights: set[str], grids: int) -> int:
        """Return what other grids can add to nodes, and to the ends of pages."""
        return GRID_NODE_BYTES * len(weights) + self._page_ends(weights)


SIZES: dict[str, type[SafetensorsSizes] | type[OnnxSizes]] = {
    "onnx": OnnxSizes,
    "safetensors": SafetensorsSizes,
}


def packed_bytes(
    shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, scale_bytes: int
) -> int:
    """Return the bytes of a layer in the layout compressed-tensors.

    Those are words along the inputs, words of zero points along the outputs, scales, and the shape
    (quantline/formats/safetensors/layouts/compressed_tensors.py).

    Args:
        shape: (out, in).
        bits: Of a weight.
        group_size: Of the grid; -1 is the whole row.
        symmetric: Whether there are no zero points.
        scale_bytes: Bytes of a scale.
    """
    rows, columns = shape
    groups = 1 if group_size == -1 else columns // group_size
    words = rows * -(-columns * bits // 32)
    if not symmetric:
        words += -(-rows * bits // 32) * groups
    return 4 * words + scale_bytes * rows * groups + 16
