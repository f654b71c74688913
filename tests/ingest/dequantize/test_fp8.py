"""FP8: scales of blocks, rows and tensors, against transformers' own loading and the definition."""

import json

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16 as bf16

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize import dequantize
from tests.helpers.quantized_sources import (
    assert_same_state,
    edit_settings,
    edit_tensors,
    is_linear,
    state_of,
)

FLOAT8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
DOWN = "model.layers.0.mlp.down_proj.weight"


def in_blocks(name, weight):
    """Quantize as DeepSeek does, with transformers' own operation."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(32, 32))

    if not is_linear(name):
        return None
    made = Fp8Quantize(Quantizer()).convert({name: [weight]})
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def of_tensors(name, weight):
    """Quantize as Ministral 3 was, with one scale for a tensor and one for its inputs."""
    if not is_linear(name):
        return None
    scale = weight.abs().max().to(torch.float32) / 448
    return {
        name: (weight / scale).to(FLOAT8),
        f"{name}_scale_inv": scale.to(torch.bfloat16),
        name.replace("weight", "activation_scale"): torch.tensor(0.5, dtype=torch.bfloat16),
    }


def of_rows(name, weight):
    """Quantize as fbgemm_fp8 does."""
    if not is_linear(name):
        return None
    scale = weight.abs().amax(1, keepdim=True).float() / 448
    return {name: (weight / scale).to(FLOAT8), f"{name}_scale": scale}


@pytest.mark.parametrize(("settings", "quantize"), [(BLOCKS, in_blocks), (STATIC, of_tensors)])
def test_fp8_is_what_transformers_loads_bit_for_bit(settings, quantize, make_source, tmp_path):
    source = make_source(settings, quantize)
    step = dequantize(source, tmp_path / "plain")
    assert step["method"] == "fp8"
    assert step["tensors"] == 7
    assert step["left_out"] == (["activation_scale"] if quantize is of_tensors else [])
    assert_same_state(state_of(tmp_path / "plain"), state_of(source))


def test_fp8_with_scales_of_rows_is_codes_times_scales(make_source, dequantized):
    source = make_source({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, of_rows)
    stored = {}
    edit_tensors(source, stored.update)
    found = dequantized(source)
    wanted = (stored[DOWN].float() * stored[f"{DOWN}_scale"]).to(torch.bfloat16)
    assert np.array_equal(found[DOWN].astype(np.float32), wanted.float().numpy())


def test_fp8_cuts_the_last_blocks_short_where_the_sides_are_no_multiples(make_source, dequantized):
    """Of 160 columns the third block of 64 has 32, as kv_a_proj of DeepSeek-V3 has 4.5 blocks."""

    def ragged(name, weight):
        if name != DOWN:
            return None
        return {name: weight.to(FLOAT8), f"{name}_scale_inv": torch.tensor([[1.0, 2.0, 4.0]])}

    found = dequantized(make_source(BLOCKS | {"weight_block_size": [64, 64]}, ragged))[DOWN]
    factors = np.repeat([1.0, 2.0, 4.0], 64)[:160]
    codes = found.astype(np.float32) / factors
    assert np.array_equal(codes, torch.from_numpy(codes).to(FLOAT8).float().numpy())
    assert np.abs(codes).max() < 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_fp8_takes_powers_of_two_and_4_bit_experts_as_transformers_does(
    dtype, make_source, dequantized
):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    draw = torch.Generator().manual_seed(1)
    packed = torch.randint(-128, 128, (64, 80), generator=draw, dtype=torch.int8)
    exponents = torch.randint(100, 140, (64, 5), generator=draw, dtype=torch.uint8)
    scale = exponents.view(dtype)

    def experts(name, weight):
        return {name: packed, "model.layers.0.mlp.down_proj.scale": scale} if name == DOWN else None

    found = dequantized(make_source(BLOCKS, experts))[DOWN]
    wanted = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    assert np.array_equal(found.astype(np.float32), wanted.float().numpy())


def test_fp8_restores_fused_experts_one_at_a_time(make_source, dequantized):
    codes = torch.randn(3, 64, 96).to(FLOAT8)
    scales = torch.rand(3, 2, 3) + 0.5
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def fused(old, weight):
        return {name: codes, f"{name}_scale_inv": scales} if old == DOWN else None

    found = dequantized(make_source(BLOCKS, fused))[name]
    factors = scales.repeat_interleave(32, 1).repeat_interleave(32, 2)
    wanted = (codes.float() * factors).to(torch.bfloat16).float().numpy()
    assert found.shape == (3, 64, 96)
    assert np.array_equal(found.astype(np.float32), wanted)


def test_the_dtype_is_the_one_that_config_json_names(make_source, dequantized):
    assert dequantized(make_source(BLOCKS, in_blocks))[DOWN].dtype == bf16


def drop_scale(tensors):
    del tensors[f"{DOWN}_scale_inv"]


def other_scale(tensors):
    tensors[f"{DOWN}_scale_inv"] = torch.ones(3, 7)


def scales_cut(tensors):
    """Keep so many rows of scales as divide the weight's, too."""
    scales = tensors[f"{DOWN}_scale_inv"]
    assert len(scales) % 2 == 0
    tensors[f"{DOWN}_scale_inv"] = scales[: len(scales) // 2]


def one_scale(tensors):
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"][:1, :1]


def scale_of(value):
    def change(tensors):
        tensors[f"{DOWN}_scale_inv"][0, 0] = value

    return change


def code_not_a_number(tensors):
    tensors[DOWN].view(torch.uint8)[0, 0] = 0x7F


def left_over(tensors):
    tensors["model.layers.0.mlp.down_proj.codebook"] = torch.zeros(4, dtype=torch.int16)


BROKEN = {
    "scale missing": (drop_scale, Failure.MISSING_SHARD, "the scale of model.layers.0.mlp.down"),
    "scale of another shape": (other_scale, Failure.UNSUPPORTED_ARCHITECTURE, "down_proj.weight_s"),
    "scales cut": (scales_cut, Failure.UNSUPPORTED_ARCHITECTURE, r"each block \[32, 32\]"),
    "one scale": (one_scale, Failure.UNSUPPORTED_ARCHITECTURE, r"each block \[32, 32\]"),
    "scale NaN": (scale_of(torch.nan), Failure.NON_FINITE, "down_proj.weight_scale_inv"),
    "scale infinite": (scale_of(torch.inf), Failure.NON_FINITE, "down_proj.weight_scale_inv"),
    "scale too large": (scale_of(3e38), Failure.NON_FINITE, "down_proj.weight to be finite"),
    "scale too large for a half": (
        scale_of(1e5),
        Failure.NON_FINITE,
        r"float16, found values up to .*set the dtype",
    ),
    "code NaN": (code_not_a_number, Failure.NON_FINITE, "down_proj.weight to be finite"),
    "left over": (left_over, Failure.UNSUPPORTED_ARCHITECTURE, "codebook in I16"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_fp8_refuses(case, make_source, tmp_path):
    spoil, failure, words = BROKEN[case]
    source = make_source(BLOCKS, in_blocks)
    edit_tensors(source, spoil)
    if case.endswith("half"):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


def test_fp8_refuses_scales_of_rows_that_were_cut(make_source, tmp_path):
    source = make_source({"quant_method": "fbgemm_fp8"}, of_rows)

    def cut(tensors):
        tensors[f"{DOWN}_scale"] = tensors[f"{DOWN}_scale"][:32]

    edit_tensors(source, cut)
    with pytest.raises(StageError, match=r"down_proj\.weight_scale to be") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_fp8_refuses_scales_of_more_experts_than_there_are(make_source, tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {name: torch.ones(3, 64, 96).to(FLOAT8), f"{name}_scale_inv": torch.ones(4, 2, 3)}
    source = make_source(BLOCKS, lambda old, _: stored if old == DOWN else None)
    with pytest.raises(StageError, match="one entry for each of 3 experts") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize("block", [[64, 64], None, "32x32", [32], [0, 32]])
def test_fp8_refuses_blocks_that_are_not_those_of_the_scales(block, make_source, tmp_path):
    source = make_source(BLOCKS, in_blocks)
    edit_settings(source, weight_block_size=block)
    with pytest.raises(StageError, match="block") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_fp8_refuses_an_unknown_option(make_source, tmp_path):
    source = make_source(BLOCKS, in_blocks)
    edit_settings(source, codebook="learned")
    with pytest.raises(StageError, match="codebook = 'learned'") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
