"""What rounding costs layer by layer: the layers of a variant where it costs most."""

from typing import Any

from quantline.recipes.baseline import BASELINES

WORST = 8  # of a variant in the report; the manifest has all
# What a recipe minimizes comes first. H: second moments of the layer's inputs; G: those of the
# gradient at its outputs.
MEASURES = {
    "divergence": "tr(G ΔW H ΔWᵀ)",
    "error": "tr(ΔW H ΔWᵀ)",
    "diagonal_error": "Σ ΔW² diag(H)",
}


def worst_layers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the layers with the largest error, the largest first.

    Returns:
        {name, type, bits, measure, error, plain, plain_error} of each; none for a recipe that
        rounds nothing. `plain` is the baseline that the layer is compared with, and `plain_error`
        is None where it does not apply.
    """
    layers = manifest["layers"]
    measure = _measure_of(layers)
    if measure is None:
        return []
    rows = []
    for name, report in layers.items():
        if measure not in report:
            continue
        baseline = next(key for key in BASELINES if f"{key}_{measure}" in report)
        stored = manifest["tensors"].get(name) or manifest["tensors"][f"{name}.weight"]
        rows.append(
            {
                "name": name,
                "type": stored["actual"],
                "bits": stored["bits_per_weight"],
                "measure": MEASURES[measure],
                "error": report[measure],
                "plain": BASELINES[baseline].label,
                "plain_error": report[f"{baseline}_{measure}"],
            }
        )
    rows.sort(key=lambda row: (-row["error"], row["name"]))
    return rows[:WORST]


def fallbacks(manifest: dict[str, Any]) -> dict[str, str]:
    """Return layer → how it was rounded, of those that are not rounded as the recipe says."""
    layers = manifest["layers"]
    return {name: report["fallback"] for name, report in layers.items() if "fallback" in report}


def _measure_of(layers: dict[str, dict[str, Any]]) -> str | None:
    """Return the first measure that a layer has; None if none has one."""
    for measure in MEASURES:
        if any(measure in report for report in layers.values()):
            return measure
    return None
