"""quantize: what each recipe writes, that it repeats itself to the byte, and how it fails."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from rounded import tokens_of, torch_logprobs, torch_model
from safetensors.numpy import load_file

from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.methods.ggml import curvature as kquant_curvature, quantize as kquant
from quantline.methods.integer import rtn
from quantline.methods.integer.curvature import divergence
from quantline.errors import Failure, Reason

RECIPES = ["none", "rtn-w4g128", "gptq-w4g128", "gptq-w4g128-curvature", "awq-w4g128", "int8", "smoothquant-w8a8", "fp8-w8a8",
           "q4_k_m", "q4_k_m-curvature"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, tiny_model):
    """artifacts/ with the model and a calibration, made once."""
    return tmp_path_factory.mktemp("calibrated") / "artifacts"


@pytest.fixture
def ready(project, calibrated, tiny_model):
    """The project with everything before quantize done."""
    project.compose(f"recipe=[{','.join(RECIPES)}]")
    if not calibrated.exists():
        shutil.copytree(tiny_model, project.root / "artifacts/model")
        project.stage("calibrate")
        shutil.copytree(project.root / "artifacts", calibrated)
    else:
        shutil.copytree(calibrated, project.root / "artifacts")
    return project


def files(project, name: str) -> dict[str, bytes]:
    folder = project.root / "artifacts/quantized" / name
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_twice_gives_the_same_bytes_and_a_report(ready, name, capsys):
    ready.stage("quantize", name)
    first = files(ready, name)
    ready.stage("quantize", name)
    parts = [] if name == "none" else ["block-000", "block-001", *(["rest"] if name.startswith("q4_k_m") else [])]
    matrix = {"imatrix.gguf"} if name.startswith("q4_k_m") else set()
    assert files(ready, name) == first and set(first) == {"quantized.json", *matrix, *(f"{part}.safetensors" for part in parts)}
    report = json.loads(first["quantized.json"])
    assert report["recipe"] == {"name": name, **ready_recipe(ready, name)}
    assert set(report["calibration"]) == {"text_sha256", "tokens", "seed"} and report["versions"]["torch"]
    layers = report.get("layers", {})
    assert len(layers) == (0 if name in ("none", "q4_k_m", "q4_k_m-curvature") else 14)
    for about in layers.values():
        what = ("divergence" if name.endswith("curvature") or name.startswith("awq") else
                "output_change" if name.startswith("smoothquant") else "error")
        assert about["tokens"] == 512 and 0 < about[what] <= about[f"rtn_{what}"] * (1 + 1e-6)
        assert (about["damping"] is not None) == name.startswith("gptq")
        assert ("divergence" in about) == name.startswith("awq") | name.endswith("curvature")
    if name == "gptq-w4g128":
        assert np.mean([about["error"] / about["rtn_error"] for about in layers.values()]) < 0.9
    if name == "gptq-w4g128-curvature":
        ready.stage("quantize", "gptq-w4g128")
        assert mean_divergence(report) < 0.95 * mean_divergence(with_factors(Quantized("artifacts/quantized/gptq-w4g128")))
    assert f"quantize {name}: " in capsys.readouterr().out


def mean_divergence(report: dict) -> float:
    """The mean over the layers of the divergence over round-to-nearest's."""
    return float(np.mean([about["divergence"] / about["rtn_divergence"] for about in report["layers"].values()]))


