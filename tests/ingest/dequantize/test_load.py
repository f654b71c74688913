"""load on a quantized source, from its folder to the model's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from quantline.config.params import Model
from quantline.errors import Failure, StageError
from quantline.files import sha256_file
from quantline.ingest.load import load
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized_sources import edit_settings, edit_tensors, is_linear, write_source

MODEL = Path("artifacts/model")
SETTINGS = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def halved(name, weight):
    """Codes that are half of the weights, as exactly as 8 bits go, with a scale of 2."""
    if not is_linear(name):
        return None
    codes = (weight / 2).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": torch.tensor(2.0)}


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory) -> Path:
    return write_source(tiny_model, tmp_path_factory.mktemp("fp8") / "source", SETTINGS, halved)


def test_load_writes_the_plain_model_and_says_so(project, source, tiny_model, capsys):
    project.compose(f"model.path={source}")
    project.stage("load")
    loaded = Checkpoint(MODEL)
    original = Checkpoint(tiny_model)
    assert loaded.names == original.names
    for name in loaded.names:
        wanted = original.raw(name)
        if is_linear(name):
            codes = torch.from_numpy(wanted.astype(np.float32) / 2).to(torch.float8_e4m3fn)
            wanted = 2 * codes.float().numpy()
        assert loaded.raw(name).dtype == original.raw(name).dtype
        assert np.array_equal(loaded.raw(name), wanted)
    config = json.loads((MODEL / "config.json").read_text())
    assert "quantization_config" not in config
    assert sorted(path.name for path in MODEL.iterdir()) == sorted(
        [*(path.name for path in tiny_model.iterdir()), *WRITTEN]
    )
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert manifest["transforms"] == [
        {
            "step": "dequantize",
            "method": "fp8",
            "settings": {"activation_scheme": "static", "weight_block_size": None},
            "dtype": "bfloat16",
            "tensors": 14,
            "left_out": [],
        }
    ]
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(source / name)
    assert "by dequantizing" in capsys.readouterr().out
    warnings = [event for event in project.events() if event["severity"] == "warning"]
    assert any("The source is quantized by fp8" in event["summary"] for event in warnings)


WRITTEN = ("configuration.json", "lineage.json", "manifest.json", "special_tokens.json")


def test_load_twice_gives_the_same_bytes(project, source):
    project.compose(f"model.path={source}")
    project.stage("load")
    first = sha256_file(MODEL / "model.safetensors")
    project.stage("load")
    assert sha256_file(MODEL / "model.safetensors") == first


@pytest.mark.parametrize("kept_in", [None, "quantize_config.json"])
def test_load_refuses_quantized_tensors_of_which_nothing_is_said(source, kept_in, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    if kept_in:
        (other / kept_in).write_text("{}")
    model = Model(source="local", path=str(other), watch="x")
    with pytest.raises(StageError, match="a quantization_config in") as caught:
        load(model, tmp_path / "model")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert "weight_scale_inv" in str(caught.value)
    assert (f"put what {kept_in} says there" in str(caught.value)) == bool(kept_in)


def test_errors_name_the_source_and_not_its_plain_copy(source, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    path = other / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model").mkdir()
    with pytest.raises(StageError, match="expected 3 blocks") as caught:
        load(Model(source="local", path=str(other), watch="x"), tmp_path / "model")
    assert f"the plain copy of {other}" in str(caught.value)
    assert ".plain" not in str(caught.value)


def test_a_source_that_breaks_off_halfway_leaves_nothing(project, source, tmp_path, capsys):
    other = Path(shutil.copytree(source, tmp_path / "other"))

    def spoil(tensors):
        last = max(name for name in tensors if name.endswith("_scale_inv"))
        tensors[last].fill_(torch.nan)

    edit_tensors(other, spoil)
    project.compose(f"model.path={other}")
    with pytest.raises(SystemExit) as stopped:
        project.stage("load")
    assert stopped.value.code == 1
    assert "load_rejected (non_finite): expected finite numbers in" in capsys.readouterr().err
    artifacts = project.root / "artifacts"
    assert not artifacts.exists() or list(artifacts.iterdir()) == []


def test_load_refuses_an_unknown_method_by_name(project, source, tmp_path, capsys):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit_settings(other, quant_method="higgs")
    project.compose(f"model.path={other}")
    with pytest.raises(SystemExit):
        project.stage("load")
    message = capsys.readouterr().err
    assert "unsupported_architecture" in message
    assert "bitsandbytes" in message
    assert "quantization_config of higgs" in message
    assert not MODEL.exists()
