"""The report as a table in a terminal."""

import io
import sys

import pytest

from quantline.messages import guard_libraries
from quantline.metrics.figure import cli_columns
from quantline.report.terminal import print_report
from quantline.report.variant import VariantRow
from tests.helpers.report import failed_row, make_report, make_row, speed_of


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def printed(rows: list[VariantRow], **fields) -> list[str]:
    file = io.StringIO()
    print_report(make_report(rows).to_json() | fields, file)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_print_report_has_a_line_for_each_variant_and_the_pick_with_its_reasons():
    lines = printed([make_row("small", 2.5, 0.001), make_row("large", 9, 0.0005, pareto=True)])
    heading, small, large, legend, empty, ship, *reasons = lines
    assert heading.split()[0] == "variant"
    for column in cli_columns():
        assert column.heading in heading
    assert small.startswith("small ")
    assert small.endswith(" pick")
    assert " 2.5 " in small
    assert large.startswith("large ")
    assert large.endswith(" ◆")
    assert legend.startswith("◆ on the Pareto front")
    assert empty == ""
    assert ship == "Ship for laptop: small"
    assert reasons
    assert all(reason.startswith("  - ") for reason in reasons)


def test_print_report_names_the_failure_of_a_variant():
    lines = printed([make_row("small", 2.5, 0.001), failed_row("expected Q4_K, found Q8_0")])
    (broken,) = [line for line in lines if line.startswith("broken")]
    assert broken.endswith("failed: type_substituted")
    assert set(broken.split()[1:-2]) == {"-"}


def test_print_report_says_that_no_variant_meets_the_target():
    assert "Ship for laptop: none of them" in printed([failed_row("expected x, found y")])


def test_print_report_takes_names_for_text():
    lines = printed([make_row("[red]", 2.5, 0.001)], pick="[red]", reasons=["because of [bold]"])
    assert any(line.startswith("[red] ") for line in lines)
    assert lines[-2:] == ["Ship for laptop: [red]", "  - because of [bold]"]


def test_print_report_marks_what_was_measured_on_a_busy_machine():
    busy = speed_of() | {"busy": ["other processes used 1.0 of 2 cores"]}
    rows = [make_row("small", 2.5, 0.001, speed=busy), make_row("large", 9, 0.0005, speed=busy)]
    lines = printed([*rows, make_row("quiet", 9.5, 0.0005)])
    assert lines[1].endswith(" pick*") and lines[2].endswith("*")
    assert not lines[3].endswith("*")
    said = " ".join(lines[-2:])
    assert "busy machine, so that speeds are too low: small, large; of the first, other" in said


def test_print_report_prints_in_any_encoding(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    guard_libraries()
    print_report(make_report([make_row("small", 2.5, 0.001, pareto=True)]).to_json())
    sys.stdout.flush()
    assert b"\\u25c6 on the Pareto front" in written.getvalue()


def test_print_report_keeps_long_names_and_the_pick_in_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "gguf-q3_k_m-curvature-budget"
    heading, first, second, *_ = printed([make_row(name, 2.5, 0.001)])
    assert first.endswith(" pick")
    assert first.split()[0] + second.strip() == name
    for column in cli_columns():
        assert column.heading in heading
