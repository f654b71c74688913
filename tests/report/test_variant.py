"""A variant's row as an object and as JSON."""

import json

from quantline.report.variant import VariantRow
from tests.helpers.report import make_row


def test_variant_row_to_json_has_the_keys_that_other_scripts_read():
    row = make_row("a", 2, 0.01)
    assert set(row.to_json()) == {
        "variant", "recipe", "format", "runtime", "status", "failure", "message", "pareto",
        "metrics", "speed", "gates", "lm_eval", "flips", "smoke", "layers", "fallbacks", "budget",
        "beside", "lineage", "memory", "estimated", "substituted_share", "provenance", "objections",
        "why_not", "grids",
    }  # fmt: skip
    assert VariantRow(**json.loads(json.dumps(row.to_json()))) == row


def test_variant_row_figures_have_those_that_the_report_makes():
    row = make_row("a", 2, 0.01, estimated={"decode_tok_s": 50.0})
    assert row.figures["memory_mib"] == 300.0
    assert row.figures["estimated_decode_tok_s"] == 50.0
    assert row.figures["mean_kld"] == 0.01
    assert row.figures["load_s"] == 0.1
