"""What `config_groups` of compressed-tensors says of weights: schemes, and what fits them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from quantline.ingest.dequantize.blocks import grid_of

WHOLE = 0  # of a block's side: as long as the weight's
# Scales that are powers of two, one byte each (E8M0).
EXPONENTS = ("U8", "F8_E8M0")
IN_ORDER = (None, False, "weight", "static")  # of `actorder`: groups of neighbouring inputs


class Scheme(NamedTuple):
    """The form of the weights of a group.

    Attributes:
        kind: int or float.
        bits: Of a code.
        block: Height and width of the block that shares a scale, WHOLE for the weight's own.
        symmetric: Whether there are no zero points.
        in_order: Whether groups are neighbouring inputs; others need the group of each.
        has_divisor: Whether a number for all scales goes with them.
        exponents: Whether scales are powers of two; None where it is not said.
    """

    kind: str
    bits: int
    block: tuple[int, int]
    symmetric: bool = True
    in_order: bool = True
    has_divisor: bool = False
    exponents: bool | None = None

    @property
    def type_name(self) -> str:
        """The name of the type of a code, such as int4."""
        return f"{self.kind}{self.bits}"

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many scales a weight [out, in] has, along each side."""
        return grid_of(shape, self.block_in(shape))

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a block of a weight."""
        height, width = self.block
        return max(height or shape[0], 1), max(width or shape[1], 1)

    def fits(self, scales: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether scales of a shape are those of a weight."""
        grid = self.grid(shape)
        if grid[1] == 1 and self.block[1] == WHOLE and scales == grid[:1]:
            return True
        return scales == grid or (self.block == (WHOLE, WHOLE) and np.prod(scales, dtype=int) == 1)


def scheme_of(weights: Mapping[str, Any]) -> Scheme:
    """Read the arguments of a group's weights.

    Raises:
        ValueError: For values that mean nothing.
        KeyError: For lack of `num_bits`.
        TypeError: For values of another kind.
    """
    kind = str(weights.get("type", "int"))
    bits = weights["num_bits"]
    if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float"):
        raise ValueError(f"weights of {kind} in num_bits {bits!r}")
    strategy = weights.get("strategy")
    size = weights.get("group_size")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise ValueError(f"group_size {size!r}")
    if strategy is None:  # as the library infers it
        strategy = "tensor" if size is None else ("channel" if size == -1 else "group")
    if strategy in ("group", "tensor_group") and (size is None or size < 1):
        raise ValueError(f"strategy {strategy} with group_size {size!r}")
    scale_dtype = weights.get("scale_dtype")
    return Scheme(
        kind,
        bits,
        _block(strategy, size, weights.get("block_structure")),
        weights.get("symmetric", True) is not False,
        weights.get("actorder") in IN_ORDER,
        strategy == "tensor_group",
        None if scale_dtype is None else str(scale_dtype).endswith(("uint8", "e8m0fnu")),
    )


def _block(strategy: Any, size: int | None, structure: Any) -> tuple[int, int]:
    """Return the block that shares a scale."""
    if strategy == "tensor":
        return WHOLE, WHOLE
    if strategy == "channel":
        return 1, WHOLE
    if strategy in ("group", "tensor_group"):
        assert size is not None, "checked by the caller"
        return 1, size
    if strategy != "block":
        raise ValueError(f"strategy {strategy!r} of weights")
    sides = structure.lower().split("x") if isinstance(structure, str) else structure
    height, width = (int(side) for side in sides)
    if min(height, width) < 1:
        raise ValueError(f"block_structure {structure!r}")
    return height, width
