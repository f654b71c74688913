"""A variant's row: its figures, or what went wrong."""

import json

import pytest

from quantline.config.compose import load_params
from quantline.errors import Failure
from quantline.files import sha256_json, write_json
from quantline.metrics.results import ResultFiles, write_lm_eval
from quantline.paths import METRICS
from quantline.report.layers import WORST
from quantline.report.rows import read_row
from tests.helpers.lineage import vouch_for
from tests.helpers.report import SHA256, event, write_events, write_measured

NAME = "gguf-q8_0"


@pytest.fixture
def measured(project):
    """Two variants that were measured and one that failed."""
    project.compose(
        "suite=default", "variant=[bf16,gguf-q8_0,gguf-q4_k_m]", "recipe=[none,q8_0,q4_k_m]"
    )
    write_measured("bf16", 10, 0)
    write_measured(NAME, 5, 0.001)
    write_events(event("export", "gguf-q4_k_m", "smoke_failed"))
    return project


def test_read_row_holds_figures_answers_layers_and_lineage(measured):
    row = read_row(NAME, load_params())
    assert row.is_measured and (row.recipe, row.format) == ("q8_0", "gguf")
    assert row.metrics["mean_kld"] == 0.001 and row.speed["decode_tok_s"] == 90.0
    assert [flip["id"] for flip in row.flips] == ["a"]
    layers = [layer["name"] for layer in row.layers]
    expected = [6, 5, 11, 4, 10, 3, 2, 9]
    assert layers == [f"layer-{number}" for number in expected][:WORST]
    assert row.lineage["serve"] == "llama-server"
    assert row.lineage["source"] == {"path": "here", "files_sha256": sha256_json({"a": "b"})}
    assert row.substituted_share == 0.25
    assert row.smoke == [{"prompt": "One", "output": " day"}]
    assert row.gates


def test_read_row_of_a_variant_that_was_not_built_names_the_failure(measured):
    row = read_row("gguf-q4_k_m", load_params())
    assert (row.status, row.failure) == ("failed", "smoke_failed")
    assert row.metrics == {} and row.gates == []


def test_read_row_refuses_metrics_of_other_bytes_than_the_bundle(measured):
    write_measured(NAME, 5, 0.001, artifact_sha256="cd" * 32)
    row = read_row(NAME, load_params())
    assert (row.status, row.failure) == ("failed", Failure.ARTIFACT_CHANGED)
    assert row.metrics == {}


@pytest.mark.parametrize("path", [f"{NAME}.json", f"{NAME}.speed.json"])
@pytest.mark.parametrize("key", ["runtime", "artifact_sha256"])
def test_read_row_refuses_figures_that_do_not_name_the_bundle(measured, path, key):
    figures = json.loads((METRICS / path).read_text())
    figures.pop(key)
    write_json(METRICS / path, figures)
    row = read_row(NAME, load_params())
    assert row.failure == Failure.ARTIFACT_CHANGED
    assert f"{METRICS / path} belongs to other bytes than the bundle" in row.message


def test_read_row_has_what_lm_evaluation_harness_found_on_these_bytes(measured):
    files = ResultFiles.of(METRICS, NAME)
    manifest = {"variant": NAME, "artifact_sha256": SHA256, "runtime": "llama.cpp"}
    write_lm_eval(files, manifest, "llama.cpp", {"tasks": {"a": {}}})
    assert read_row(NAME, load_params()).lm_eval == {"a": {}}
    other = manifest | {"artifact_sha256": "cd" * 32}
    write_lm_eval(files, other, "llama.cpp", {"tasks": {"a": {}}})
    assert read_row(NAME, load_params()).lm_eval == {}


def test_read_row_leaves_out_gates_on_questions_where_there_are_none(measured):
    gates = load_params().target.gates
    assert any(gate.metric.startswith("gold_") for gate in gates)
    path = METRICS / "bf16.json"
    metrics = json.loads(path.read_text())
    write_json(path, {key: metrics[key] for key in metrics if not key.startswith("gold_")})
    vouch_for("bf16", load_params())
    row = read_row("bf16", load_params())
    assert row.gates
    assert not any(gate["metric"].startswith("gold_") for gate in row.gates)


def test_read_row_fails_a_gate_on_a_figure_that_nobody_knows(measured):
    gate = '{metric: gold_acuracy, operator: ">=", threshold: 0.9, required: true}'
    measured.compose("suite=default", "variant=[bf16]", "recipe=[none]", f"target.gates=[{gate}]")
    path = METRICS / "bf16.json"
    metrics = json.loads(path.read_text())
    write_json(path, {key: metrics[key] for key in metrics if not key.startswith("gold_")})
    vouch_for("bf16", load_params())
    (checked,) = read_row("bf16", load_params()).gates
    assert (checked["verdict"], checked["passed"]) == ("fails", False)
    assert "gold_acuracy is not measured" in checked["said"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("artifacts/exports/gguf-q8_0/smoke.json", "{}"),
        ("artifacts/exports/gguf-q8_0/smoke.json", ""),
        ("metrics/gguf-q8_0.lm-eval.json", ""),
        ("metrics/gguf-q8_0.lm-eval.json", "[]"),
        ("metrics/lineage/gguf-q8_0.json", '{"params": []}'),
        ("metrics/lineage/gguf-q8_0.json", '{"foo": {}}'),
        (
            "artifacts/exports/gguf-q8_0/manifest.json",
            '{"variant": "gguf-q8_0", "files": {"a": {}}}',
        ),
        ("artifacts/exports/gguf-q8_0/manifest.json", "[]"),
    ],
)
def test_read_row_names_a_file_that_no_stage_wrote(measured, file, text):
    (measured.root / file).write_text(text)
    row = read_row(NAME, load_params())
    assert row.status == "failed"
    assert row.failure in (Failure.ARTIFACT_CHANGED, Failure.MISSING_FILE)
    assert row.metrics == {}
    assert row.message
