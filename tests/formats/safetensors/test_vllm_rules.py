"""Bundles obey the rules by which vLLM decides what is quantized, and how.

That vLLM itself reads them so is not tried here.
"""

import pytest

from benchmarks.models.architectures import Architecture
from benchmarks.models.tiny_checkpoint import write_checkpoint
from quantline.files import read_json, write_json
from quantline.ingest import verify
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.rtn import round_to_nearest
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from tests.helpers.quantized import CALIBRATION, activations_rounded, rounded
from tests.helpers.variants import write_variant
from tests.helpers.vllm_rules import disagreements, schemes_of

TEXT, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def two_grids(folder, source) -> QuantizedModel:
    """Round the first block to 4 bits, the others to 8."""
    import torch

    folder.mkdir()
    writer = QuantizedWriter(folder)
    for name in source.arch.linears():
        bits = 4 if source.arch.layer_index(name) == 0 else 8
        weight = torch.from_numpy(source.tensor(f"{name}.weight"))
        writer.add_linear(name, round_to_nearest(weight, Grid(bits, 32, False)))
    report = {"recipe": {"name": "two"}, "transforms": [], "calibration": CALIBRATION}
    writer.close(report)
    return QuantizedModel(folder)


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("gpt_oss", TEXT), ("deepseek_v3", TEXT), ("gemma3n_text", TEXT), ("qwen3_5", IMAGES)],
)
def test_vllm_finds_every_layer_of(model_type, auto, tmp_path):
    write_checkpoint(Architecture(model_type, auto), tmp_path / "model")
    structure = verify.check_blocks(Checkpoint(tmp_path / "model"))
    source = Checkpoint(tmp_path / "model", structure=structure)
    packed = rounded(tmp_path / "packed", source, 4, 32, symmetric=True)
    write_variant("safetensors", tmp_path / "w4a16", source, packed)
    assert disagreements(tmp_path / "w4a16") == []
    float8 = activations_rounded(tmp_path / "float8", source, "float8")
    write_variant("safetensors", tmp_path / "fp8", source, float8)
    assert disagreements(tmp_path / "fp8") == []


def test_vllm_finds_the_grid_of_every_layer(tiny_model, tmp_path):
    source = Checkpoint(tiny_model)
    write_variant("safetensors", tmp_path / "out", source, two_grids(tmp_path / "q", source))
    assert disagreements(tmp_path / "out") == []
    config = read_json(tmp_path / "out/config.json")["quantization_config"]
    bits = {name: group["weights"]["num_bits"] for name, group in config["config_groups"].items()}
    (group,) = schemes_of(config, "model.layers.0.self_attn.q_proj")
    assert bits[group] == 4


def test_what_vllm_would_not_load_is_found(tiny_model, tmp_path):
    source = Checkpoint(tiny_model)
    folder = tmp_path / "out"
    write_variant("safetensors", folder, source, two_grids(tmp_path / "q", source))
    content = read_json(folder / "config.json")
    four, eight = (g["targets"] for g in content["quantization_config"]["config_groups"].values())
    key = "model.layers.0.self_attn.k_proj"
    four.remove(key)
    eight.append(key)
    content["quantization_config"]["ignore"] = ["model.layers.0.mlp.up_proj", "no.module"]
    write_json(folder / "config.json", content)
    found = " ".join(disagreements(folder))
    assert "k_proj', 'model.layers.0.self_attn.v_proj'] are one layer" in found
    assert "up_proj'] are one layer" in found
    assert "up_proj is quantized, but ignored" in found
    assert "no.module is ignored, but no module" in found
