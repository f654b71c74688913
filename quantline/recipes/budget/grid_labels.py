"""What a grid is called in a budget, and the bytes that a layer takes on it."""


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


def grid_label(bits: int, group_size: int) -> str:
    """Return what the report calls a grid, such as w4g128."""
    return f"w{bits}g{group_size}"


def parse_grid(label: str) -> tuple[int, int]:
    """Return bits and group size of what `grid_label` returned."""
    bits, group_size = label.removeprefix("w").split("g")
    return int(bits), int(group_size)
