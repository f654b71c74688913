"""A bundle is measured from its own bytes, in its own process; each way to fail has its name."""

import json
import shutil
import sys

import pytest

from quantline.errors import Failure, Reason
from tests.helpers.gguf import file_of

NAME = "gguf-q8_0"
QUALITY_KEYS = {
    "perplexity",
    "perplexity_delta",
    "perplexity_delta_se",
    "mean_kld",
    "mean_kld_se",
    "p999_kld",
    "max_kld",
    "rms_delta_p",
    "same_top_p",
    "gold_accuracy",
    "gold_accuracy_delta",
    "gold_flips",
    "gold_p_value",
    "gold_items",
    "tokens",
    "size_bytes",
    "bits_per_weight",
    "layer_bits_per_weight",
    "artifact_sha256",
    "runtime",
    "runtime_version",
}
SPEED_KEYS = {
    "load_s",
    "prefill_tok_s",
    "decode_tok_s",
    "peak_rss_mib",
    "threads",
    "device",
    "machine",
}
ANSWER_KEYS = {
    "id",
    "task",
    "prompt",
    "reference",
    "said",
    "correct",
    "baseline_said",
    "baseline_correct",
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Where what the stages before evaluate make is kept for the other tests."""
    return tmp_path_factory.mktemp("built") / "artifacts"


@pytest.fixture
def built(project, artifacts):
    """A project with everything before evaluate done for the GGUF variant."""
    project.compose("suite=default", f"variant=[{NAME}]", "recipe=[q8_0]")
    if artifacts.exists():
        shutil.copytree(artifacts, project.root / "artifacts")
        return project
    for name in ("load", "calibrate", "reference"):
        project.stage(name)
    project.stage("quantize", "q8_0")
    project.stage("export", NAME)
    shutil.copytree(project.root / "artifacts", artifacts)
    return project


def metrics_files(project) -> list:
    return list((project.root / "metrics").glob("*.json"))


def test_evaluate_writes_the_keys_that_other_scripts_read(built):
    built.stage("evaluate", NAME)
    path = built.root / f"metrics/{NAME}.json"
    quality = json.loads(path.read_text())
    speed = json.loads((built.root / f"metrics/{NAME}.speed.json").read_text())
    assert set(quality) >= QUALITY_KEYS
    assert set(speed) >= SPEED_KEYS
    assert 0 < quality["mean_kld"] < 0.01
    from_tokens = ("kld", "delta_p", "top_p", "perplexity")
    errors = {f"{key}_se" for key in quality if key.endswith(from_tokens)}
    assert errors - set(quality) == {"max_kld_se"}
    before = path.read_bytes()
    built.stage("evaluate", NAME)
    assert path.read_bytes() == before


def test_evaluate_writes_the_answers_to_the_gold_set(built):
    built.stage("evaluate", NAME)
    items = json.loads((built.root / f"metrics/items/{NAME}.json").read_text())
    assert len(items) == 9
    for item in items:
        assert set(item) >= ANSWER_KEYS
        assert item["said"] and item["baseline_said"]
    # As the model reads it.
    assert items[-1]["prompt"].startswith("<|im_start|>user\nWhat did rosa find")


def test_evaluate_refuses_one_changed_byte_and_leaves_no_metrics(built, capsys):
    path = file_of(built.root / f"artifacts/exports/{NAME}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        built.stage("evaluate", NAME)
    assert caught.value.code == 1
    assert ".gguf is not what its manifest says" in capsys.readouterr().err
    last = built.events()[-1]
    assert last["reason_code"] == Reason.EVAL_RUNTIME_ERROR
    assert last["payload"]["failure"] == Failure.ARTIFACT_CHANGED
    assert metrics_files(built) == []


def test_evaluate_refuses_a_bundle_that_is_not_there(project, capsys):
    with pytest.raises(SystemExit):
        project.stage("evaluate", "bf16")
    assert "export it first" in capsys.readouterr().err
    assert project.events()[-1]["reason_code"] == Reason.EXPORT_ARTIFACT_MISSING


def test_evaluate_refuses_a_file_too_many(built, capsys):
    bundle = built.root / f"artifacts/exports/{NAME}"
    shutil.copy(file_of(bundle), bundle / "other.gguf")
    with pytest.raises(SystemExit):
        built.stage("evaluate", NAME)
    assert "other.gguf is not what its manifest says" in capsys.readouterr().err


def test_evaluate_names_native_code_that_crashes_as_the_failure_of_this_variant_alone(
    built, monkeypatch, tmp_path, capsys
):
    crash = tmp_path / "python"
    crash.write_text(
        f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(SystemExit):
        built.stage("evaluate", NAME)
    errors = capsys.readouterr().err
    assert f"the measuring process of {NAME}" in errors
    assert "signal 11 (SIGSEGV)" in errors
    assert metrics_files(built) == []
    built.stage("compare")
    report = json.loads((built.root / "reports/compression.json").read_text())
    (row,) = report["variants"]
    assert (row["status"], row["failure"]) == ("failed", Failure.RUNTIME_CRASHED)


def test_evaluate_over_its_limits_is_a_named_failure(built, capsys):
    built.compose(
        "suite=default", f"variant=[{NAME}]", "recipe=[q8_0]", "evaluation.limits.seconds=0.01"
    )
    with pytest.raises(SystemExit):
        built.stage("evaluate", NAME)
    assert "to end within 0.01 s" in capsys.readouterr().err
    assert built.events()[-1]["payload"]["failure"] == Failure.TIMED_OUT
    assert metrics_files(built) == []
