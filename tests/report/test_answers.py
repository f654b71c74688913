"""Answers side by side, figures beside full precision, registered versions, and the CSV."""

import csv
import io
import json
from dataclasses import replace

from quantline.paths import EVENTS
from quantline.report.answers import answers_by_prompt
from quantline.report.beside_full import beside_full, full_precision
from quantline.report.csv_table import render_csv
from quantline.report.registered import registered_versions
from tests.helpers.report import LINEAGE, failed_row, make_report, make_row, speed_of

NONE = LINEAGE | {"recipe": {"name": "none", "method": "none"}}


def smoke(output: str) -> list[dict]:
    return [{"prompt": "One", "output": output}]


def test_answers_by_prompt_marks_where_full_precision_is_left():
    rows = [make_row("a", 5, 0.1, smoke=smoke(" day Ada")), make_row("b", 5, 0.1, smoke=smoke("?"))]
    report = replace(make_report(rows), answers=[{"prompt": "One", "output": " day Hugo"}])
    (one,) = answers_by_prompt(report)
    assert (one["prompt"], one["full"]) == ("One", " day Hugo")
    parts = [(found.row.variant, found.same, found.other) for found in one["generations"]]
    assert parts == [("a", " day ", "Ada"), ("b", "", "?")]


def test_answers_by_prompt_shows_variants_where_full_precision_is_not_here():
    report = make_report([make_row("a", 5, 0.1, smoke=smoke("x")), failed_row("no")])
    (one,) = answers_by_prompt(report)
    assert one["full"] is None
    assert one["generations"][0][1:] == ("", "x")


def test_beside_full_compares_with_the_unquantized_variant():
    fast = speed_of() | {"decode_tok_s": 180.0}
    rows = [
        make_row("onnx", 20, 0.0, format="onnx", lineage=NONE),
        make_row("plain", 10, 0.0, format="safetensors", lineage=NONE),
        make_row("q4", 3, 0.1, speed=fast),
    ]
    full = full_precision(replace(make_report(rows), full_bytes=10 * 2**20))
    assert full.row is rows[1]
    assert beside_full(rows[2], full) == ("30% of full", "2.0×")


def test_beside_full_says_nothing_that_is_not_known():
    row = make_row("q4", 3, 0.1)
    assert beside_full(row, full_precision(make_report([row]))) == ("", "")
    plain = make_row("plain", 10, 0.0, lineage=NONE, speed={})
    assert beside_full(row, full_precision(make_report([row, plain]))) == ("", "")


def registration(sha256: str, version: int, name: str = "m") -> str:
    payload = {"artifact_sha256": sha256, "name": name, "version": version, "alias": "champion"}
    event = {"stage": "promote", "severity": "info", "summary": "s", "payload": payload}
    return json.dumps(event | {"reason_code": "model_registered"}) + "\n"


def test_registered_versions_are_those_of_the_bytes_that_are_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = make_row("a", 5, 0.1)
    assert registered_versions([row]) == {}
    mine = row.metrics["artifact_sha256"]
    EVENTS.write_text(registration("old", 1) + registration(mine, 2))
    champion = {"name": "m", "version": "2", "alias": "champion"}
    assert registered_versions([row, failed_row("no")]) == {"a": champion}
    with EVENTS.open("a") as file:
        file.write(registration("other", 3))
    assert registered_versions([row]) == {"a": champion | {"alias": ""}}


def test_render_csv_has_every_figure_unrounded():
    rows = [make_row("a", 5, 0.123456789), failed_row("=HYPERLINK(1)")]
    lines = list(csv.DictReader(io.StringIO(render_csv(make_report(rows)))))
    assert [line["variant"] for line in lines] == ["a", "broken"]
    assert float(lines[0]["mean_kld"]) == 0.123456789
    assert lines[0]["status"] == "ok"
    assert (lines[1]["mean_kld"], lines[1]["failure"]) == ("", "type_substituted")


def test_render_csv_has_no_cell_that_a_spreadsheet_runs():
    text = render_csv(make_report([make_row("=cmd", 5, 0.1)]))
    assert "'=cmd," in text
