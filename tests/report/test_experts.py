"""A mixture's experts on the page, in the summaries, and under a target's gates."""

import io
import json

import pytest

from quantline.config.compose import load_params
from quantline.config.targets import Gate
from quantline.files import write_json
from quantline.paths import CALIBRATION, EXPORTS
from quantline.report.build import collect_report
from quantline.report.experts import as_ranges, describe_experts, modules_of_experts
from quantline.report.gates import check_gate
from quantline.report.markdown import render_markdown
from quantline.report.page import MOST_MODULES, render_page
from quantline.report.rows import read_row
from quantline.report.terminal import print_report
from tests.helpers.lonely import write_lonely_mixture
from tests.helpers.report import make_report, make_row, write_measured

NAME = "gguf-q8_0"
TOKENS = [40, 900, 0, 100, 7, 3, 60, 50]
FIGURES = {"experts": 16, "experts_starved": 3, "expert_tokens_min": 0}
GATES = (
    "target.gates=[{metric: experts_starved, operator: '<=', threshold: 0}, "
    "{metric: expert_tokens_min, operator: '>=', threshold: 0}]"
)


def module(block: int, tokens: list[int], starved: list[int]) -> dict:
    name = f"model.layers.{block}.mlp.experts"
    return {"block": block, "module": name, "tokens": tokens, "starved": starved}


EXPERTS = [module(0, [64] * 8, []), module(1, TOKENS, [2, 4, 5])]


def test_modules_of_experts_have_the_fewest_the_median_and_the_most():
    first, second = modules_of_experts(EXPERTS)
    assert first[2:] == (8, 64, 64, 64, 0, "")
    assert second == (1, "model.layers.1.mlp.experts", 8, 0, 45, 900, 3, "2, 4, 5")


def test_as_ranges_is_short_for_neighbours():
    assert as_ranges([]) == ""
    assert as_ranges([4, 5]) == "4, 5"
    assert as_ranges([0, 1, 2, 5, 9, 10, 11, 12]) == "0 to 2, 5, 9 to 12"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_describe_experts_says_how_many_are_starved(count):
    said = describe_experts([module(0, TOKENS, list(range(count)))])
    assert said.startswith({0: "none of 8 experts is"}.get(count, f"{count} of 8 experts"))
    assert describe_experts([]) == ""


def test_the_page_and_the_summaries_name_starved_experts():
    report = make_report([make_row("a", 2, 0.01)])
    assert "What each expert saw" not in render_page(report)
    report.experts = EXPERTS
    page = render_page(report)
    assert page.count("What each expert saw") == 1
    assert '<td class="text">2, 4, 5</td>' in page
    assert "<code>model.layers.1.mlp.experts</code>" in page
    said = "3 of 16 experts are starved"
    assert said in page
    assert f"- {said}" in render_markdown(report)
    file = io.StringIO()
    print_report(report.to_json(), file)
    assert said in file.getvalue()


def test_the_page_of_many_blocks_shows_those_with_starved_experts_first():
    report = make_report([make_row("a", 2, 0.01)])
    report.experts = [module(block, [64] * 8, []) for block in range(MOST_MODULES)]
    report.experts.append(module(MOST_MODULES, TOKENS, [2, 4, 5]))
    page = render_page(report)
    before, _, after = page.partition(f"<summary>all {MOST_MODULES + 1} modules</summary>")
    name = "<code>model.layers.{}.mlp.experts</code>"
    assert name.format(MOST_MODULES) in before and name.format(0) not in before
    assert name.format(MOST_MODULES) in after and name.format(0) in after


@pytest.fixture
def measured(project):
    """A variant that was rounded by a calibration, and one that nothing rounded."""
    project.compose(
        "suite=default", f"variant=[bf16,{NAME}]", "recipe=[none,q8_0]", "target=any", GATES
    )
    write_json(CALIBRATION / "calibration.json", {"experts": EXPERTS})
    write_measured("bf16", 10, 0)
    write_measured(NAME, 5, 0.001, **FIGURES)
    for name, figures in (("bf16", None), (NAME, FIGURES)):
        path = EXPORTS / name / "manifest.json"
        write_json(path, json.loads(path.read_text()) | {"experts": figures})
    return project


def test_a_gate_on_starved_experts_fails_where_the_calibration_counts(measured):
    report = collect_report(load_params())
    assert report.experts == EXPERTS
    rows = {row.variant: row for row in report.variants}
    starved, fewest = rows[NAME].gates
    assert (starved["verdict"], starved["value"]) == ("fails", 3)
    assert fewest["verdict"] == "passes"
    assert [gate["passed"] for gate in rows["bf16"].gates] == [True, True]
    assert all("does not apply" in gate["said"] for gate in rows["bf16"].gates)
    assert report.pick == "bf16"
    assert any("experts" in said for said in rows[NAME].why_not)
    assert "does not apply" in render_page(report)


def test_a_gate_on_experts_fails_if_nothing_says_how_they_are_covered(measured):
    path = EXPORTS / NAME / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["experts"]
    write_json(path, manifest)
    write_measured(NAME, 5, 0.001)
    row = read_row(NAME, load_params())
    assert [gate["verdict"] for gate in row.gates] == ["fails", "fails"]
    assert collect_report(load_params()).experts == []


def test_gates_on_experts_are_exact():
    gate = Gate(metric="experts_starved", operator="<=", threshold=0)
    row = make_row("a", 2, 0.01)
    row.metrics |= FIGURES | {"experts_starved": 0}
    checked = check_gate(gate, row.figures)
    assert (checked["verdict"], checked["interval"]) == ("passes", None)


@pytest.mark.slow
def test_an_expert_that_the_router_never_chooses_is_named_and_fails_its_gate(project):
    """Through all stages: in the figures, on the page, in the pull request's text."""
    write_lonely_mixture(project.root / "lonely")
    recipe = "gptq-w4g32"
    project.compose(
        "model.path=lonely",
        f"variant=[bf16,{recipe}]",
        f"recipe=[none,{recipe}]",
        f"recipes.{recipe}.symmetric=true",
        "evaluation.gold=null",
        "target=any",
        GATES,
    )
    for stage in ("load", "calibrate", "reference"):
        project.stage(stage)
    for name in ("none", recipe):
        project.stage("quantize", name)
    for stage in ("export", "evaluate"):
        for name in ("bf16", recipe):
            project.stage(stage, name)
    report = collect_report(load_params())
    rows = {row.variant: row for row in report.variants}
    assert all(3 in module["starved"] and module["tokens"][3] == 0 for module in report.experts)
    assert rows[recipe].metrics["expert_tokens_min"] == 0
    starved = rows[recipe].metrics["experts_starved"]
    assert starved >= 2
    assert rows[recipe].gates[0]["verdict"] == "fails"
    assert "experts_starved" not in rows["bf16"].metrics
    assert report.pick == "bf16"
    page = render_page(report)
    for line in modules_of_experts(report.experts):
        assert f'<td class="text">{line.names}</td>' in page
    assert f"{starved} of 8 experts are starved" in render_markdown(report)
