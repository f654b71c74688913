"""Integers in the place of a graph's products, whatever form the exporter gave them."""

from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantline.formats.onnx.model_file import _Initializers, _put_integers
from quantline.formats.onnx.sixteen_bits import read_as_float32
from quantline.formats.onnx.subgraphs import nodes_of
from quantline.quantized.tensors import GroupedLinear
from tests.formats.onnx.test_quantized_nodes import random_inputs, random_layer

BIAS = np.linspace(-1, 1, 24, dtype=np.float32)
TRANSPOSE = helper.make_node("Transpose", ["layer.weight"], ["t"], perm=[1, 0])


class Quantized(NamedTuple):
    """A store with one layer."""

    layer: GroupedLinear

    def linear(self, name: str) -> GroupedLinear:
        assert name == "layer"
        return self.layer


def in_a_loop() -> list[onnx.NodeProto]:
    """Return a layer that is called once in the body of a loop."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "t"], ["inner"]),
            helper.make_node("Identity", ["go_on"], ["goes_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("inner", TensorProto.FLOAT, [None, 24]),
        ],
    )
    return [
        helper.make_node("Constant", [], ["once"], value_int=1),
        TRANSPOSE,
        helper.make_node("Loop", ["once", ""], ["many"], body=body),
        helper.make_node("Constant", [], ["axis"], value_ints=[0]),
        helper.make_node("Squeeze", ["many", "axis"], ["y"]),
    ]


FORMS = {
    "a product with the transposed weight": (
        [TRANSPOSE, helper.make_node("MatMul", ["x", "t"], ["y"])],
        lambda x, w: x @ w.T,
    ),
    "with a bias": (
        [helper.make_node("Gemm", ["x", "layer.weight", "bias"], ["y"], transB=1)],
        lambda x, w: x @ w.T + BIAS,
    ),
    "called twice": (
        [
            TRANSPOSE,
            helper.make_node("MatMul", ["x", "t"], ["once"]),
            helper.make_node("Gemm", ["x", "t", "bias"], ["again"]),
            helper.make_node("Mul", ["once", "again"], ["y"]),
        ],
        lambda x, w: (x @ w.T) * (x @ w.T + BIAS),
    ),
    "in a loop": (in_a_loop(), lambda x, w: x @ w.T),
}


def put(nodes: list[onnx.NodeProto], layer: GroupedLinear) -> onnx.ModelProto:
    """Return a model of copies of these nodes with the layer's integers."""
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
        [numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    initializers = _Initializers(None, inside=True)
    _put_integers(model, Quantized(layer), {"layer.weight": "layer"}, initializers)
    model.graph.initializer.extend(initializers.tensors)
    read_as_float32(model.graph)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_put_integers_finds_a_layer_in_every_form(form, bits):
    nodes, expected = FORMS[form]
    layer = random_layer(bits, 96 if bits == 8 else 32, symmetric=bits == 8)
    model = put(nodes, layer)
    kinds = [node.op_type for node in nodes_of(model.graph)]
    assert kinds.count("MatMulNBits") == (2 if form == "called twice" else 1)
    assert "Transpose" not in kinds
    x = random_inputs()
    wanted = expected(x, layer.dequantize())
    tolerance = 1e-4 if bits == 4 else 0.02 * np.abs(wanted).max()
    assert np.abs(run(model, x) - wanted).max() < tolerance


def test_put_integers_gives_a_weight_that_is_used_otherwise_its_values():
    """As Mamba does, whose time steps are the weight times the inputs."""
    turned = helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0])
    product = helper.make_node("MatMul", ["layer.weight", "turned"], ["y"])
    layer = random_layer(4, 32, symmetric=False)
    model = put([turned, product], layer)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert np.array_equal(values["layer.weight"], layer.dequantize())
    x = random_inputs()
    assert np.allclose(run(model, x), layer.dequantize() @ x.T, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False], ids=["in the graph", "in a file beside it"])
def test_a_scalar_stays_one(inside, tmp_path):
    """Activation functions have some (Apertus)."""
    with _Initializers(tmp_path, inside) as initializers:
        initializers.add("beta", np.array(0.5, np.float32))
    (tensor,) = initializers.tensors
    assert list(tensor.dims) == []
    assert numpy_helper.to_array(tensor, base_dir=str(tmp_path)) == np.float32(0.5)
