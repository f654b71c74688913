"""compressed-tensors, against what the library itself makes of the same tensors."""

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize import dequantize
from tests.helpers.quantized_sources import edit_settings, edit_tensors

NAME = "model.layers.0.mlp.down_proj"
ROWS = 64
COLUMNS = 160
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
# Form → the format that it is stored in, the arguments of its weights, those of its activations.
FORMS = {
    "w4 symmetric": ("pack-quantized", INT4 | {"symmetric": True}, None),
    "w4 asymmetric": ("pack-quantized", INT4 | {"symmetric": False}, None),
    "w3 of rows": (
        "pack-quantized",
        {"num_bits": 3, "type": "int", "strategy": "channel", "symmetric": False},
        None,
    ),
    "w8a8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        DYNAMIC,
    ),
    "int8 asymmetric": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        DYNAMIC,
    ),
    "fp8 of tensors": ("naive-quantized", FLOAT8 | {"strategy": "tensor"}, None),
    "fp8 of rows": ("float-quantized", FLOAT8 | {"strategy": "channel"}, None),
    "fp8 of blocks": (
        "naive-quantized",
        FLOAT8 | {"strategy": "block", "block_structure": [32, 64]},
        None,
    ),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, None),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float"} | MX, None),
    "mxfp6": ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float"} | MX, None),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float"} | MX, None),
}


