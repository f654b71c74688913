"""What a grid is called in a budget."""


def grid_label(bits: int, group_size: int) -> str:
    """Return what the report calls a grid, such as w4g128."""
    return f"w{bits}g{group_size}"


def parse_grid(label: str) -> tuple[int, int]:
    """Return bits and group size of what `grid_label` returned."""
    bits, group_size = label.removeprefix("w").split("g")
    return int(bits), int(group_size)
