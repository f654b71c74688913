"""compare: what a variant's row says, of its figures or of what went wrong, and the report's files."""

import json

import pytest

from stages import compare as stage
from quantline.config.compose import load_params
from quantline.report import layers
from quantline.errors import Failure
from quantline.files import sha256_file, sha256_json, write_json, write_text
from quantline.run.stage import EVENTS


def event(name: str, instance: str | None, failure: str | None = None) -> dict:
    """A line of events.jsonl: an error, or the good end of a stage."""
    return {"stage": name, "severity": "error" if failure else "info", "summary": f"{name}: {failure}",
            "reason_code": "export_run_failed" if failure else "stage_finished",
            "payload": {"instance": instance, **({"failure": failure} if failure else {})}}


def events(*lines: dict) -> None:
    write_text(EVENTS, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("lines", "failure"), [
    ([], "missing_file"),
    ([event("export", "onnx-fp32", "smoke_failed")], "missing_file"),
    ([event("export", "bf16", "smoke_failed")], "smoke_failed"),
    ([event("quantize", "none", "non_finite"), event("quantize", "other", "disk_full")], "non_finite"),
    ([event("load", None, "missing_shard")], "missing_shard"),
    ([event("export", "bf16", "smoke_failed"), event("export", "bf16")], "missing_file"),
    ([event("export", "bf16", "smoke_failed"), event("export", "bf16"), event("evaluate", "bf16", "runtime_crashed")],
     "runtime_crashed"),
    ([event("load", None, "missing_shard"), event("export", "bf16", "smoke_failed"), event("load", None)],
     "smoke_failed"),
])
def test_the_failure_of_a_variant_is_the_newest_that_was_not_mended(project, lines, failure):
    events(*lines)
    assert stage.last_failure("bf16", "none")[0] == failure


LAYERS = {f"layer-{n}": {"error": float(n % 7), "rtn_error": 8.0} for n in range(12)} | {"copied": {}}
TENSORS = {f"{name}.weight": {"actual": "int4", "bits_per_weight": 4.5, "weights": 64, "bytes": 36} for name in LAYERS}


def figures(name: str, size: float, kld: float, sha256: str = "ab" * 32, runtime: str = "llama.cpp", **more) -> None:
    """What evaluate leaves of a variant of `size` MiB."""
    metrics = {"size_bytes": size * 2**20, "mean_kld": kld, "mean_kld_se": kld / 10, "p999_kld": kld, "perplexity": 3.0,
               "perplexity_delta": 0.1, "perplexity_delta_se": 0.01, "bits_per_weight": 4.5, "same_top_p": 0.97,
               "same_top_p_se": 0.01, "gold_accuracy_delta_interval": [-0.04, 0.02], "gold_tasks": {},
               "gold_accuracy": 0.9, "gold_accuracy_delta": -0.01, "gold_flips": 3, "gold_lost": 2, "gold_won": 1,
               "gold_p_value": 0.6, "gold_items": 100, "gold_open": 0.9, "artifact_sha256": sha256,
               "runtime": runtime, "runtime_version": "1.0", "tokens": 100} | more
    speed = {"artifact_sha256": sha256, "runtime": runtime, "load_s": 0.1, "prefill_tok_s": 900.0, "decode_tok_s": 90.0,
             "peak_rss_mib": 300.0, "threads": 2, "device": "cpu"}
    said = {"task": "open", "prompt": "p", "reference": "r", "said": name, "baseline_said": "t"}
    items = [said | {"id": name, "correct": True, "baseline_correct": before} for name, before in (("a", False), ("b", True))]
    write_json(stage.METRICS / "items" / f"{name}.json", items)
    write_json(stage.METRICS / f"{name}.json", {"items_sha256": sha256_file(stage.METRICS / "items" / f"{name}.json")} | metrics)
    write_json(stage.METRICS / f"{name}.speed.json", speed)


