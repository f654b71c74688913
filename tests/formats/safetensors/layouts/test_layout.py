"""Layouts of quantized layers: read back to the bit, or refused by name."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantline.config.containers import CONTAINERS
from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.formats.safetensors.layouts import LAYOUTS
from quantline.formats.safetensors.layouts.layout import (
    LayerGrid,
    check_held,
    group_by_grid,
    layout_of,
    load_layout,
    only_grid,
    shared_group_size,
)
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import GroupedLinear, Scheme
from tests.helpers.layouts import random_integers
from tests.helpers.quantized import differing, rounded
from tests.helpers.variants import write_variant

CONTAINER = load_container("safetensors")


@pytest.mark.parametrize(
    ("layout", "bits", "group_size", "symmetric"),
    [
        ("gptq", 4, 32, False),
        ("gptq", 4, 128, True),
        ("gptq", 3, 32, False),
        ("gptq", 2, 64, True),
        ("gptq", 8, -1, True),
        ("awq", 4, 32, False),
        ("awq", 4, 128, True),
        ("awq", 4, -1, False),
    ],
)
def test_dequantize_gives_every_layer_to_the_bit(
    tmp_path, tiny_model, layout, bits, group_size, symmetric
):
    source = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", source, bits, group_size, symmetric)
    requested = write_variant("safetensors", tmp_path / "out", source, quantized, layout=layout)
    stored = CONTAINER.read_back(tmp_path / "out", source)
    assert requested == {name: tensor.type for name, tensor in stored.items()}
    assert f"int{bits}" in requested.values()
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == layout
    assert (config["bits"], config["group_size"]) == (bits, group_size)
    if layout == "gptq":
        assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_dequantize_sees_a_changed_bit(tmp_path, tiny_model, layout):
    source = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", source)
    write_variant("safetensors", tmp_path / "out", source, quantized, layout=layout)
    path = tmp_path / "out/model.safetensors"
    module = "model.layers.1.mlp.down_proj"
    tensors = load_file(path)
    for part in ("qweight", "qzeros", "scales"):
        changed = tensors[f"{module}.{part}"].copy()
        changed.reshape(-1).view(np.uint8)[9] ^= 16
        save_file(tensors | {f"{module}.{part}": changed}, path)
        assert differing(CONTAINER, tmp_path / "out", source, quantized) == [f"{module}.weight"]


def linear(rows: int, columns: int, bits: int, scale: float = 0.5) -> GroupedLinear:
    """Return a layer in groups of whole rows."""
    integers = random_integers(0, rows, columns, bits)
    scales = np.full((rows, 1), scale, np.float32)
    zeros = np.ones((rows, 1), np.uint8)
    return GroupedLinear(integers, scales, zeros, bits, columns, False)


@pytest.mark.parametrize(
    ("layout", "layer", "failure", "words"),
    [
        (
            "awq",
            linear(8, 32, 3),
            Failure.UNSUPPORTED_WIDTH,
            "expected 4 bits for the AWQ layout, found 3",
        ),
        ("awq", linear(12, 32, 4), Failure.UNSUPPORTED_WIDTH, "a side of 12"),
        ("gptq", linear(32, 40, 3), Failure.UNSUPPORTED_WIDTH, "a side of 40"),
        (
            "gptq",
            linear(32, 32, 4, 2.0**-30),
            Failure.READBACK_MISMATCH,
            "scales of x that float16 holds",
        ),
    ],
)
def test_tensors_refuses_what_a_layout_cannot_hold_and_names_another(layout, layer, failure, words):
    with pytest.raises(StageError, match=words) as caught:
        load_layout(layout).tensors("x", layer, np.float16)
    assert caught.value.failure == failure
    assert "layout: compressed-tensors" in str(caught.value)


def test_check_held_refuses_weights_that_float16_does_not_hold():
    """The scales alone fit; transformers would make infinity of the product."""
    layer = GroupedLinear(
        np.full((2, 32), 15, np.uint8),
        np.full((2, 1), 8192.0),
        np.zeros((2, 1), np.uint8),
        4,
        32,
        False,
    )
    check_held("x", layer, ml_dtypes.bfloat16)
    check_held("x", dataclasses.replace(layer, scales=layer.scales / 2), np.float16)
    with pytest.raises(StageError, match="weights of x that float16 holds") as caught:
        check_held("x", layer, np.float16)
    assert caught.value.failure == Failure.NON_FINITE


def test_load_layout_knows_every_layout_of_the_container():
    assert CONTAINERS["safetensors"].layouts == tuple(LAYOUTS)
    for name, info in LAYOUTS.items():
        assert load_layout(name).part_names("x")
        if info.activations:
            assert load_layout(name, activations=True).part_names("x")


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"quant_method": "gptq"}, LAYOUTS["gptq"].implementation),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            LAYOUTS["compressed-tensors"].implementation,
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized"},
            LAYOUTS["compressed-tensors"].activations,
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            LAYOUTS["compressed-tensors"].activations,
        ),
    ],
)
def test_layout_of_finds_the_layout_that_a_configuration_describes(config, reference):
    layout = layout_of(config)
    assert f"{type(layout).__module__}:{type(layout).__name__}" == reference


def test_group_by_grid_takes_rows_of_unlike_length_for_one_grid():
    short = Scheme("int8", True, 32, per_row=True)
    long = Scheme("int8", True, 64, per_row=True)
    assert group_by_grid({short: ["b"], long: ["a"]}) == {LayerGrid("int8", True, None): ["a", "b"]}
    grouped = Scheme("int8", True, 32, per_row=False)
    assert len(group_by_grid({grouped: ["b"], long: ["a"]})) == 2


def test_group_by_grid_stores_a_row_as_a_row_beside_groups():
    row = Scheme("int4", False, 80, per_row=True)
    one_group = Scheme("int4", False, 64, per_row=True)
    groups = Scheme("int4", False, 64, per_row=False)
    assert group_by_grid({row: ["c"], one_group: ["b"], groups: ["a"]}) == {
        LayerGrid("int4", False, None): ["c"],
        LayerGrid("int4", False, 64): ["a", "b"],
    }


def test_shared_group_size_is_one_that_servers_know():
    def scheme(size: int, per_row: bool = False) -> Scheme:
        return Scheme("int4", False, size, per_row)

    assert shared_group_size([scheme(128), scheme(64)]) == 64
    assert shared_group_size([scheme(128), scheme(192, True)]) == 64
    assert shared_group_size([scheme(128), scheme(128, True)]) is None
    assert shared_group_size([scheme(80, True), scheme(192, True)]) is None
    assert shared_group_size([scheme(128), scheme(80, True)]) is None


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_layers_of_unlike_groups_share_the_smallest(tmp_path, make_model, layout):
    """A group of 128 is two of 64 with one scale, so these layouts hold it exactly."""
    source = Checkpoint(make_model(tmp_path / "model", intermediate_size=192))
    quantized = rounded(tmp_path / "q", source, 4, "auto")
    assert {quantized.linear(name).group_size for name in quantized.linears} == {64, 128}
    write_variant("safetensors", tmp_path / "out", source, quantized, layout=layout)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64


def test_only_grid_refuses_several():
    four = Scheme("int4", False, 32, per_row=False)
    eight = Scheme("int8", False, 32, per_row=False)
    words = "one width and group size for all layers, found int4 asymmetric in groups of 32, int8"
    with pytest.raises(StageError, match=words) as caught:
        only_grid({four: ["a"], eight: ["b"]})
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH
