"""export: a complete bundle, or a failure that has a name and leaves nothing."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantline.config.compose import load_params
from quantline.formats.safetensors.container import SafetensorsContainer
from quantline.formats.safetensors.layouts.compressed_tensors import PackedIntegers
from quantline.model.checkpoint import Checkpoint
from quantline.paths import EXPORTS, MODEL, QUANTIZED
from quantline.run.lineage import LINEAGE
from tests.helpers.bundles import REPEATABLE, SMOKE_CHECKS
from tests.helpers.children import fork_children
from tests.helpers.models import place_model
from tests.helpers.project import Project
from tests.helpers.quantized import rounded

# Recipe → how the weights are rounded that stand for its result.
ROUNDINGS: dict[str, dict[str, Any]] = {
    "none": {"bits": 0},
    "rtn-w4g128": {"group_size": 128},
    "rtn-w8": {"bits": 8, "group_size": 32, "symmetric": True, "outside": 8},
}
MANIFEST = {
    "source": {"kind": "local", "path": "m", "revision": None, "adapter": None},
    "transforms": [],
    "files": {"model.safetensors": {"sha256": "0" * 64, "bytes": 1}},
}


@pytest.fixture
def ready(project, tiny_model) -> Project:
    """The project with a model and quantized weights in place, as if load and quantize had run."""
    project.compose("suite=default")
    place_model(tiny_model, MODEL)
    (MODEL / "manifest.json").write_text(json.dumps(MANIFEST))
    params = load_params()
    for name, rounding in ROUNDINGS.items():
        recipe = {"name": name, **params.recipes[name].model_dump(mode="json")}
        rounded(QUANTIZED / name, Checkpoint(tiny_model), recipe=recipe, **rounding)
    return project


@pytest.fixture
def quick(ready, monkeypatch) -> Project:
    """The same, whose smoke tests run in forks."""
    fork_children(monkeypatch)
    return ready


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def manifest_of(variant: str) -> dict[str, Any]:
    return read_json(EXPORTS / variant / "manifest.json")


def assert_refused(
    project: Project, capsys, variant: str, reason: str, failure: str, words: str
) -> None:
    """Run the stage, which has to fail by name and leave nothing."""
    with pytest.raises(SystemExit) as stopped:
        project.stage("export", variant)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"export {variant}: {reason} ({failure}): " in message
    assert words in message
    event = project.events()[-1]
    assert (event["severity"], event["reason_code"]) == ("error", reason)
    assert event["payload"]["failure"] == failure
    assert event["payload"]["instance"] == variant
    assert words in event["summary"]
    assert not EXPORTS.exists() or list(EXPORTS.iterdir()) == []


@pytest.mark.parametrize("variant", ["bf16", "rtn-w4g128", "onnx-fp32", "onnx-int8"])
def test_export_makes_everything_that_a_bundle_promises(quick, capsys, variant):
    quick.stage("export", variant)
    folder = EXPORTS / variant
    manifest = manifest_of(variant)
    assert set(manifest) >= {
        "variant",
        "recipe",
        "format",
        "runtime",
        "source",
        "transforms",
        "tensors",
        "bits_per_weight",
        "size_bytes",
        "files",
        "versions",
        "calibration",
        "created_by",
    }
    names = {path.name for path in folder.iterdir()}
    assert names == {*manifest["files"], "manifest.json", "smoke.json", "README.md", LINEAGE}
    assert set(manifest["files"]) >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    sizes = [(folder / name).stat().st_size for name in manifest["files"]]
    assert manifest["size_bytes"] == sum(sizes)
    tensors = manifest["tensors"].values()
    assert len(tensors) == len(Checkpoint(MODEL).names)
    assert all(tensor["requested"] == tensor["actual"] for tensor in tensors)
    weights = sum(tensor["weights"] for tensor in tensors)
    stored = sum(tensor["bytes"] for tensor in tensors)
    assert manifest["bits_per_weight"] == 8 * stored / weights
    embedding = manifest["tensors"]["model.embed_tokens.weight"]
    inside = 8 * (stored - embedding["bytes"]) / (weights - embedding["weights"])
    assert manifest["layer_bits_per_weight"] == inside
    assert manifest["substituted_share"] == 0
    assert manifest["transforms"][-1]["step"] == "export"
    size = manifest["size_bytes"] / 2**20
    bits = manifest["bits_per_weight"]
    summary = f"export {variant}: {size:.1f} MiB, {bits:.2f} bits per weight, "
    assert capsys.readouterr().out.startswith(summary)
    assert quick.events()[-1]["reason_code"] == "stage_finished"

    smoke = read_json(folder / "smoke.json")
    assert smoke["passed"]
    prompts = [entry["prompt"] for entry in smoke["prompts"]]
    assert prompts == load_params().evaluation.smoke_prompts
    for entry in smoke["prompts"]:
        assert len(entry["token_ids"]) == 4
        assert entry["seconds"] > 0
        assert entry["passed"]
        passed = {name for name, value in entry["checks"].items() if value}
        assert passed - {REPEATABLE} == set(SMOKE_CHECKS)
    assert any(entry["checks"].get(REPEATABLE) for entry in smoke["prompts"])


def test_export_again_gives_the_same_bundle_and_no_second_run(quick):
    from mlflow.tracking import MlflowClient

    hashes = []
    for _ in range(2):
        quick.stage("export", "onnx-fp32")
        hashes.append(manifest_of("onnx-fp32")["artifact_sha256"])
    client = MlflowClient(tracking_uri=f"sqlite:///{quick.root}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert len(set(hashes)) == 1
    assert run.info.run_name == "onnx-fp32"
    tags = run.data.tags
    assert tags["quantline.key"] == f"onnx-fp32:{hashes[0]}"
    assert tags["artifact_sha256"] == hashes[0]
    assert {"recipe_sha256", "git_commit", "model", "format", "runtime"} <= set(tags)
    assert run.data.params["method"] == "none"
    assert run.data.metrics["bits_per_weight"] == 32
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert files == {"manifest.json", "smoke.json"}


@pytest.mark.parametrize(
    "variant", [pytest.param("rtn-w4g128", marks=pytest.mark.slow), "onnx-fp32"]
)
def test_export_writes_a_readme_whose_python_lines_run(quick, variant):
    quick.stage("export", variant)
    manifest = manifest_of(variant)
    text = (EXPORTS / variant / "README.md").read_text()
    assert manifest["artifact_sha256"] in text
    assert ("vllm serve" in text) == (manifest["format"] == "safetensors")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=EXPORTS / variant,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_export_says_which_stage_makes_missing_weights(ready, capsys):
    shutil.rmtree(QUANTIZED / "rtn-w8")
    words = "run `dvc repro quantize@rtn-w8`"
    assert_refused(ready, capsys, "onnx-int8", "export_artifact_missing", "missing_file", words)


def test_export_refuses_weights_of_another_recipe(ready, capsys):
    ready.compose("suite=default", "recipes.rtn-w4g128.bits=8")
    words = "run `dvc repro quantize@rtn-w4g128`"
    assert_refused(ready, capsys, "rtn-w4g128", "export_run_failed", "artifact_changed", words)


def test_export_refuses_a_container_that_holds_something_else(ready, capsys, monkeypatch):
    written = PackedIntegers.tensors

    def spoil(self, module, linear, dtype):
        tensors = written(self, module, linear, dtype)
        if module == "model.layers.1.mlp.down_proj":
            tensors[f"{module}.weight_packed"] ^= 1
        return tensors

    monkeypatch.setattr(PackedIntegers, "tensors", spoil)
    words = "model.layers.1.mlp.down_proj.weight reads back with other values"
    assert_refused(ready, capsys, "rtn-w4g128", "export_run_failed", "readback_mismatch", words)


def test_export_names_a_smoke_test_that_crashes(ready, capsys, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport os\nos.abort()\n")
    python.chmod(0o755)
    ready.compose("suite=default", f"+evaluation.pythons.transformers={python}")
    words = "the smoke test of bf16 to end well, and it ended with signal 6"
    assert_refused(ready, capsys, "bf16", "export_run_failed", "runtime_crashed", words)


def test_export_names_a_smoke_test_that_takes_too_long(ready, capsys):
    ready.compose("suite=default", "evaluation.limits.seconds=0.01")
    words = "the smoke test of bf16 to end within 0.01 s"
    assert_refused(ready, capsys, "bf16", "export_run_failed", "timed_out", words)


def test_export_names_an_interpreter_that_is_not_there(ready, capsys):
    ready.compose("suite=default", "+evaluation.pythons.transformers=/nowhere/python")
    words = "mend evaluation.pythons"
    assert_refused(ready, capsys, "bf16", "export_run_failed", "runtime_unavailable", words)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("chat_template.jinja", "assistant", "helper", "expected chat_template"),
        (
            "tokenizer_config.json",
            '"eos_token": "<|endoftext|>"',
            '"eos_token": "<|im_end|>"',
            "expected eos 0 in the bundle, found 2",
        ),
    ],
)
def test_export_refuses_special_tokens_and_chat_templates_that_are_not_the_sources(
    quick, capsys, monkeypatch, name, old, new, words
):
    write = SafetensorsContainer.write

    def write_wrongly(self, source, quantized, folder, variant):
        requested = write(self, source, quantized, folder, variant)
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        return requested

    monkeypatch.setattr(SafetensorsContainer, "write", write_wrongly)
    assert_refused(quick, capsys, "bf16", "export_run_failed", "tokenizer_mismatch", words)


@pytest.mark.slow
def test_export_as_a_command_prints_one_line(ready):
    done = ready.command("export", "onnx-fp32")
    assert done.returncode == 0, done.stderr
    line = r"export onnx-fp32: [\d.]+ MiB, 32\.00 bits per weight, [\d.]+ s, peak memory \d+ MiB\n"
    assert re.fullmatch(line, done.stdout)
    if importlib.util.find_spec("torchao"):  # of the extras: it says that it finds no GPU
        assert "export" not in done.stderr
    else:
        assert done.stderr == ""


@pytest.mark.slow
def test_smoke_as_a_command_tries_a_bundle_as_it_lies_on_disk(ready, capsys):
    ready.stage("export", "bf16")
    capsys.readouterr()
    ready.stage("smoke", "bf16")
    printed = capsys.readouterr().out
    assert printed.startswith("smoke bf16: ")
    for prompt in load_params().evaluation.smoke_prompts:
        assert repr(prompt) in printed
