"""4-bit floats with scales: gpt-oss's MXFP4, Model Optimizer's NVFP4, bitsandbytes' NF4 and FP4."""

import json

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize import dequantize
from tests.helpers.models import write_model
from tests.helpers.quantized_sources import (
    assert_same_state,
    edit_settings,
    edit_tensors,
    is_linear,
    plain_tensors,
    state_of,
    write_source,
)

MODULE = "model.layers.0.mlp.down_proj"
NAME = f"{MODULE}.weight"
ROWS = 64
COLUMNS = 160
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def only_down(stored):
    return lambda name, _: stored if name == NAME else None


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16).float().numpy()


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A plain gpt-oss, and the same with random MXFP4 experts."""
    root = tmp_path_factory.mktemp("gpt_oss")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    plain = write_model(root / "plain", "gpt_oss", **sizes)
    draw = torch.Generator().manual_seed(8)

    def blocks(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32)
        return {
            f"{name}_blocks": torch.randint(
                0, 256, (*shape, 16), generator=draw, dtype=torch.uint8
            ),
            f"{name}_scales": torch.randint(115, 125, shape, generator=draw, dtype=torch.uint8),
        }

    return write_source(plain, root / "source", {"quant_method": "mxfp4"}, blocks)


def test_mxfp4_is_what_transformers_loads_bit_for_bit(gpt_oss, tmp_path):
    step = dequantize(gpt_oss, tmp_path / "plain")
    assert step["tensors"] == 2
    assert_same_state(state_of(tmp_path / "plain"), state_of(gpt_oss))


def test_mxfp4_refuses_blocks_without_scales_and_scales_that_are_none(gpt_oss, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    source = write_source(gpt_oss, tmp_path / "nan", {"quant_method": "mxfp4"}, lambda *_: None)
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(3, 96, 64)}))
    with pytest.raises(StageError, match="either plain or quantized"):
        dequantize(source, tmp_path / "plain0")
    edit_tensors(source, lambda tensors: tensors.pop(name))
    edit_tensors(source, lambda tensors: tensors[f"{name}_scales"].view(-1)[:1].fill_(255))
    with pytest.raises(StageError, match="down_proj_scales") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.NON_FINITE
    edit_tensors(source, lambda tensors: tensors.pop(f"{name}_scales"))
    with pytest.raises(StageError, match="the scales of") as caught:
        dequantize(source, tmp_path / "plain2")
    assert caught.value.failure == Failure.MISSING_SHARD


def nvfp4_parts():
    """Return stored parts of a layer, and the weight that they stand for."""
    draw = np.random.default_rng(9)
    codes = draw.integers(0, 16, (ROWS, COLUMNS))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    scales = torch.from_numpy(draw.uniform(1, 100, (ROWS, COLUMNS // 16)))
    scales = scales.to(torch.float8_e4m3fn)
    second = torch.tensor(0.0017)
    factors = (scales.float() * second).numpy().repeat(16, axis=1)
    stored = {
        NAME: torch.from_numpy(packed),
        f"{NAME}_scale": scales,
        f"{NAME}_scale_2": second,
        f"{MODULE}.input_scale": torch.tensor(1.0),
    }
    return stored, np.array(E2M1, np.float32)[codes] * factors


def test_modelopt_nvfp4_is_codes_times_both_scales(make_source, dequantized):
    stored, wanted = nvfp4_parts()
    made = make_source({"quant_method": "modelopt", "quant_algo": "NVFP4"}, only_down(stored))
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def test_modelopt_fp8_has_one_scale(make_source, dequantized):
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    stored = {NAME: codes, f"{NAME}_scale": torch.tensor(0.3)}
    made = make_source({"quant_method": "modelopt", "quant_algo": "FP8"}, only_down(stored))
    wanted = (codes.float() * torch.tensor(0.3)).numpy()
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def test_modelopt_refuses_scales_of_inputs_and_a_missing_second_scale(make_source, tmp_path):
    stored, _ = nvfp4_parts()
    source = make_source({"quant_method": "modelopt"}, only_down(stored))
    edit_tensors(source, lambda tensors: tensors.pop(f"{NAME}_scale_2"))
    with pytest.raises(StageError, match="the second of") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.MISSING_SHARD
    edit_tensors(
        source, lambda tensors: tensors.update({f"{MODULE}.pre_quant_scale": stored[NAME]})
    )
    with pytest.raises(StageError, match="pre_quant_scale") as caught:
        dequantize(source, tmp_path / "plain2")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


# As the library's documentation has them: quantiles of a normal distribution, and E2M1 over 6.
MAPS = {
    "nf4": [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    "fp4": [
        sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
    ],
}  # fmt: skip
BNB4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}


def bnb_parts(kind="nf4", nested=False, storage=torch.uint8):
    """Return stored parts of a layer in blocks of 64, and the weight that they stand for."""
    draw = np.random.default_rng(10)
    codes = draw.integers(0, 16, ROWS * COLUMNS)
    packed = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)).view(storage)
    count = ROWS * COLUMNS // 64
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    stored = {NAME: packed.reshape(-1, 1), f"{NAME}.quant_map": torch.tensor(MAPS[kind])}
    absmax = draw.uniform(0.1, 0.3, count).astype(np.float32)
    if nested:
        inner = draw.integers(0, 256, count).astype(np.uint8)
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        outer = np.array([0.05], np.float32)
        absmax = table[inner] * outer[0] + np.float32(0.2)
        stored[f"{NAME}.absmax"] = torch.from_numpy(inner)
        stored[f"{NAME}.nested_absmax"] = torch.from_numpy(outer)
        stored[f"{NAME}.nested_quant_map"] = torch.from_numpy(table)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.2}
    else:
        stored[f"{NAME}.absmax"] = torch.from_numpy(absmax)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    stored[f"{NAME}.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(text)
    wanted = np.array(MAPS[kind], np.float32)[codes].reshape(-1, 64) * absmax[:, None]
    return stored, wanted.reshape(ROWS, COLUMNS)


@pytest.mark.parametrize(
    "form",
    [{}, {"kind": "fp4"}, {"nested": True}, {"nested": True, "storage": torch.bfloat16}],
    ids=["nf4", "fp4", "nested", "stored as bfloat16"],
)
def test_bitsandbytes_4_bits(form, make_source, dequantized):
    stored, wanted = bnb_parts(**form)
    found = dequantized(make_source(BNB4, only_down(stored)))[NAME]
    assert np.array_equal(found.astype(np.float32), as_bfloat16(wanted))


def bnb8(name, weight):
    """Quantize as LLM.int8() stores its layers."""
    if not is_linear(name):
        return None
    largest = weight.abs().amax(1).float()
    codes = (weight.float() / largest[:, None] * 127).round().to(torch.int8)
    return {
        name: codes,
        name.replace("weight", "SCB"): largest,
        name.replace("weight", "weight_format"): torch.tensor(0, dtype=torch.uint8),
    }


BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


def test_bitsandbytes_8_bits(narrow, make_source, tmp_path):
    source = make_source(BNB8, bnb8)
    assert dequantize(source, tmp_path / "plain")["tensors"] == 7
    stored = plain_tensors(source)
    found = plain_tensors(tmp_path / "plain")
    assert found.keys() == plain_tensors(narrow).keys()
    scale = stored[f"{MODULE}.SCB"].astype(np.float64)
    exact = stored[NAME].astype(np.float64) * scale[:, None] / 127
    near = np.abs(found[NAME].astype(np.float64) - exact)
    assert (near <= np.abs(exact) * 2**-8).all()  # half a step of bfloat16


def other_type(tensors):
    state = f"{NAME}.quant_state.bitsandbytes__"
    tensors[f"{state}af4"] = tensors.pop(f"{state}nf4")


def drop(part):
    return lambda tensors: tensors.pop(part)


def other_map(tensors):
    tensors[f"{NAME}.quant_map"][3] = 0.9


def cut(tensors):
    tensors[NAME] = tensors[NAME][:-4]


def infinite(tensors):
    tensors[f"{NAME}.absmax"][0] = torch.inf


def state_cut(tensors):
    name = f"{NAME}.quant_state.bitsandbytes__nf4"
    tensors[name] = tensors[name][:-1]


SHAPE = Failure.UNSUPPORTED_ARCHITECTURE
BROKEN = {
    "another type": (other_type, SHAPE, "af4"),
    "another map": (other_map, SHAPE, "quant_map"),
    "no scales": (drop(f"{NAME}.absmax"), Failure.MISSING_SHARD, "the absmax of"),
    "no state": (drop(f"{NAME}.quant_state.bitsandbytes__nf4"), SHAPE, "quantized tensors"),
    "cut": (cut, SHAPE, "weight to be"),
    "infinite": (infinite, Failure.NON_FINITE, "absmax"),
    "state cut": (state_cut, SHAPE, "JSON with a shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bitsandbytes_refuses(case, make_source, tmp_path):
    spoil, failure, words = BROKEN[case]
    source = make_source(BNB4, only_down(bnb_parts()[0]))
    edit_tensors(source, spoil)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


def test_bitsandbytes_8_bits_refuses_tiles_and_missing_scales(make_source, tmp_path):
    source = make_source(BNB8, bnb8)
    form = f"{MODULE}.weight_format"
    edit_tensors(source, lambda tensors: tensors[form].fill_(2))
    with pytest.raises(StageError, match="weight_format"):
        dequantize(source, tmp_path / "plain")
    edit_tensors(source, lambda tensors: [tensors.pop(form), tensors.pop(f"{MODULE}.SCB")])
    with pytest.raises(StageError, match="the SCB of") as caught:
        dequantize(source, tmp_path / "plain2")
    assert caught.value.failure == Failure.MISSING_SHARD


def test_older_files_of_bitsandbytes_name_no_method(make_source, tmp_path):
    source = make_source({"load_in_8bit": True}, bnb8)
    assert dequantize(source, tmp_path / "plain")["method"] == "bitsandbytes"
    edit_settings(source, mystery=3)
    with pytest.raises(StageError, match="mystery = 3"):
        dequantize(source, tmp_path / "plain2")