def with_factors(quantized: Quantized) -> dict:
    """The report of a recipe without curvature rounding, with the divergences worked out."""
    model, moments, layers = Checkpoint("artifacts/model"), Moments("artifacts/calibration"), {}
    for name in quantized.linears:
        weight, linear = torch.from_numpy(model.tensor(f"{name}.weight")), quantized.linear(name)
        statistics = torch.from_numpy(moments.moment(name)), torch.from_numpy(moments.factors(name))
        naive = rtn.quantize(weight, linear.bits, linear.group_size, linear.symmetric)
        layers[name] = {key: divergence(torch.from_numpy(one.dequantize()) - weight, *statistics)
                        for key, one in (("divergence", linear), ("rtn_divergence", naive))}
    return {"layers": layers}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_awq_goes_with_every_rounding(ready, rounding):
    ready.compose("recipe=[none,awq-w4g128]", "variant=[bf16]", f"recipes.awq-w4g128.rounding={rounding}",
                  "recipes.awq-w4g128.bits=3", "recipes.awq-w4g128.curvature=true")
    ready.stage("quantize", "awq-w4g128")
    layers = Quantized("artifacts/quantized/awq-w4g128").report["layers"]
    assert all(about["divergence"] < about["rtn_divergence"] for about in layers.values())
    assert all((about["damping"] is not None) == (rounding == "gptq") for about in layers.values())


def test_curvature_needs_a_calibration_with_gradients(ready, capsys):
    ready.compose("recipe=[none,gptq-w4g128-curvature,q4_k_m-curvature]", "variant=[bf16]", "calibration.curvature=false")
    ready.stage("calibrate")
    assert {path.name for path in (ready.root / "artifacts/calibration").iterdir()} == {
        "calibration.json", "tokens.safetensors", "final.safetensors", "inputs-000.safetensors", "inputs-001.safetensors"}
    for name in ("gptq-w4g128-curvature", "q4_k_m-curvature"):
        refused(ready, capsys, name, Failure.CALIBRATION_EMPTY, "set calibration.curvature=true")


def ready_recipe(project, name: str) -> dict:
    from quantline.config.compose import load_params

    return load_params(project.root / "params.yaml").recipes[name].model_dump(mode="json")


def test_awq_folds_its_scales_so_that_the_function_stays(ready, tiny_model):
    """At 8 bits nothing but a wrong folding could move the logits."""
    ready.compose("recipe=[none,awq-w4g128]", "variant=[bf16]", "recipes.awq-w4g128.bits=8",
                  "recipes.awq-w4g128.group_size=32")
    for name in ("none", "awq-w4g128"):
        ready.stage("quantize", name)
    model, quantized = Checkpoint(tiny_model), Quantized("artifacts/quantized/awq-w4g128")
    folded = {one["into"]: one["reach"] for one in quantized.report["transforms"] if one["step"] == "fold_scales"}
    assert {name.split(".", 3)[-1] for name in folded} == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    assert any(reach > 0 for reach in folded.values())
    assert len(quantized.overrides) == 4
    moved = [np.abs(quantized.override(name) / model.tensor(name) - 1).max() for name in quantized.overrides]
    assert max(moved) > 0.05
    tokens = tokens_of(model)
    plain = torch_logprobs(torch_model(model, Quantized("artifacts/quantized/none")), tokens)
    assert np.abs(torch_logprobs(torch_model(model, quantized), tokens) - plain).mean() < 0.02


def test_a_k_quant_names_the_type_asked_and_got_for_every_tensor(ready):
    ready.stage("quantize", "q4_k_m")
    quantized = Quantized("artifacts/quantized/q4_k_m")
    tensors = quantized.report["tensors"]
    assert set(tensors) == set(quantized.blocks_names) == set(Checkpoint("artifacts/model").names)
    told = dict(tensors["model.layers.0.mlp.gate_proj.weight"])
    assert 0 < told.pop("diagonal_error") < told.pop("rtn_diagonal_error") and told.pop("error_rows") == 512
    assert told | {"tokens": 512} == {
        "requested": "Q4_K", "actual": "Q4_K", "shape": [512, 256], "tokens": 512, "importance": True}
    assert tensors["model.embed_tokens.weight"]["actual"] == "Q6_K" and tensors["model.norm.weight"]["actual"] == "F32"


