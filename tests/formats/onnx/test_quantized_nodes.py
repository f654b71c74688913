"""Quantized layers as ONNX nodes, against numpy."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantline.errors import Failure, StageError
from quantline.formats.onnx.quantized_nodes import (
    QuantizedNodes,
    can_gather,
    dequantize,
    gather_block_quantized,
    integer_attributes,
    matmul_nbits,
    pack,
    unpack,
)
from quantline.formats.onnx.sixteen_bits import read_as_float32
from quantline.quantized.tensors import GroupedLinear


def run(
    made: QuantizedNodes, name: str, given: np.ndarray, elements: int = TensorProto.FLOAT
) -> np.ndarray:
    """Return what onnxruntime computes for some nodes on an input of this name."""
    graph = helper.make_graph(
        made.nodes,
        "one layer",
        [helper.make_tensor_value_info(name, elements, given.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in made.tensors.items()],
    )
    read_as_float32(graph)
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: given})[0]


def run_layer(linear: GroupedLinear, x: np.ndarray) -> np.ndarray:
    """Return what onnxruntime computes for one layer on x [n, in]."""
    return run(matmul_nbits("layer", linear, "x", "y"), "x", x)


def parts_of(made: QuantizedNodes) -> dict[str, np.ndarray]:
    """Return the tensors of a layer by their parts' names."""
    return {name.partition(".")[2]: tensor for name, tensor in made.tensors.items()}


def tolerance(bits: int, expected: np.ndarray) -> float:
    """Return how far off a product may be: with eight bits its inputs are rounded too."""
    return 0.01 * float(np.abs(expected).max()) if bits == 8 else 1e-4


def random_layer(bits: int, group_size: int, symmetric: bool, columns: int = 96) -> GroupedLinear:
    """Return a layer of 24 outputs."""
    generator = np.random.default_rng(bits)
    rows = 24
    groups = (rows, columns // group_size)
    middle = np.full(groups, 1 << (bits - 1))
    integers = generator.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    scales = generator.uniform(0.01, 0.1, groups).astype(ml_dtypes.bfloat16).astype(np.float32)
    zeros = middle if symmetric else generator.integers(0, 1 << bits, groups)
    return GroupedLinear(integers, scales, zeros.astype(np.uint8), bits, group_size, symmetric)


def random_inputs(columns: int = 96) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (4, 96), (8, 32), (8, 96)]
)
def test_matmul_nbits_computes_what_numpy_does(bits, group_size):
    linear = random_layer(bits, group_size, False)
    x = random_inputs()
    expected = x @ linear.dequantize().T
    assert np.abs(run_layer(linear, x) - expected).max() <= tolerance(bits, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [33, 80, 100])
def test_matmul_nbits_takes_whole_rows_of_any_length(bits, columns):
    linear = random_layer(bits, columns, False, columns)
    x = random_inputs(columns)
    expected = x @ linear.dequantize().T
    assert np.abs(run_layer(linear, x) - expected).max() <= tolerance(bits, expected)
    made = matmul_nbits("layer", linear, "x", "y")
    found = dequantize(made.nodes[0], parts_of(made), columns)
    assert np.array_equal(found, linear.dequantize())


def test_matmul_nbits_rounds_the_inputs_of_eight_bits_in_small_blocks():
    """An outlier among the inputs of a whole row coarsens its own block alone."""
    linear = random_layer(8, 128, True, 128)
    linear.integers[:, :64] = 128  # zero: what these inputs are rounded to changes nothing
    x = random_inputs(128)
    expected = x @ linear.dequantize().T
    x[:, 0] = 1000
    assert np.abs(run_layer(linear, x) - expected).max() <= tolerance(8, expected)
    node = matmul_nbits("layer", linear, "x", "y").nodes[0]
    assert integer_attributes(node)["accuracy_level"] == 4


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (8, 16)])
def test_gather_block_quantized_reads_the_rows_of_what_matmul_nbits_reads(bits, group_size):
    linear = random_layer(bits, group_size, symmetric=True)
    made = gather_block_quantized("layer", linear, "ids", "y")
    ids = np.array([[3, 0, 23], [1, 1, 7]])
    found = run(made, "ids", ids, TensorProto.INT64)
    assert np.array_equal(found, linear.dequantize()[ids])
    read = matmul_nbits("layer", linear, "x", "y").tensors
    assert {name: made.tensors[name].shape for name in read} == {
        name: tensor.shape for name, tensor in read.items()
    }
    gather = next(node for node in made.nodes if node.name == "layer")
    assert np.array_equal(dequantize(gather, parts_of(made), 96), linear.dequantize())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(3, 32, True), (2, 32, True), (8, 96, True), (4, 32, False)],
)
def test_can_gather_not_what_the_operator_has_no_form_for(bits, group_size, symmetric):
    assert not can_gather(random_layer(bits, group_size, symmetric))


def test_scales_that_bfloat16_does_not_hold_stay_in_float32():
    linear = random_layer(4, 32, True)
    coarse = matmul_nbits("layer", linear, "x", "y").tensors["layer.weight_scale"]
    finer = replace(linear, scales=linear.scales * np.float32(1.001))
    fine = matmul_nbits("layer", finer, "x", "y").tensors["layer.weight_scale"]
    assert (coarse.dtype, fine.dtype) == (ml_dtypes.bfloat16, np.float32)


def test_matmul_nbits_refuses_groups_that_no_block_divides():
    words = "smallest block of 16 divides, found groups of 24 weights in layer; use group_size 32"
    with pytest.raises(StageError, match=words) as caught:
        matmul_nbits("layer", random_layer(4, 24, False), "x", "y")
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_pack_is_undone_by_unpack(bits, count):
    values = np.random.default_rng(count).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits, count), values)
