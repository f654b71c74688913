"""Recipes that tests of the stage quantize run."""

RECIPES = [
    "none",
    "rtn-w4g128",
    "gptq-w4g128",
    "gptq-w4g128-curvature",
    "awq-w4g128",
    "int8",
    "smoothquant-w8a8",
    "fp8-w8a8",
    "q4_k_m",
    "q4_k_m-curvature",
]
CHOOSE_RECIPES = f"recipe=[{','.join(RECIPES)}]"  # an override that adds all of them