def test_a_curved_k_quant_is_held_against_ggmls_own_rounding(ready, capsys):
    ready.stage("quantize", "q4_k_m-curvature")
    assert "20 tensors rounded, divergence 0." in capsys.readouterr().out
    tensors = Quantized("artifacts/quantized/q4_k_m-curvature").report["tensors"]
    curved = {name: about for name, about in tensors.items() if "divergence" in about}
    assert len(curved) == 14 and all(about["tokens"] == 512 and about["importance"] for about in curved.values())
    assert all(0 < about["divergence"] < 0.7 * about["ggml_divergence"] for about in curved.values())
    assert all(about["error"] > 0 and about["ggml_error"] > 0 for about in curved.values())
    ready.stage("quantize", "q4_k_m")
    plain, ours = Quantized("artifacts/quantized/q4_k_m"), Quantized("artifacts/quantized/q4_k_m-curvature")
    moved = {f"{one['into']}.weight" for one in ours.report["transforms"] if one["step"] == "fold_scales" and one["reach"] > 0}
    assert any("norm" in name for name in moved)
    for name, about in tensors.items():
        kind, data, _ = ours.blocks(name)
        assert kind == about["actual"] and np.array_equal(data, plain.blocks(name)[1]) == (name not in {*curved, *moved})


def test_a_curved_k_quant_worse_than_ggmls_is_a_failure(ready, capsys, monkeypatch):
    monkeypatch.setattr(kquant_curvature, "quantize",
                        lambda weight, kind, *rest: (kquant.quantize(weight * 1.3, kind), 0.01))
    refused(ready, capsys, "q4_k_m-curvature", Failure.WORSE_THAN_ROUND_TO_NEAREST, "ggml's own rounding's")


def refused(project, capsys, name: str, failure: Failure, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        project.stage("quantize", name)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"quantize {name}: export_quantization_failed ({failure}): " in error and words in error
    last = project.events()[-1]
    assert (last["severity"], last["reason_code"]) == ("error", Reason.EXPORT_QUANTIZATION_FAILED)
    assert last["payload"] == {"instance": name, "failure": failure} and words in last["summary"]
    quantized = project.root / "artifacts/quantized"
    assert not quantized.exists() or not list(quantized.iterdir())


def test_a_mix_that_needs_an_importance_matrix(ready, capsys):
    ready.compose(f"recipe=[{','.join(RECIPES)}]", "recipes.q4_k_m.mix=IQ2_XS", "recipes.q4_k_m.importance=false")
    refused(ready, capsys, "q4_k_m", Failure.IMPORTANCE_MISSING, "IQ2_XS is garbage without one")


def test_rows_that_the_groups_do_not_divide(ready, capsys, make_model, tmp_path):
    shutil.rmtree(ready.root / "artifacts/model")
    shutil.copytree(make_model(tmp_path / "odd", intermediate_size=320, num_hidden_layers=1),
                    ready.root / "artifacts/model")
    ready.stage("calibrate")
    capsys.readouterr()
    refused(ready, capsys, "gptq-w4g128", Failure.UNSUPPORTED_WIDTH, "group_size can be 64, 32 here")


def test_weights_that_are_not_finite(ready, capsys):
    folder = ready.root / "artifacts/model"
    base = Checkpoint(folder)
    tensors = {name: base.raw(name).copy() for name in base.names}
    tensors["model.layers.1.self_attn.v_proj.weight"].reshape(-1)[5] = np.nan
    (folder / "model.safetensors").unlink()
    with SafetensorsStream(folder / "model.safetensors", base.names) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)
    for name in ("rtn-w4g128", "awq-w4g128", "q4_k_m"):
        refused(ready, capsys, name, Failure.NON_FINITE, "not finite")


def spoil_moment(project, layer: str, part: str, change) -> None:
    """Change the diagonal or the triangle of one H of the stored calibration."""
    folder = project.root / "artifacts/calibration"
    about = Moments(folder).info["layers"][layer]
    path, key = folder / f"inputs-{about['block']:03d}.safetensors", f"{about['moments']}.{part}"
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    path.unlink()
    with SafetensorsStream(path, sorted(tensors)) as stream:
        for name, tensor in sorted(tensors.items()):
            stream.add(name, tensor)


