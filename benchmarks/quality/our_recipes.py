"""The recipes of grouped integers that are compared with other tools."""

from typing import Any

MOST_REFINED_BITS = 3  # with more of them refinement brings nothing


def our_recipes(bits: int, group_size: int) -> dict[str, dict[str, Any]]:
    """Return our recipes on one grid: name in the table → options."""
    grid = {"bits": bits, "group_size": group_size, "symmetric": False}
    gptq = {"method": "gptq", **grid}
    awq = {"method": "awq", **grid}
    best = awq | {"rounding": "gptq", "curvature": True}
    recipes = {
        "rtn": {"method": "rtn", **grid},
        "awq": awq,
        "gptq": gptq,
        "gptq symmetric": gptq | {"symmetric": True},
        "awq + gptq": awq | {"rounding": "gptq"},
        "gptq + curvature": gptq | {"curvature": True},
        "awq + gptq + curvature": best,
    }
    if bits <= MOST_REFINED_BITS:
        refined = {"refine": {"steps": 16}}
        recipes |= {
            "gptq, refined": gptq | refined,
            "awq + gptq + curvature, refined": best | refined,
        }
    return recipes
