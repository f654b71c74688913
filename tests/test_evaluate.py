"""A bundle is measured from its own bytes, in a process of its own; each way to fail has its name."""

import json
import shutil
import sys

import pytest

from stages import evaluate as stage
from quantline.errors import Failure, Reason, StageError


@pytest.fixture
def built(project):
    """A project with everything before evaluate done for the GGUF variant."""
    project.compose("suite=default", "variant=[gguf-q8_0]", "recipe=[q8_0]")
    for name, instance in (("load", None), ("calibrate", None), ("reference", None), ("quantize", "q8_0"),
                           ("export", "gguf-q8_0")):
        project.stage(name, instance)
    return project


def test_a_variant_is_measured_with_the_keys_that_other_scripts_read(built):
    built.stage("evaluate", "gguf-q8_0")
    quality = json.loads((built.root / "metrics/gguf-q8_0.json").read_text())
    speed = json.loads((built.root / "metrics/gguf-q8_0.speed.json").read_text())
    assert set(quality) >= {
        "perplexity", "perplexity_delta", "perplexity_delta_se", "mean_kld", "mean_kld_se", "p999_kld", "max_kld",
        "rms_delta_p", "same_top_p", "gold_accuracy", "gold_accuracy_delta", "gold_flips", "gold_p_value", "gold_items",
        "tokens", "size_bytes", "bits_per_weight", "artifact_sha256", "runtime", "runtime_version"}
    assert set(speed) >= {"load_s", "prefill_tok_s", "decode_tok_s", "peak_rss_mib", "threads", "device", "machine"}
    assert 0 < quality["mean_kld"] < 0.01
    assert {f"{name}_se" for name in quality if name.endswith(("kld", "delta_p", "top_p", "perplexity"))} - set(quality) == {"max_kld_se"}
    items = json.loads((built.root / "metrics/items/gguf-q8_0.json").read_text())
    assert all(set(item) >= {"id", "task", "prompt", "reference", "said", "correct", "baseline_said", "baseline_correct"}
               for item in items)
    assert items[-1]["prompt"].startswith("<|im_start|>user\nWhat did rosa find")  # as the model reads it
    assert all(item["said"] and item["baseline_said"] for item in items)
    before = (built.root / "metrics/gguf-q8_0.json").read_bytes()
    built.stage("evaluate", "gguf-q8_0")
    assert (built.root / "metrics/gguf-q8_0.json").read_bytes() == before


def test_one_changed_byte_is_refused_and_leaves_no_metrics(built, capsys):
    path = built.root / "artifacts/exports/gguf-q8_0/model.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        built.stage("evaluate", "gguf-q8_0")
    assert caught.value.code == 1
    assert "model.gguf is not what its manifest says" in capsys.readouterr().err
    last = built.events()[-1]
    assert (last["reason_code"], last["payload"]["failure"]) == (Reason.EVAL_RUNTIME_ERROR, Failure.ARTIFACT_CHANGED)
    assert not list((built.root / "metrics").glob("*.json"))


def test_a_bundle_that_is_not_there(project, capsys):
    with pytest.raises(SystemExit):
        project.stage("evaluate", "bf16")
    assert "export it first" in capsys.readouterr().err
    assert project.events()[-1]["reason_code"] == Reason.EXPORT_ARTIFACT_MISSING


def test_a_file_too_many_is_refused(built):
    bundle = built.root / "artifacts/exports/gguf-q8_0"
    shutil.copy(bundle / "model.gguf", bundle / "other.gguf")
    with pytest.raises(StageError, match="other.gguf"):
        stage.check_bundle(bundle)


def test_native_code_that_crashes_is_the_failure_of_this_variant_alone(built, monkeypatch, tmp_path, capsys):
    crash = tmp_path / "python"
    crash.write_text(f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(SystemExit):
        built.stage("evaluate", "gguf-q8_0")
    assert "the measuring process of gguf-q8_0" in (said := capsys.readouterr().err) and "signal 11 (SIGSEGV)" in said
    assert not list((built.root / "metrics").glob("*.json"))
    built.stage("compare")
    row, = json.loads((built.root / "reports/compression.json").read_text())["variants"]
    assert (row["status"], row["failure"]) == ("failed", Failure.RUNTIME_CRASHED)


def test_a_measurement_over_its_limits_is_a_named_failure(built, capsys):
    built.compose("suite=default", "variant=[gguf-q8_0]", "recipe=[q8_0]", "evaluation.limits.seconds=0.01")
    with pytest.raises(SystemExit):
        built.stage("evaluate", "gguf-q8_0")
    assert "to end within 0.01 s" in capsys.readouterr().err
    assert built.events()[-1]["payload"]["failure"] == Failure.TIMED_OUT
    assert not list((built.root / "metrics").glob("*.json"))


@pytest.mark.parametrize("runtime", ["llama_cpp", "onnxruntime"])
def test_light_runtimes_import_neither_torch_nor_transformers(runtime, project):
    import subprocess

    code = (f"import sys, stages.evaluate, stages.metrics.quality, stages.metrics.speed, stages.runtimes.{runtime}\n"
            "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