def test_moments_that_cannot_be_inverted(ready, capsys):
    spoil_moment(ready, "model.layers.1.mlp.down_proj", "diagonal",
                 lambda values: np.where(values == values.max(), -2 * values, 2 * values))
    refused(ready, capsys, "gptq-w4g128", Failure.HESSIAN_NOT_POSITIVE_DEFINITE, "calibrate on more text")


def test_moments_that_are_not_finite(ready, capsys):
    spoil_moment(ready, "model.layers.0.mlp.down_proj", "diagonal", lambda values: values * np.float32("nan"))
    refused(ready, capsys, "gptq-w4g128", Failure.NON_FINITE, "model.layers.0.mlp.down_proj")


def test_a_layer_worse_than_round_to_nearest_is_a_failure(ready, capsys, monkeypatch):
    monkeypatch.setattr("quantline.methods.integer.gptq.improve", lambda linear, weight, *_: rtn.quantize(weight * 1.3, 4, 128, False))
    refused(ready, capsys, "gptq-w4g128", Failure.WORSE_THAN_ROUND_TO_NEAREST,
            "model.layers.0.self_attn.q_proj has the error")


def stopped_after(project, name: str, parts: int) -> None:
    """A quantize process that the system kills when it has written `parts` parts."""
    code = f"""
import os, sys
from stages import quantize
from quantline.quantized.store import QuantizedWriter
from quantline.run.stage import stage_run
close, done = QuantizedWriter.close_part, []
def close_part(self, part, report):
    close(self, part, report)
    done.append(part)
    if len(done) == {parts}:
        os.kill(os.getpid(), 9)
QuantizedWriter.close_part = close_part
with stage_run("quantize", {name!r}) as run:
    quantize.quantize(run)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project.root, check=False, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9


@pytest.mark.parametrize("name", ["awq-w4g128", "q4_k_m"])
def test_a_killed_run_goes_on_at_the_block_where_it_stopped(ready, name, capsys, monkeypatch):
    ready.stage("quantize", name)
    wanted = files(ready, name)
    shutil.rmtree(ready.root / "artifacts/quantized")
    stopped_after(ready, name, 1)
    assert not (ready.root / "artifacts/quantized" / name).exists()
    made = []
    close = QuantizedWriter.close_part
    monkeypatch.setattr(QuantizedWriter, "close_part", lambda self, part, report: (made.append(part), close(self, part, report)))
    ready.stage("quantize", name)
    assert "goes on where an earlier run stopped" in capsys.readouterr().out
    assert made == {"awq-w4g128": ["block-001"], "q4_k_m": ["block-001", "rest"]}[name]
    assert files(ready, name) == wanted
    assert [path.name for path in (ready.root / "artifacts/quantized").iterdir()] == [name]


def test_a_killed_run_does_not_go_on_when_something_changed(ready, capsys):
    ready.compose("recipe=[none,rtn-w4g128]", "variant=[bf16]")
    stopped_after(ready, "rtn-w4g128", 1)
    ready.compose("recipe=[none,rtn-w4g128]", "variant=[bf16]", "recipes.rtn-w4g128.bits=3")
    ready.stage("quantize", "rtn-w4g128")
    assert "does not go on where an earlier run stopped: recipe changed since" in capsys.readouterr().out
    assert {about["bits"] for about in Quantized("artifacts/quantized/rtn-w4g128").report["layers"].values()} == {3}
    stopped_after(ready, "rtn-w4g128", 1)
    (ready.root / "artifacts/model/model.safetensors").touch()
    ready.stage("quantize", "rtn-w4g128")
    assert "stopped: model changed since" in capsys.readouterr().out


def test_a_recipe_that_there_is_not(ready, capsys):
    with pytest.raises(SystemExit):
        ready.stage("quantize", "gptq-w4g12")
    assert "did you mean gptq-w4g128?" in capsys.readouterr().err
    assert ready.events()[-1]["reason_code"] == Reason.CONFIG_INVALID