def measured(name: str, size: float, kld: float, sha256: str = "ab" * 32, **more) -> None:
    """What evaluate and export leave of a variant of `size` MiB."""
    figures(name, size, kld, sha256, **more)
    write_json(stage.EXPORTS / name / "manifest.json", {
        "artifact_sha256": sha256, "substituted_share": 0.25, "layers": LAYERS, "recipe": {"name": "q8_0"}, "calibration": None,
        "variant": name, "format": "gguf", "runtime": "llama.cpp", "tensors": TENSORS,
        "versions": {}, "files": {}, "created_by": "export-1", "source": {"path": "here", "files": {"a": "b"}}})
    write_text(stage.EXPORTS / name / "README.md", "# A bundle\n\n## Serve it\n\nllama-server\n")
    write_json(stage.EXPORTS / name / "smoke.json", {"prompts": [{"prompt": "One", "output": " day"}]})


@pytest.fixture
def compared(project):
    """Three variants: two measured, one that failed."""
    project.compose("suite=default", "variant=[bf16,gguf-q8_0,gguf-q4_k_m]", "recipe=[none,q8_0,q4_k_m]")
    measured("bf16", 10, 0)
    measured("gguf-q8_0", 5, 0.001)
    events(event("export", "gguf-q4_k_m", "smoke_failed"))
    return project


def test_the_report_holds_every_variant_and_the_same_run_writes_the_same_bytes(compared):
    compared.stage("compare")
    report = json.loads((stage.REPORTS / "compression.json").read_text())
    rows = {row["variant"]: row for row in report["variants"]}
    assert report["pick"] == "gguf-q8_0" and set(rows) == {"bf16", "gguf-q8_0", "gguf-q4_k_m"}
    assert [flip["id"] for flip in rows["gguf-q8_0"]["flips"]] == ["a"]
    assert [layer["name"] for layer in rows["gguf-q8_0"]["layers"]] == [
        "layer-6", "layer-5", "layer-11", "layer-4", "layer-10", "layer-3", "layer-2", "layer-9"][:layers.WORST]
    assert (rows["gguf-q8_0"]["lineage"]["serve"], rows["gguf-q8_0"]["lineage"]["source"]) == (
        "llama-server", {"path": "here", "files_sha256": sha256_json({"a": "b"})})
    assert rows["gguf-q8_0"]["substituted_share"] == 0.25 and rows["gguf-q8_0"]["pareto"]
    assert (rows["gguf-q4_k_m"]["status"], rows["gguf-q4_k_m"]["failure"]) == ("failed", "smoke_failed")
    assert rows["gguf-q8_0"]["provenance"] == {"quality": "measured", "speed": "measured", "memory": "estimated"}
    points = json.loads((stage.REPORTS / "plots/pareto.json").read_text())
    assert {point["variant"] for point in points} == {"bf16", "gguf-q8_0"}
    page = (stage.REPORTS / "compression.html").read_text()
    assert "smoke_failed" in page and "gguf-q8_0" in (stage.REPORTS / "compression.md").read_text()
    first = {path.name: path.read_bytes() for path in stage.REPORTS.iterdir() if path.is_file()}
    compared.stage("compare")
    assert {path.name: path.read_bytes() for path in stage.REPORTS.iterdir() if path.is_file()} == first


def test_metrics_of_other_bytes_than_the_bundle_are_no_figures(compared):
    measured("gguf-q8_0", 5, 0.001, artifact_sha256="cd" * 32)
    row = stage.row_of("gguf-q8_0", load_params())
    assert (row["status"], row["failure"], row["metrics"]) == ("failed", Failure.ARTIFACT_CHANGED, {})


def test_a_gate_on_questions_is_left_out_where_there_are_none(compared):
    assert any(gate.metric.startswith("gold_") for gate in load_params().target.gates)
    path = stage.METRICS / "bf16.json"
    write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("gold_")})
    assert not any(gate["metric"].startswith("gold_") for gate in stage.row_of("bf16", load_params())["gates"])
    assert stage.row_of("bf16", load_params())["gates"]


def test_the_report_of_nothing_names_what_is_missing(project):
    project.stage("compare")
    report = json.loads((stage.REPORTS / "compression.json").read_text())
    assert report["pick"] is None and {row["failure"] for row in report["variants"]} == {"missing_file"}
    assert sha256_json(report)
