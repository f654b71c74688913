"""What a budget chose, and the uniform variant that stands beside it."""

import json
from dataclasses import replace

import pytest

from quantline.config.compose import load_params
from quantline.files import write_json
from quantline.paths import EXPORTS
from quantline.report.budgets import budget_summary, describe_counterpart, uniform_counterpart
from quantline.report.build import collect_report
from quantline.report.markdown import render_markdown
from quantline.report.page import render_page
from quantline.report.variant import VariantRow
from tests.helpers.report import LINEAGE, make_report, make_row, write_measured

BUDGET = {
    "predicted": 0.02,
    "price_per_mib": 0.004,
    "unit": "nats of KL divergence per token",
    "rounding": "kquant",
    "counts": {"Q3_K": 5, "Q6_K": 2},
}


def kquant_row(
    name: str,
    size: float,
    kld: float,
    method: str = "kquant",
    budget: dict | None = None,
    **fields,
) -> VariantRow:
    recipe = {
        "name": name,
        "method": method,
        "mix": "Q4_K_M",
        "importance": True,
        "budget": {} if budget else None,
    }
    lineage = LINEAGE | {"recipe": recipe}
    return make_row(name, size, kld, lineage=lineage, budget=budget, **fields)


def test_uniform_counterpart_is_the_nearest_in_size_of_the_same_method():
    fitted = kquant_row("fitted", 3.0, 0.02, budget=BUDGET)
    rows = [
        fitted,
        kquant_row("far", 2.0, 0.04),
        kquant_row("near", 3.1, 0.05),
        kquant_row("curvature", 3.0, 0.01, method="kquant-curvature"),
        kquant_row("onnx", 3.0, 0.01, format="onnx", runtime="onnxruntime"),
        kquant_row("other", 3.0, 0.01, budget=BUDGET),
        replace(kquant_row("failed", 3.0, 0.01), status="failed"),
    ]
    fitted.beside = uniform_counterpart(fitted, rows)
    assert fitted.beside["variant"] == "near"
    assert fitted.beside["size_bytes"] == 3.1 * 2**20
    assert fitted.beside["mean_kld"] == 0.05
    assert fitted.beside["kld_change"] == pytest.approx(-0.6)
    expected = "fitted beside near of 3.10 MiB: KL divergence -60 %"
    assert describe_counterpart(fitted) == expected


def test_uniform_counterpart_is_none_where_nothing_is_alike():
    fitted = kquant_row("fitted", 3.0, 0.02, budget=BUDGET)
    other = kquant_row("curvature", 3.0, 0.01, method="kquant-curvature")
    assert uniform_counterpart(fitted, [fitted, other]) is None
    assert uniform_counterpart(kquant_row("plain", 3.0, 0.02), [fitted]) is None


def test_uniform_counterpart_that_is_exact_has_no_change():
    fitted = kquant_row("fitted", 3.0, 0.02, budget=BUDGET)
    fitted.beside = uniform_counterpart(fitted, [kquant_row("exact", 3.0, 0.0)])
    assert fitted.beside["kld_change"] is None
    assert describe_counterpart(fitted).endswith("exact of 3.00 MiB")


def test_budget_summary_counts_what_was_chosen():
    chosen = {
        "a": {"what": "Q6_K", "cost": 0.1, "bytes": 1},
        "b": {"what": "Q3_K", "cost": 0.1, "bytes": 1},
        "c": {"what": "Q3_K", "cost": 0.1, "bytes": 1},
    }
    expected = {"predicted": 0.3, "price_per_mib": 0.01, "unit": "u", "rounding": "gptq"}
    step = expected | {"step": "budget", "chosen": chosen, "types": []}
    summary = budget_summary({"transforms": [{"step": "load"}, step]})
    assert summary == expected | {"counts": {"Q3_K": 2, "Q6_K": 1}}
    assert budget_summary({"transforms": [{"step": "load"}]}) is None


@pytest.mark.parametrize("unit", [BUDGET["unit"], "share of the squared output"])
def test_page_has_a_table_of_budgets_where_there_are_some(unit):
    fitted = kquant_row("fitted", 3.0, 0.02, budget=BUDGET | {"unit": unit})
    near = kquant_row("<near>", 3.1, 0.05)
    fitted.beside = uniform_counterpart(fitted, [fitted, near])
    report = make_report([fitted, near])
    html = render_page(report)
    assert "Fitted to a budget" in html and 'href="#budgets"' in html
    assert "5 Q3_K, 2 Q6_K" in html
    assert "&lt;near&gt;: 3.10 MiB" in html and "KL divergence -60 %" in html
    assert "0.02000" in html
    in_nats = unit.startswith("nats")
    assert ("rounded by kquant" in html) == in_nats
    assert ("-0.00400" in html) == in_nats
    text = render_markdown(report)
    assert "- fitted beside &lt;near> of 3.10 MiB: KL divergence -60 %" in text
    plain = render_page(replace(report, variants=[near]))
    assert "Fitted to a budget" not in plain and "#budgets" not in plain


def test_collect_report_has_both_of_a_pair(project):
    project.compose("suite=quick", "+recipe=[q4_k_m-budget]", "+variant=[gguf-q4_k_m-budget]")
    step = {
        "step": "budget",
        "predicted": 0.3,
        "price_per_mib": 0.01,
        "unit": "nats",
        "rounding": "ggml",
        "chosen": {"a": {"what": "Q6_K", "cost": 0.1, "bytes": 1}},
    }
    params = load_params()
    measured = [
        ("gguf-q4_k_m", 3.1, 0.04, []),
        ("gguf-q4_k_m-budget", 3.0, 0.02, [step]),
    ]
    for name, size, kld, transforms in measured:
        write_measured(name, size, kld)
        path = EXPORTS / name / "manifest.json"
        recipe = params.variants[name].recipe
        options = {"name": recipe} | params.recipes[recipe].model_dump(mode="json")
        manifest = json.loads(path.read_text())
        write_json(path, manifest | {"transforms": transforms, "recipe": options})
    rows = {row.variant: row for row in collect_report(params).variants}
    fitted = rows["gguf-q4_k_m-budget"]
    assert fitted.budget["counts"] == {"Q6_K": 1}
    assert fitted.beside["variant"] == "gguf-q4_k_m"
    assert fitted.beside["kld_change"] == pytest.approx(-0.5)
    assert rows["gguf-q4_k_m"].budget is None
    assert rows["gguf-q4_k_m"].beside is None
