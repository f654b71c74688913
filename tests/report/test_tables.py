"""Cells of the report's tables."""

import pytest

from quantline.metrics.figure import Column, Figure, TableColumn
from quantline.report.tables import (
    Cell,
    count_gates,
    describe_machines,
    figure_cell,
    figure_cells,
    find_gate,
    lm_eval_columns,
)
from tests.helpers.report import TARGET, make_row

FIGURES = {"x": 0.5, "x_se": 0.125, "x_delta": -0.01, "x_delta_se": 0.01, "run_iqr": [1.4, 2.6]}


def column(detail, **style) -> TableColumn:
    figure = Figure("x", label="x", repetitions="run")
    return TableColumn(figure, Column("x", ".1f", detail=detail, error_format=".2f", **style))


@pytest.mark.parametrize(
    ("detail", "cell"),
    [
        (None, Cell(0.5, "0.5")),
        ("error", Cell(0.5, "0.5", "± 0.12")),
        ("noise", Cell(0.5, "0.5", "± 0.12")),
        ("difference", Cell(0.5, "0.5", "~ -0.01 ± 0.01")),
        ("quartiles", Cell(0.5, "0.5", "1.40 to 2.60")),
    ],
)
def test_figure_cell_has_its_detail(detail, cell):
    assert figure_cell(column(detail), FIGURES) == cell


def test_figure_cell_marks_noise_within_two_errors():
    assert figure_cell(column("noise"), FIGURES | {"x_se": 0.25}).text == "~ 0.5"
    assert figure_cell(column("noise"), FIGURES | {"x_se": 0.24}).text == "0.5"
    assert figure_cell(column("error"), FIGURES | {"x_se": 0.25}).text == "0.5"


def test_figure_cell_prefers_the_interval_of_a_difference():
    figures = FIGURES | {"x_delta_interval": [-0.04, 0.02]}
    cell = figure_cell(column("difference", scale=100), figures)
    assert cell == Cell(0.5, "50.0", "~ -1.00, -4.00 to +2.00")
    figures["x_delta_interval"] = [-0.04, -0.02]
    assert figure_cell(column("difference"), figures).detail == "-0.01, -0.04 to -0.02"


@pytest.mark.parametrize("detail", ["error", "noise", "difference", "quartiles"])
def test_figure_cell_without_what_the_detail_is_made_of(detail):
    assert figure_cell(column(detail), {"x": 0.5}) == Cell(0.5, "0.5")
    assert figure_cell(column(detail), {"x": None}) == Cell("", "–")
    assert figure_cell(column(detail), {}) == Cell("", "–")


def test_figure_cells_follow_the_columns_of_the_section():
    cells = figure_cells("speed", make_row("a", 2, 0.01).figures)
    assert [cell.text for cell in cells] == ["0.10", "900", "90", "300"]


def test_count_gates_sorts_by_what_excludes_a_variant():
    row = make_row("a", 2, 0.01)
    assert count_gates(row) == (0, 0, 0)
    verdicts = [("fails", True), ("fails", False), ("fails", False), ("cannot tell", True)]
    row.gates = [{"verdict": verdict, "required": required} for verdict, required in verdicts]
    count = count_gates(row)
    assert (count.failing, count.optional, count.undecided) == (1, 2, 1)
    assert count.value == 100 + 10 + 3


def test_find_gate_is_the_targets_own():
    row = make_row("a", 2, 0.01)
    gate = TARGET.gates[0].model_dump()
    assert find_gate(row, gate) is row.gates[0]
    for key, value in (("metric", "p99_kld"), ("operator", "<"), ("threshold", 2), ("on", "x")):
        assert find_gate(row, gate | {key: value}) is None


def test_lm_eval_columns_are_those_that_a_row_has():
    def results(**better) -> dict:
        return {"metrics": {name: {"higher_is_better": value} for name, value in better.items()}}

    rows = [
        make_row("one", 2, 0.01, lm_eval={"b": results(acc=True), "a": results(ppl=False)}),
        make_row("two", 2, 0.01, lm_eval={"b": results(acc=True, bleu=None)}),
        make_row("three", 2, 0.01),
    ]
    assert lm_eval_columns(rows) == [
        ("a", "ppl", "lower"),
        ("b", "acc", "higher"),
        ("b", "bleu", ""),
    ]


def test_describe_machines_names_the_variants_where_machines_differ():
    machine = {
        "cpu": "Some CPU",
        "cores": 2,
        "memory_mib": 2048,
        "gpus": [],
        "system": "Linux",
        "python": "3.11",
    }
    how = {"batch": 1, "prompt_tokens": 8, "new_tokens": 4, "repetitions": 3}
    rows = [make_row("a", 2, 0.01), make_row("b", 2, 0.01), make_row("old", 2, 0.01)]
    for row in rows[:2]:
        row.speed |= how | {"machine": machine}
    text = (
        "Some CPU, 2 cores, 2 GiB of memory, Linux: 2 threads, batch 1, a prompt of 8 tokens, "
        "4 new tokens, 3 repetitions after a few tokens to warm up."
    )
    assert describe_machines(rows) == [text]
    rows[1].speed["machine"] = machine | {"gpus": ["A GPU"]}
    first, second = describe_machines(rows)
    assert first == f"a: {text}"
    assert second.startswith("b: Some CPU, 2 cores, 2 GiB of memory, A GPU, Linux")
