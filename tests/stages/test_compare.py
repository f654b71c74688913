"""compare: the report's files, whatever was measured."""

import json

import pytest

from quantline.config.compose import load_params
from quantline.files import sha256_json
from quantline.paths import REPORTS
from tests.helpers.report import event, write_events, write_measured
from tests.helpers.tracking import runs


@pytest.fixture
def compared(project):
    """Three variants: two measured, one that failed."""
    project.compose(
        "suite=default", "variant=[bf16,gguf-q8_0,gguf-q4_k_m]", "recipe=[none,q8_0,q4_k_m]"
    )
    write_measured("bf16", 10, 0)
    write_measured("gguf-q8_0", 5, 0.001)
    write_events(event("export", "gguf-q4_k_m", "smoke_failed"))
    return project


def report_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in REPORTS.iterdir() if path.is_file()}


def test_compare_reports_every_variant(compared, capsys):
    compared.stage("compare")
    report = json.loads((REPORTS / "compression.json").read_text())
    rows = {row["variant"]: row for row in report["variants"]}
    assert report["pick"] == "gguf-q8_0"
    assert set(rows) == {"bf16", "gguf-q8_0", "gguf-q4_k_m"}
    picked = rows["gguf-q8_0"]
    assert [flip["id"] for flip in picked["flips"]] == ["a"]
    assert picked["substituted_share"] == 0.25 and picked["pareto"]
    assert picked["provenance"] == {
        "quality": "measured",
        "speed": "measured",
        "memory": "estimated",
    }
    failed = rows["gguf-q4_k_m"]
    assert (failed["status"], failed["failure"]) == ("failed", "smoke_failed")
    points = json.loads((REPORTS / "plots/pareto.json").read_text())
    assert {point["variant"] for point in points} == {"bf16", "gguf-q8_0"}
    assert "smoke_failed" in (REPORTS / "compression.html").read_text()
    assert "gguf-q8_0" in (REPORTS / "compression.md").read_text()
    out = capsys.readouterr().out
    assert "2 variants measured, 1 failed; for laptop-cpu ship gguf-q8_0" in out


def test_compare_twice_writes_the_same_bytes(compared):
    compared.stage("compare")
    first = report_files()
    names = {f"compression.{kind}" for kind in ("csv", "html", "json", "md")}
    assert set(first) == names
    compared.stage("compare")
    assert report_files() == first


def test_compare_of_nothing_names_what_is_missing(project):
    project.stage("compare")
    report = json.loads((REPORTS / "compression.json").read_text())
    assert report["pick"] is None
    assert {row["failure"] for row in report["variants"]} == {"missing_file"}
    assert sha256_json(report)


def test_compare_is_the_run_above_its_variants_stages_and_failures(compared, monkeypatch):
    from quantline.run.stage_names import run_name
    from quantline.run.stage_record import failed_key

    put = {}
    monkeypatch.setattr(
        "quantline.report.tracked_comparison.put_below",
        lambda tracking, parent, tags: put.update({parent: tags}),
    )
    compared.stage("compare")
    by_key = {run.data.tags["quantline.key"]: run for run in runs(compared.root)}
    (above,) = [run for key, run in by_key.items() if key.startswith("compare:")]
    variants = [run for run in by_key.values() if run.data.tags["stage"] == "evaluate"]
    assert len(variants) == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in variants} == {above.info.run_id}
    ((parent, tags),) = put.items()
    assert parent == above.info.run_id
    failed = run_name("export", "gguf-q4_k_m", load_params())
    assert ("quantline.key", failed_key(failed, "smoke_failed")) in tags
