"""GPTQ, AWQ and AutoRound: layouts of whole linear layers, against their definitions."""

import numpy as np
import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize import dequantize
from tests.helpers.quantized_sources import edit_settings, edit_tensors, plain_tensors

MODULE = "model.layers.0.mlp.down_proj"
NAME = f"{MODULE}.weight"
ROWS = 64
COLUMNS = 160
SIZE = 32
GROUPS = COLUMNS // SIZE


def draw_layer(bits: int, seed: int = 5, symmetric: bool = False):
    """Return codes [in, out], zeros [groups, out] and scales [groups, out]."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**bits, (COLUMNS, ROWS))
    zeros = draw.integers(1, 2**bits, (GROUPS, ROWS))
    if symmetric:
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    scales = (0.01 + 0.02 * draw.random((GROUPS, ROWS))).astype(np.float16)
    return codes, zeros, scales


def packed_along(values: np.ndarray, bits: int) -> torch.Tensor:
    """Pack values [n, columns] down the columns, bit by bit, lowest first, into int32."""
    words = np.zeros((len(values) * bits // 32, values.shape[1]), np.uint64)
    for number, row in enumerate(values.astype(np.uint64)):
        for bit in range(bits):
            word, place = divmod(number * bits + bit, 32)
            words[word] |= ((row >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def gptq_parts(bits, order=None, less_one=True, symmetric=False):
    """Return the stored parts of a layer and the weight that they stand for."""
    codes, zeros, scales = draw_layer(bits, symmetric=symmetric)
    order = np.arange(COLUMNS) // SIZE if order is None else order
    parts = {
        "qweight": packed_along(codes, bits),
        "qzeros": packed_along((zeros - less_one).T, bits).T,
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    weight = (codes - zeros[order]) * scales.astype(np.float32)[order]
    return {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}, weight.T


def only_down(stored):
    return lambda name, _: stored if name == NAME else None


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).float().numpy()


def settings(bits: int = 4, **others):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": SIZE,
        "desc_act": True,
        "sym": False,
        **others,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_reads_every_width(bits, make_source, dequantized):
    stored, wanted = gptq_parts(bits)
    found = dequantized(make_source(settings(bits), only_down(stored)))[NAME]
    assert np.array_equal(found.astype(np.float32), as_bfloat16(wanted))


def test_gptq_in_the_order_of_activations(make_source, dequantized):
    order = np.random.default_rng(6).permutation(COLUMNS) % GROUPS
    stored, wanted = gptq_parts(4, order)
    found = dequantized(make_source(settings(), only_down(stored)))[NAME]
    assert np.array_equal(found.astype(np.float32), as_bfloat16(wanted))


def test_gptq_v2_stores_zeros_as_they_are(make_source, dequantized):
    stored, wanted = gptq_parts(4, less_one=False)
    made = make_source(settings(checkpoint_format="gptq_v2"), only_down(stored))
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def test_gptq_leaves_out_biases_of_zeros_that_the_model_does_not_have(make_source, tmp_path):
    """As AutoGPTQ stored them, with every layer; transformers and vLLM pass over them."""
    stored, _ = gptq_parts(4)
    stored[f"{MODULE}.bias"] = torch.zeros(ROWS, dtype=torch.float16)
    source = make_source(settings(), only_down(stored))
    assert dequantize(source, tmp_path / "plain")["left_out"] == ["bias"]
    assert f"{MODULE}.bias" not in plain_tensors(tmp_path / "plain")
    edit_tensors(source, lambda tensors: tensors[f"{MODULE}.bias"][3:].fill_(0.5))
    dequantize(source, tmp_path / "other")  # one that says something is for `verify` to refuse
    assert f"{MODULE}.bias" in plain_tensors(tmp_path / "other")


def test_gptq_without_the_group_of_each_input_counts_them(make_source, dequantized):
    stored, wanted = gptq_parts(4, symmetric=True)
    del stored[f"{MODULE}.g_idx"]
    made = make_source(settings(sym=True, desc_act=False), only_down(stored))
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def test_gptq_widths_of_their_own_are_read_where_the_options_say_so(make_source, dequantized):
    stored, wanted = gptq_parts(8)
    dynamic = {"+:.*down.*": {"bits": 8}}
    made = make_source(settings(4, dynamic=dynamic), only_down(stored))
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def test_gptq_of_gpt2_is_turned_to_how_its_checkpoints_lie(make_model, tmp_path):
    from tests.helpers.quantized_sources import write_source

    name = "transformer.h.0.attn.c_proj"
    plain = make_model(
        tmp_path / "gpt2", "gpt2", hidden_size=64, intermediate_size=160, num_hidden_layers=1
    )
    codes = np.random.default_rng(7).integers(0, 16, (64, 64))
    stored = {
        f"{name}.qweight": packed_along(codes, 4),
        f"{name}.qzeros": packed_along(np.full((64, 1), 7), 4).T,
        f"{name}.scales": torch.full((1, 64), 0.5, dtype=torch.float16),
    }
    source = write_source(
        plain,
        tmp_path / "source",
        settings(group_size=-1),
        lambda tensor, _: stored if tensor == f"{name}.weight" else None,
    )
    dequantize(source, tmp_path / "plain")
    found = plain_tensors(tmp_path / "plain")[f"{name}.weight"].astype(np.float32)
    assert np.array_equal(found, (codes - 8) * 0.5)  # [in, out], as the checkpoints of GPT-2


def test_auto_round_in_the_layout_of_gptq(make_source, dequantized):
    stored, wanted = gptq_parts(4)
    made = make_source(
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": SIZE,
            "data_type": "int",
            "sym": False,
            "iters": 200,
            "autoround_version": "0.9",
        },
        only_down(stored),
    )
    assert np.array_equal(dequantized(made)[NAME].astype(np.float32), as_bfloat16(wanted))


def awq_parts(symmetric: bool):
    """Return stored parts of a layer in AutoAWQ's order, made one code at a time."""
    codes, zeros, scales = draw_layer(4, symmetric=symmetric)

    def pack(values):
        words = np.zeros((len(values), values.shape[1] // 8), np.uint64)
        for word in range(words.shape[1]):
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                value = values[:, 8 * word + column].astype(np.uint64)
                words[:, word] |= value << np.uint64(4 * place)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())

    parts = {"qweight": pack(codes), "scales": torch.from_numpy(scales)}
    if not symmetric:
        parts["qzeros"] = pack(zeros)
    order = np.arange(COLUMNS) // SIZE
    weight = (codes - zeros[order]) * scales.astype(np.float32)[order]
    return {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}, weight.T


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_takes_codes_in_their_own_order(symmetric, make_source, dequantized):
    stored, wanted = awq_parts(symmetric)
    made = make_source(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": SIZE,
            "zero_point": not symmetric,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
        only_down(stored),
    )
    found = dequantized(made)[NAME].astype(np.float32)
    assert np.array_equal(found, as_bfloat16(wanted))


def test_awq_order_is_that_of_the_library(make_source):
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    from quantline.ingest.dequantize.formats.awq import unpack_interleaved

    stored, _ = awq_parts(False)
    words = stored[f"{MODULE}.qweight"]
    codes, _ = AutoAWQConverter.unpack_awq(words, None, 4)
    codes, _ = AutoAWQConverter.reverse_awq_order(codes, None, 4)
    assert np.array_equal(unpack_interleaved(words.numpy()), (codes & 15).numpy())


def drop(part):
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


def replace(part, value):
    def change(tensors):
        tensors[f"{MODULE}.{part}"] = value

    return change


def scale_not_a_number(tensors):
    tensors[f"{MODULE}.scales"][0, 0] = torch.nan


SHAPE = Failure.UNSUPPORTED_ARCHITECTURE
BROKEN = {
    "scales missing": (drop("scales"), Failure.MISSING_SHARD, "scales of model.layers.0.mlp.down"),
    "zeros missing": (drop("qzeros"), Failure.MISSING_SHARD, "qzeros of model.layers.0.mlp.down"),
    "codes missing": (drop("qweight"), Failure.MISSING_SHARD, "qweight of model.layers.0.mlp.down"),
    # Without them the groups of a layer in the order of activations are unknown.
    "groups missing": (drop("g_idx"), Failure.MISSING_SHARD, "g_idx of model.layers.0.mlp.down"),
    "NaN": (scale_not_a_number, Failure.NON_FINITE, "scales"),
    "zeros of another width": (replace("qzeros", torch.zeros(5, 16).int()), SHAPE, "qzeros to be"),
    "zeros of another length": (replace("qzeros", torch.zeros(4, 8).int()), SHAPE, "scales to be"),
    "a group too high": (replace("g_idx", torch.full((COLUMNS,), 5).int()), SHAPE, "g_idx to be"),
    "too few groups": (replace("g_idx", torch.zeros(4).int()), SHAPE, "g_idx to be"),
    "a group in fractions": (replace("g_idx", torch.zeros(COLUMNS)), SHAPE, "whole numbers"),
    "flat": (replace("qweight", torch.zeros(4).int()), SHAPE, "qweight to be"),
    # As many bytes as the words should have, or twice as many.
    "zeros as floats": (replace("qzeros", torch.zeros(5, 8)), SHAPE, "qzeros to be an int32"),
    "zeros in longer words": (replace("qzeros", torch.zeros(5, 8).long()), SHAPE, "an int32"),
    "scales as numbers": (replace("scales", torch.ones(5, 64).int()), SHAPE, "floating-point"),
    "plain as well": (replace("weight", torch.zeros(64, 160)), SHAPE, "either plain or quantized"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_gptq_refuses(case, make_source, tmp_path):
    spoil, failure, words = BROKEN[case]
    source = make_source(settings(), only_down(gptq_parts(4)[0]))
    edit_tensors(source, spoil)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


def two_groups(tensors):
    """Keep as many groups as divide the inputs, too."""
    for part in ("scales", "qzeros"):
        tensors[f"{MODULE}.{part}"] = tensors[f"{MODULE}.{part}"][:1]


AWQ_BROKEN = {
    "groups cut": (two_groups, SHAPE, "one row for each 32 of 160 inputs"),
    "codes missing": (drop("qweight"), Failure.MISSING_SHARD, "qweight of model.layers.0.mlp.down"),
    "flat zeros": (replace("qzeros", torch.zeros(40).int()), SHAPE, r"int32 \[5, 64 / 8\]"),
    "zeros as floats": (replace("qzeros", torch.zeros(5, 8)), SHAPE, r"int32 \[5, 64 / 8\]"),
    "no scales": (replace("scales", torch.zeros(0, 64).half()), SHAPE, "of groups that divide"),
}


@pytest.mark.parametrize("case", AWQ_BROKEN)
def test_awq_refuses(case, make_source, tmp_path):
    spoil, failure, words = AWQ_BROKEN[case]
    options = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True}
    source = make_source(options, only_down(awq_parts(False)[0]))
    edit_tensors(source, spoil)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == failure


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_refuses_symmetric_zeros_that_are_not_the_middle(less_one, make_source, tmp_path):
    """Of a checkpoint that names the other format all weights would be off by a scale."""
    stored, _ = gptq_parts(4, less_one=less_one, symmetric=True)
    other = "gptq_v2" if less_one else "gptq"
    source = make_source(settings(sym=True, checkpoint_format=other), only_down(stored))
    with pytest.raises(StageError, match="zero points of 8") as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == SHAPE


OPTIONS = {
    "groups of another size": ({"group_size": 64}, "one row for each 64 of 160 inputs"),
    "layers that are left plain": (
        {"dynamic": {"-:.*gate.*": {}}, "bits": 8},
        "qzeros to be",
    ),
    "groups of no size": ({"group_size": 0}, "a number of inputs, or -1, as group_size"),
    "no method": ({"quant_method": None}, "names no quant_method"),
    "marlin": ({"checkpoint_format": "marlin"}, "marlin"),
    "marlin as a flag": ({"is_marlin_format": True}, "is_marlin_format"),
    "five bits": ({"bits": 5}, "bits"),
    "narrow words": ({"pack_dtype": "int16"}, "int16"),
    "two formats": ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format and"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "gemv"),
    "another packing": ({"quant_method": "auto-round", "packing_format": "x"}, "packing_format"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_layouts_refuse_options(case, make_source, tmp_path):
    changes, words = OPTIONS[case]
    source = make_source(settings(), only_down(gptq_parts(4)[0]))
    edit_settings(source, **changes)
    with pytest.raises(StageError, match=words) as caught:
        dequantize(source, tmp_path / "plain")
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
