"""What a budget chose on the page, and the uniform variant that stands beside it."""

import json

import pytest
from test_compare import measured
from test_report import LINEAGE, TARGET, row

from stages import compare
from quantline.config.compose import load_params
from quantline.report import budgets, page, selection
from quantline.files import write_json

BUDGET = {"predicted": 0.02, "price_per_mib": 0.004, "unit": "nats of KL divergence per token", "rounding": "kquant",
          "counts": {"Q3_K": 5, "Q6_K": 2}}


def of(name: str, size: float, kld: float, method: str = "kquant", budget: dict | None = None, **more) -> dict:
    recipe = {"name": name, "method": method, "mix": "Q4_K_M", "importance": True, "budget": {} if budget else None}
    return row(name, size, kld, lineage=LINEAGE | {"recipe": recipe}, budget=budget, **more)


def test_the_nearest_in_size_of_the_same_method_stands_beside():
    fitted = of("fitted", 3.0, 0.02, budget=BUDGET)
    rows = [fitted, of("far", 2.0, 0.04), of("near", 3.1, 0.05), of("curved", 3.0, 0.01, method="kquant-curvature"),
            of("onnx", 3.0, 0.01, format="onnx", runtime="onnxruntime"), of("other", 3.0, 0.01, budget=BUDGET),
            of("failed", 3.0, 0.01) | {"status": "failed"}]
    found = budgets.beside(fitted, rows)
    assert (found["variant"], found["size_bytes"], found["mean_kld"]) == ("near", 3.1 * 2**20, 0.05)
    assert found["kld_change"] == pytest.approx(-0.6)
    assert budgets.said(fitted | {"beside": found}) == "fitted beside near of 3.10 MiB: KL divergence -60 %"


def test_where_there_is_none_nothing_stands_beside():
    fitted = of("fitted", 3.0, 0.02, budget=BUDGET)
    assert budgets.beside(fitted, [fitted, of("curved", 3.0, 0.01, method="kquant-curvature")]) is None
    assert budgets.beside(of("plain", 3.0, 0.02), [fitted]) is None
    exact = budgets.beside(fitted, [of("exact", 3.0, 0.0)])
    assert exact["kld_change"] is None and budgets.said(fitted | {"beside": exact}).endswith("exact of 3.00 MiB")


def test_what_was_chosen_is_counted():
    chosen = {"a": {"what": "Q6_K", "cost": 0.1, "bytes": 1}, "b": {"what": "Q3_K", "cost": 0.1, "bytes": 1},
              "c": {"what": "Q3_K", "cost": 0.1, "bytes": 1}}
    step = {"step": "budget", "predicted": 0.3, "price_per_mib": 0.01, "unit": "u", "rounding": "gptq", "chosen": chosen, "types": []}
    assert budgets.told({"transforms": [{"step": "load"}, step]}) == {
        "predicted": 0.3, "price_per_mib": 0.01, "unit": "u", "rounding": "gptq", "counts": {"Q3_K": 2, "Q6_K": 1}}
    assert budgets.told({"transforms": [{"step": "load"}]}) is None


@pytest.mark.parametrize("unit", [BUDGET["unit"], "share of the squared output"])
def test_the_page_has_a_table_of_budgets_where_there_are_some(unit):
    rows = [of("fitted", 3.0, 0.02, budget=BUDGET | {"unit": unit}), of("<near>", 3.1, 0.05)]
    for one in rows:
        one["beside"] = budgets.beside(one, rows)
    chosen, second, reasons = selection.pick(rows, TARGET)
    report = {"model": "m", "parameters": 1e6, "target": TARGET.model_dump(mode="json"), "pick": chosen, "runner_up": second,
              "reasons": reasons, "tokens": 100, "baseline": {"all": 0.9, "facts": 0.91}, "tasks": ["facts"], "variants": rows,
              "commit": "unknown", "params": {"suite": "full", "seed": 0}}
    html, text = page.html(report), page.markdown(report)
    assert "Fitted to a budget" in html and 'href="#budgets"' in html and "5 Q3_K, 2 Q6_K" in html
    assert "&lt;near&gt;: 3.10 MiB" in html and "KL divergence -60 %" in html
    assert ("0.02000" in html) and ("rounded by kquant" in html) == unit.startswith("nats") == ("-0.00400" in html)
    assert "- fitted beside <near> of 3.10 MiB: KL divergence -60 %" in text
    plain = page.html(report | {"variants": rows[1:]})
    assert "Fitted to a budget" not in plain and "#budgets" not in plain


def test_the_report_has_both_of_a_pair(project):
    project.compose("suite=quick", "+recipe=[q4_k_m-budget]", "+variant=[gguf-q4_k_m-budget]")
    step = {"step": "budget", "predicted": 0.3, "price_per_mib": 0.01, "unit": "nats", "rounding": "ggml",
            "chosen": {"a": {"what": "Q6_K", "cost": 0.1, "bytes": 1}}}
    params = load_params()
    for name, size, kld, steps in (("gguf-q4_k_m", 3.1, 0.04, []), ("gguf-q4_k_m-budget", 3.0, 0.02, [step])):
        measured(name, size, kld)
        path = compare.EXPORTS / name / "manifest.json"
        recipe = {"name": params.variants[name].recipe} | params.recipes[params.variants[name].recipe].model_dump(mode="json")
        write_json(path, json.loads(path.read_text()) | {"transforms": steps, "recipe": recipe})
    rows = {one["variant"]: one for one in compare.build(params)["variants"]}
    fitted = rows["gguf-q4_k_m-budget"]
    assert fitted["budget"]["counts"] == {"Q6_K": 1} and fitted["beside"]["variant"] == "gguf-q4_k_m"
    assert fitted["beside"]["kld_change"] == pytest.approx(-0.5)
    assert rows["gguf-q4_k_m"]["budget"] is None and rows["gguf-q4_k_m"]["beside"] is None
