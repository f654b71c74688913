"""Quantized layers as ONNX nodes, against numpy."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantline.errors import Failure, StageError
from quantline.formats.onnx.quantized_nodes import dequantize, pack, quantized_nodes, unpack
from quantline.quantized.tensors import GroupedLinear


def run_layer(linear: GroupedLinear, x: np.ndarray) -> np.ndarray:
    """Return what onnxruntime computes for one layer on x [n, in]."""
    made = quantized_nodes("layer", linear, "x", "y")
    rows = len(linear.integers)
    graph = helper.make_graph(
        made.nodes,
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), rows])],
        [numpy_helper.from_array(array, name) for name, array in made.tensors.items()],
    )
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def random_layer(bits: int, group_size: int, symmetric: bool, columns: int = 96) -> GroupedLinear:
    """Return a layer of 24 outputs."""
    generator = np.random.default_rng(bits)
    rows = 24
    groups = (rows, columns // group_size)
    middle = np.full(groups, 1 << (bits - 1))
    integers = generator.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    scales = generator.uniform(0.01, 0.1, groups).astype(np.float32)
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
    assert np.allclose(run_layer(linear, x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [33, 80, 100])
def test_matmul_nbits_takes_whole_rows_of_any_length(bits, columns):
    linear = random_layer(bits, columns, False, columns)
    x = random_inputs(columns)
    expected = x @ linear.dequantize().T
    assert np.allclose(run_layer(linear, x), expected, atol=1e-4, rtol=1e-5)
    made = quantized_nodes("layer", linear, "x", "y")
    parts = {name.partition(".")[2]: tensor for name, tensor in made.tensors.items()}
    assert np.array_equal(dequantize(made.nodes[0], parts), linear.dequantize())


def test_dynamic_int8_computes_what_numpy_does():
    """DynamicQuantizeLinear by ONNX's definition: uint8, one scale and zero for the tensor."""
    linear = random_layer(8, 96, True)
    x = random_inputs()
    scale = (max(x.max(), 0) - min(x.min(), 0)) / np.float32(255)
    zero = np.clip(np.rint(-min(x.min(), 0) / scale), 0, 255)
    steps = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    sums = steps.astype(np.int64) @ (linear.integers.astype(np.int64) - 128).T
    expected = sums * scale * linear.scales[:, 0]
    assert np.allclose(run_layer(linear, x), expected, rtol=1e-5, atol=1e-5)


def test_matmul_nbits_refuses_groups_that_no_block_divides():
    words = "smallest block of 16 divides, found groups of 24 weights in layer; use group_size 32"
    with pytest.raises(StageError, match=words) as caught:
        quantized_nodes("layer", random_layer(4, 24, False), "x", "y")
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_pack_is_undone_by_unpack(bits, count):
    values = np.random.default_rng(count).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits, count), values)
