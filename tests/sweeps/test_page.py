"""The page over a grid, and what stands beside it."""

import csv
import io
import json

import pytest

from quantline.sweeps.curves import curve_axis, curves_of, curves_svg
from quantline.sweeps.grid_report import make_report
from quantline.sweeps.page import adopting, render_csv, render_page, write_pages
from quantline.sweeps.results import Result, without_twins
from tests.helpers.report import make_row
from tests.helpers.sweeps import AXES, grid_report, make_result, small_plan


def test_curves_run_along_the_bits_one_for_each_combination_of_the_rest():
    results = [make_result(b, g, 0.1 / float(b)) for b in ("4", "3") for g in ("32", "128")]
    results.append(Result(make_row("bf16", 10, 0.0), "bf16", "none", {}))
    assert curve_axis(list(AXES)) == "recipes.gptq.bits"
    curves = curves_of(results, curve_axis(list(AXES)))
    assert list(curves) == ["gptq, group_size 128", "gptq, group_size 32"]
    for points in curves.values():
        assert [point.choice["recipes.gptq.bits"] for point in points] == ["3", "4"]


@pytest.mark.parametrize(
    ("keys", "along"),
    [
        (["seed", "recipes.q.mix"], "recipes.q.mix"),
        (["recipes.g.budget.bits_per_weight"], "recipes.g.budget.bits_per_weight"),
        (["seed", "calibration.sequences"], "seed"),
        ([], None),
    ],
)
def test_curve_axis_is_what_changes_the_bits(keys, along):
    assert curve_axis(keys) == along


def test_curves_of_one_method_in_two_formats_say_which():
    results = [make_result("3", "32", 0.1), make_result("3", "32", 0.2, format="onnx")]
    assert list(curves_of(results, "recipes.gptq.bits")) == [
        "gptq (gguf), group_size 32",
        "gptq (onnx), group_size 32",
    ]


def test_curves_svg_is_the_same_each_time_and_says_its_points():
    measured = grid_report().measured
    drawn = curves_svg(measured, list(AXES), "gptq-bits3-group_size32")
    assert drawn == curves_svg(measured, list(AXES), "gptq-bits3-group_size32")
    assert "gptq, group_size 32: 3.50 bits 0.03, 4.50 bits 0.004" in drawn
    for words in ("the pick", "the Pareto front"):
        assert words in drawn


def test_page_shows_the_pick_how_to_adopt_it_and_what_failed():
    page = render_page(grid_report())
    assert "Ship gptq-bits3-group_size32" in page
    assert "quantline repro recipes.gptq-w4g128.bits=3 recipes.gptq-w4g128.group_size=32" in page
    assert "1 has no figures" in page
    assert "type_substituted" in page
    assert "&lt;b&gt;inverted&lt;/b&gt;" in page
    assert page.count("<svg") == 3


def test_page_without_a_pick_or_figures_says_so():
    failed = grid_report().failed
    page = render_page(grid_report(results=failed, pick=None, reasons=["none meets it"]))
    assert "Nothing meets the target laptop" in page
    assert "Nothing was measured" in page
    assert "Make it the project" not in page


def test_page_of_a_search_says_what_it_looked_for():
    page = render_page(grid_report(search={"said": ["12 of 40 experiments"]}))
    assert "12 of 40 experiments" in page


def test_adopting_what_the_project_has_needs_no_command():
    assert adopting(Result(make_row("a", 1, 0.1), "a", "rtn", {})) == ""


def test_csv_has_a_line_for_each_variant():
    lines = list(csv.DictReader(io.StringIO(render_csv(grid_report()))))
    assert [line["recipes.gptq.bits"] for line in lines] == ["4", "3", "3", "", "4"]
    assert [line["pick"] for line in lines].count("true") == 1
    assert lines[0]["mean_kld"] == "0.004"
    assert (lines[-1]["status"], lines[-1]["mean_kld"]) == ("failed", "")


def test_write_pages_writes_json_that_a_program_can_read(tmp_path):
    page, data, table = write_pages(grid_report(), tmp_path)
    assert page.name == "gptq-bits-group_size.html"
    content = json.loads(data.read_text())
    assert content["pick"] == "gptq-bits3-group_size32"
    assert content["variants"][0]["choice"] == {
        "recipes.gptq.bits": "4",
        "recipes.gptq.group_size": "32",
    }
    assert table.read_text().startswith("variant,method,format,recipes.gptq.bits")


def test_what_an_experiment_has_too_is_not_shown_twice():
    made = make_result("4", "128", 0.1)
    same = Result(make_row("gptq-w4g128", 4, 0.1), "gptq-w4g128", "gptq", {})
    other = Result(make_row("rtn-w4g128", 4, 0.2), "rtn-w4g128", "rtn", {})
    other.row.metrics["artifact_sha256"] = "cd" * 32
    assert without_twins([made, same, other]) == [made, other]


def test_make_report_ranks_experiments_and_the_projects_own_together():
    plan = small_plan("target=any", "recipes.gptq.bits=3,4")
    results = [make_result("4", "32", 0.004), make_result("3", "32", 0.03)]
    for number, result in enumerate(results):
        result.row.metrics["artifact_sha256"] = f"{number}" * 64
    report = make_report(plan, "s", results, "quantline sweep", "c" * 40, None)
    assert report.pick == "gptq-bits3-group_size32"  # the smaller of two within the gates
    assert report.results[0].row.variant == "gptq-bits4-group_size32"
    assert report.axes == {"recipes.gptq.bits": ["3", "4"]}
    assert [row["variant"] for row in report.for_terminal()["variants"]] == [
        "gptq-bits4-group_size32",
        "gptq-bits3-group_size32",
    ]
