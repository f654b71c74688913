"""The recipes of grouped integers that are compared with other tools."""

from typing import Any


def our_recipes(bits: int, group_size: int) -> dict[str, dict[str, Any]]:
    """Return our recipes on one grid: name in the table → options."""
    grid = {"bits": bits, "group_size": group_size, "symmetric": False}
    gptq = {"method": "gptq", **grid}
    awq = {"method": "awq", **grid}
    return {
        "rtn": {"method": "rtn", **grid},
        "awq": awq,
        "gptq": gptq,
        "gptq symmetric": gptq | {"symmetric": True},
        "awq + gptq": awq | {"rounding": "gptq"},
        "gptq + curvature": gptq | {"curvature": True},
        "awq + gptq + curvature": awq | {"rounding": "gptq", "curvature": True},
    }
