"""The room that weights take in a graph: slots and blocks of MatMulNBits, and float16."""

import math
from collections.abc import Collection, Sequence

from quantline.model.tensor_source import TensorSource

LARGEST_INSIDE = 1536 << 20  # bytes of weights in model.onnx itself; protobuf ends at 2 GiB
ALIGNMENT = 4096  # onnxruntime maps a tensor of the data file that starts at a page
# Weights of a matrix that is stored in float16 where other weights are rounded to integers. What is
# smaller, such as norms and states of a recurrence, stays in float32.
LARGE = 1 << 16
BLOCK_SIZES = (256, 128, 64, 32, 16)  # that MatMulNBits and GatherBlockQuantized have
# Of a whole row, that its inputs are rounded in where a weight has eight bits. Smaller ones round
# them more finely, and take longer.
LARGEST_ROUNDED_BLOCK = 32
SCALE_BYTES = 2  # bfloat16 holds the scales of all our grids


def slot_bits(bits: int) -> int:
    """Return the bits that an integer takes in MatMulNBits, which has 2, 4 and 8."""
    return 4 if bits == 3 else bits


def block_size(columns: int, group_size: int, bits: int) -> int | None:
    """Return the largest block that groups consist of, or that wastes least of a whole row.

    Args:
        columns: Weights of a row.
        group_size: Weights that share a scale; as many as a row has if that is the row.
        bits: Of a weight.

    Returns:
        The block size; None if groups are smaller than a row and no block divides them.
    """
    is_row = group_size == columns
    most = LARGEST_ROUNDED_BLOCK if is_row and bits == 8 else BLOCK_SIZES[0]
    sizes = [block for block in BLOCK_SIZES if block <= most]
    fitting = [block for block in sizes if group_size % block == 0]
    if fitting:
        return fitting[0]
    return min(sizes, key=lambda block: -group_size % block) if is_row else None


def rounded_bytes(shape: Sequence[int], bits: int, group_size: int, symmetric: bool) -> int:
    """Return the bytes of a layer in a MatMulNBits node, or of an embedding that is read from it.

    Args:
        shape: (out, in).
        bits: Of a weight.
        group_size: Of the grid, which a block divides; -1 is the whole row.
        symmetric: Whether the zero point is fixed in the middle. A slot that is wider than the
            grid has another middle, so that zero points are stored all the same.
    """
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    block = block_size(columns, size, bits)
    assert block is not None, "budgets have group sizes that blocks divide"
    blocks = -(-columns // block)
    slot = slot_bits(bits)
    has_zeros = not symmetric or slot != bits
    of_row = blocks * (block * slot // 8 + SCALE_BYTES)
    return rows * (of_row + (-(-blocks * slot // 8) if has_zeros else 0))


def is_large(shape: Sequence[int]) -> bool:
    """Whether a tensor that is not rounded is stored in float16 beside those that are."""
    return len(shape) > 1 and math.prod(shape) >= LARGE


def fits_inside(source: TensorSource, rounded: Collection[str]) -> bool:
    """Whether the weights fit into the graph's own file, counted generously.

    Args:
        source: The unquantized model.
        rounded: Those of its tensors that are rounded to integers.
    """
    size = 0
    for name in source.names:
        size += math.prod(source.shape(name)) * (1 if name in rounded else 4)
    return size <= LARGEST_INSIDE
