"""The layers with the largest error in the report."""

from quantline.report.layers import WORST, worst_layers


def make_manifest(**layers: dict) -> dict:
    tensors = {f"{name}.weight": {"actual": "Q4_K", "bits_per_weight": 4.5} for name in layers}
    return {"layers": layers, "tensors": tensors}


def test_worst_layers_have_the_measure_that_the_recipe_minimizes():
    both = {"error": 1.0, "rtn_error": 2.0, "divergence": 3.0, "rtn_divergence": 6.0}
    (row,) = worst_layers(make_manifest(a=both))
    assert row == {
        "name": "a",
        "type": "Q4_K",
        "bits": 4.5,
        "measure": "tr(G ΔW H ΔWᵀ)",
        "error": 3.0,
        "plain": "round-to-nearest",
        "plain_error": 6.0,
    }
    (row,) = worst_layers(make_manifest(a={"error": 1.0, "ggml_error": 2.0}))
    assert row["measure"] == "tr(ΔW H ΔWᵀ)"
    assert (row["plain"], row["plain_error"]) == ("ggml's own rounding", 2.0)
    (row,) = worst_layers(make_manifest(a={"diagonal_error": 1.0, "rtn_diagonal_error": None}))
    assert (row["measure"], row["plain_error"]) == ("Σ ΔW² diag(H)", None)


def test_worst_layers_of_a_recipe_that_rounds_nothing_are_none():
    assert worst_layers(make_manifest()) == []
    assert worst_layers(make_manifest(a={"requested": "F32"})) == []


def test_worst_layers_leaves_the_rest_to_the_manifest():
    layers: dict[str, dict] = {
        f"layer-{number}": {"error": float(number), "rtn_error": 9.0} for number in range(20)
    }
    rows = worst_layers(make_manifest(**layers, norm={}))
    assert [row["name"] for row in rows] == [
        f"layer-{number}" for number in range(19, 19 - WORST, -1)
    ]
