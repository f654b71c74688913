"""What rounding costs layer by layer, held against a plain rounding: the layers of a variant where it costs most."""

WORST = 8  # of a variant in the report; the manifest has all
# What a recipe minimizes comes first. H: second moments of the layer's inputs; G: those of the gradient at its outputs.
MEASURES = {"divergence": "tr(G ΔW H ΔWᵀ)", "error": "tr(ΔW H ΔWᵀ)", "diagonal_error": "Σ ΔW² diag(H)"}
PLAIN = {"rtn": "round-to-nearest", "ggml": "ggml's own rounding"}


def worst(manifest: dict) -> list[dict]:
    """{name, type, bits, measure, error, plain, plain_error} of the layers with the largest error, first; none for a
    recipe that rounds nothing. `plain_error` is None where no plain rounding compares.
    """
    layers = manifest["layers"]
    measure = next((one for one in MEASURES if any(one in about for about in layers.values())), None)
    told = []
    for name, about in layers.items():
        if measure not in about:
            continue
        plain = next(one for one in PLAIN if f"{one}_{measure}" in about)
        stored = manifest["tensors"].get(name) or manifest["tensors"][f"{name}.weight"]
        told.append({"name": name, "type": stored["actual"], "bits": stored["bits_per_weight"],
                     "measure": MEASURES[measure], "error": about[measure],
                     "plain": PLAIN[plain], "plain_error": about[f"{plain}_{measure}"]})
    return sorted(told, key=lambda layer: (-layer["error"], layer["name"]))[:WORST]