def parameters_of(weights) -> dict[str, torch.Tensor]:
    """Draw scales and zero points in the shapes that a strategy asks for."""
    draw = torch.Generator().manual_seed(2)
    shape = {
        "tensor": (1,),
        "channel": (ROWS, 1),
        "group": (ROWS, COLUMNS // (weights.group_size or 1)),
        "tensor_group": (ROWS, COLUMNS // (weights.group_size or 1)),
        "block": (2, 3),
    }[weights.strategy]
    made = {"weight_scale": 0.01 + 0.02 * torch.rand(shape, generator=draw)}
    if weights.scale_dtype == torch.uint8:
        made["weight_scale"] = torch.exp2(torch.randint(-8, -4, shape, generator=draw).float())
    if not weights.symmetric:
        half = 2 ** (weights.num_bits - 1)
        zeros = torch.randint(-half, half, shape, generator=draw)
        made["weight_zero_point"] = zeros.to(torch.int8)
    if weights.strategy == "tensor_group":
        made["weight_global_scale"] = torch.tensor([300.0])
        made["weight_scale"] *= 300
    return made


def stored_and_wanted(form: str):
    """Return settings, what the library stores of a weight, and what it makes of that again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    name, weights, activations = FORMS[form]
    group = {"targets": ["Linear"], "weights": weights}
    if activations:
        group["input_activations"] = activations
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(name)
    draw = torch.Generator().manual_seed(3)
    weight = 0.1 * torch.randn(ROWS, COLUMNS, generator=draw)
    stored = compressor.compress({"weight": weight} | parameters_of(scheme.weights), scheme)
    wanted = compressor.decompress(stored, scheme)["weight"]
    plain = {key: value for key, value in group.items() if value is not None}
    settings = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": plain},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return settings, {f"{NAME}.{part}": tensor for part, tensor in stored.items()}, wanted


@pytest.mark.parametrize("form", FORMS)
def test_compressed_tensors_are_what_the_library_makes_of_them(form, make_source, dequantized):
    settings, stored, wanted = stored_and_wanted(form)
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    found = dequantized(source)[f"{NAME}.weight"].astype(np.float32)
    # The library multiplies in the dtype of the scale, which is float32 here, except in its
    # packed floats, which it rounds to bfloat16 as is done here at the end.
    assert np.array_equal(found, wanted.to(torch.bfloat16).float().numpy())


def test_compressed_tensors_in_the_order_of_activations(make_source, dequantized):
    settings, stored, _ = stored_and_wanted("w4 asymmetric")
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4)) % 5
    stored |= {f"{NAME}.weight_g_idx": order.to(torch.int32)}
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    found = dequantized(source)[f"{NAME}.weight"].astype(np.float32)

    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(stored[f"{NAME}.weight_packed"], 4, (ROWS, COLUMNS))
    zeros = unpack_from_int32(stored[f"{NAME}.weight_zero_point"], 4, (ROWS, 5), packed_dim=0)
    scale = stored[f"{NAME}.weight_scale"]
    wanted = (codes.float() - zeros.float()[:, order]) * scale[:, order]
    assert np.array_equal(found, wanted.to(torch.bfloat16).float().numpy())


def test_compressed_tensors_leave_out_what_belongs_to_activations(make_source, tmp_path):
    settings, stored, _ = stored_and_wanted("fp8 of tensors")
    stored |= {f"{NAME}.input_scale": torch.ones(1)}
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    step = dequantize(source, tmp_path / "plain")
    assert step["left_out"] == ["input_scale", "k_scale"]


def drop(part):
    return lambda tensors: tensors.pop(f"{NAME}.{part}")


def cut_words(tensors):
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"][:, :-1]


def infinite_scale(tensors):
    tensors[f"{NAME}.weight_scale"][0, 0] = torch.inf


def not_compressed(tensors):
    for part in ("weight_packed", "weight_shape"):
        del tensors[f"{NAME}.{part}"]
    tensors[f"{NAME}.weight"] = torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)


def keep(part, count, dimension=0):
    """Cut a part to so many rows or columns, of which the others are a multiple."""

    def change(tensors):
        tensors[f"{NAME}.{part}"] = tensors[f"{NAME}.{part}"].narrow(dimension, 0, count)

    return change


def cast(part, dtype):
    def change(tensors):
        tensors[f"{NAME}.{part}"] = tensors[f"{NAME}.{part}"].to(dtype)

    return change


def add(part, values):
    return lambda tensors: tensors.update({f"{NAME}.{part}": values})


SHAPE = Failure.UNSUPPORTED_ARCHITECTURE
SCALES = "weight_scale to be one number for each block"
ZEROS = "weight_zero_point to be one for each scale"
# What is cut to a divisor of what should be there still divides the weight.
CUT = {
    "rows of scales": ("w4 symmetric", keep("weight_scale", 32), SHAPE, SCALES),
    "groups": ("w4 symmetric", keep("weight_scale", 1, 1), SHAPE, SCALES),
    "scales of rows": ("w8a8", keep("weight_scale", 1), SHAPE, SCALES),
    "scales of blocks": ("fp8 of blocks", keep("weight_scale", 1, 1), SHAPE, SCALES),
    "scales of nvfp4": ("nvfp4", keep("weight_scale", 5, 1), SHAPE, SCALES),
    "exponents": ("mxfp4", keep("weight_scale", 16), SHAPE, SCALES),
    "packed zeros": ("w4 asymmetric", keep("weight_zero_point", 4), SHAPE, ZEROS),
    "zeros": ("int8 asymmetric", keep("weight_zero_point", 1), SHAPE, ZEROS),
    "all zeros": (
        "w4 asymmetric",
        drop("weight_zero_point"),
        Failure.MISSING_SHARD,
        "the weight_zero_point of",
    ),
    "the divisor": (
        "nvfp4",
        drop("weight_global_scale"),
        Failure.MISSING_SHARD,
        "the weight_global_scale of",
    ),
    "a side": ("w4 symmetric", keep("weight_shape", 1), SHAPE, "the two sides"),
    "fractions": ("w8a8", cast("weight_scale", torch.int64), SHAPE, "floating-point"),
    "powers of two": ("mxfp8", cast("weight_scale", torch.float32), SHAPE, SCALES),
    "bytes": ("mxfp6", cast("weight_packed", torch.float32), SHAPE, "compressed, as its"),
    "zeros of none": (
        "w4 symmetric",
        add("weight_zero_point", torch.ones(ROWS, 5, dtype=torch.int8)),
        SHAPE,
        "0, as config_groups says symmetric",
    ),
    "one weight": (
        "w4 symmetric",
        add("weight", torch.zeros(ROWS, COLUMNS)),
        SHAPE,
        "one weight of a layer",
    ),
    "a group": (
        "w4 symmetric",
        add("weight_g_idx", torch.arange(-1, COLUMNS - 1, dtype=torch.int32) // 32),
        SHAPE,
        "weight_g_idx to be 160 numbers of 5 groups",
    ),
}


@pytest.mark.parametrize("case", CUT)
def test_compressed_tensors_refuse_parts_that_are_not_those_of_the_scheme(
    case, make_source, tmp_path
):
    form, spoil, failure, words = CUT[case]
    settings, stored, _ = stored_and_wanted(form)
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    edit_tensors(source, spoil)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


def test_compressed_tensors_of_several_schemes_are_read_by_the_one_that_fits(
    make_source, dequantized
):
    settings, stored, wanted = stored_and_wanted("w4 asymmetric")
    groups = settings["config_groups"]
    groups["group_1"] = {"weights": INT4 | {"group_size": 16, "symmetric": True}}
    groups["group_2"] = {"weights": FLOAT8 | {"strategy": "channel"}}
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    found = dequantized(source)[f"{NAME}.weight"].astype(np.float32)
    assert np.array_equal(found, wanted.to(torch.bfloat16).float().numpy())


def test_a_layer_that_is_quantized_is_read_also_where_the_options_ignore_it(
    make_source, dequantized
):
    settings, stored, wanted = stored_and_wanted("w8a8")
    settings["ignore"] = ["re:.*down_proj"]
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    found = dequantized(source)[f"{NAME}.weight"].astype(np.float32)
    assert np.array_equal(found, wanted.to(torch.bfloat16).float().numpy())


BROKEN = {
    "scale missing": (drop("weight_scale"), Failure.MISSING_SHARD, "weight_scale of"),
    "codes missing": (drop("weight_packed"), Failure.MISSING_SHARD, "weight of"),
    "shape missing": (drop("weight_shape"), Failure.MISSING_SHARD, "weight_shape of"),
    "cut": (cut_words, Failure.UNSUPPORTED_ARCHITECTURE, "weight_packed to be"),
    "infinite": (infinite_scale, Failure.NON_FINITE, "weight_scale"),
    "not compressed": (not_compressed, Failure.UNSUPPORTED_ARCHITECTURE, "compressed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_compressed_tensors_refuse(case, make_source, tmp_path):
    spoil, failure, words = BROKEN[case]
    settings, stored, _ = stored_and_wanted("w4 symmetric")
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    edit_tensors(source, spoil)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


OPTIONS = {
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "turned": ({"transform_config": {"config_groups": {"r1": {"type": "hadamard"}}}}, "turns"),
    "frozen": ({"quantization_status": "frozen"}, "frozen"),
    "other width": ({"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "weight_packed to be"),
    "none": ({"config_groups": {}}, "config_groups"),
    "groups of another size": (
        {"config_groups": {"a": {"weights": INT4 | {"group_size": 64}}}},
        "one number for each block",
    ),
    "groups in another order": (
        {"config_groups": {"a": {"weights": INT4 | {"actorder": "group"}}}},
        "the weight_g_idx of",
    ),
    "a width in words": ({"config_groups": {"a": {"weights": {"num_bits": "4"}}}}, "num_bits '4'"),
    "no strategy": (
        {"config_groups": {"a": {"weights": INT4 | {"strategy": "token"}}}},
        "strategy 'token'",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_compressed_tensors_refuse_options(case, make_source, tmp_path):
    changes, words = OPTIONS[case]
    settings, stored, _ = stored_and_wanted("w4 symmetric")
    source = make_source(settings, lambda name, _: stored if name == f"{NAME}.weight" else None)
    edit_settings(source, **changes)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    missing = words == "the weight_g_idx of"
    assert caught.value.failure == (Failure.MISSING_SHARD if missing else SHAPE)
