"""model.onnx: the traced graph with the checkpoint's weights, or with integers in their place.

The weights of a large model lie in model.onnx.data beside it.
"""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantline.formats.bundle.unquantized import unquantized_values
from quantline.formats.container import StoredTensor
from quantline.formats.onnx.quantized_nodes import (
    DOMAIN,
    MATMUL,
    PACKED,
    PARTS,
    QUANTIZED_OPERATORS,
    QuantizedNodes,
    dequantize,
    gather_block_quantized,
    integer_attributes,
    matmul_nbits,
)
from quantline.formats.onnx.sixteen_bits import TYPES, read_as_float32, takes_rows
from quantline.formats.onnx.sizes import ALIGNMENT, fits_inside
from quantline.formats.onnx.subgraphs import graphs_of, names_read, nodes_of
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel
from quantline.quantized.tensors import GroupedLinear

FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
WEIGHT = ".weight"
FLOATS: dict[int, str] = {TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16"}
# Key of the graph's metadata for the tensors that belong to the model and that it never reads, such
# as keys of layers that take those of another layer.
UNREAD = "quantline.unread"


def write_model(
    graph: onnx.ModelProto,
    source: TensorSource,
    quantized: QuantizedModel,
    folder: Path,
    halves: Collection[str] = (),
) -> None:
    """Write the model's files.

    Args:
        graph: What `trace` returned for the source; it is completed.
        source: The unquantized model.
        quantized: The quantized weights.
        folder: Where to write.
        halves: Tensors that are stored in float16.

    Raises:
        StageError: unsupported_width.
    """
    layers = {f"{layer}{WEIGHT}": layer for layer in quantized.linears}
    with _Initializers(folder, fits_inside(source, layers)) as initializers:
        unread = sorted(set(source.names) - names_read(graph.graph))
        for name in source.names:
            if name not in layers:
                values = float_values(source, quantized, name)
                initializers.add(name, in_float16(values) if name in halves else values)
        if layers:
            _put_integers(graph, quantized, layers, initializers)
    if unread:
        helper.set_model_props(graph, {UNREAD: json.dumps(unread)})
    graph.graph.initializer.extend(initializers.tensors)
    read_as_float32(graph.graph)
    # onnx.save would look at every tensor again; the bytes are all in place.
    (folder / FILE).write_bytes(graph.SerializeToString(deterministic=True))
    onnx.checker.check_model(folder / FILE)


def float_values(source: TensorSource, quantized: QuantizedModel, name: str) -> np.ndarray:
    """Return a tensor that is not quantized, in float32; whole numbers as they are stored."""
    values = unquantized_values(source, quantized, name, None)
    return values if values.dtype.kind in "iub" else values.astype(np.float32, copy=False)


def in_float16(values: np.ndarray) -> np.ndarray:
    """Return values in float16, or as they are if one of them does not fit it."""
    largest = np.finfo(np.float16).max
    return values.astype(np.float16) if (np.abs(values) <= largest).all() else values


class _Initializers:
    """Collects weights, their bytes inside the graph or appended one by one to the data file."""

    def __init__(self, folder: Path, inside: bool) -> None:
        self.tensors: list[TensorProto] = []
        self.path = None if inside else folder / DATA_FILE
        self.data: BinaryIO | None = None

    def __enter__(self) -> Self:
        if self.path is not None:
            self.data = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        if self.data is not None:
            self.data.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        # numpy would make a vector of a scalar.
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        if self.data is None:
            self.tensors.append(numpy_helper.from_array(contiguous, name))
            return
        self.data.write(bytes(-self.data.tell() % ALIGNMENT))
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        )
        location = {"location": DATA_FILE, "offset": self.data.tell(), "length": array.nbytes}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(contiguous.tobytes())
        self.tensors.append(tensor)


def _put_integers(
    model: onnx.ModelProto,
    quantized: QuantizedModel,
    layers: dict[str, str],
    initializers: _Initializers,
) -> None:
    """Replace the products of every quantized layer by nodes that carry its integers.

    So are the rows that are read of a quantized embedding. A model may use a weight in another way
    than a linear layer or an embedding does. It then has the values that the integers stand for.

    Args:
        model: The graph, in which a layer is a Transpose of its weight and a MatMul, or a Gemm.
        quantized: The quantized weights.
        layers: Weight → layer.
        initializers: Given the tensors that the new nodes read.
    """
    transposed = {}
    for node in nodes_of(model.graph):
        if node.op_type == "Transpose" and node.input[0] in layers:
            transposed[node.output[0]] = layers[node.input[0]]
    calls: dict[str, int] = {}
    tensors: dict[str, set[str]] = {}
    for graph in graphs_of(model.graph):
        nodes = []
        for node in graph.node:
            layer = _embedding_of(node, layers) or _layer_of(node, layers, transposed)
            if layer is None:
                nodes.append(node)
                continue
            calls[layer] = calls.get(layer, 0) + 1
            replacement = _replacement(node, layer, quantized, calls[layer])
            nodes += replacement.nodes
            put = tensors.setdefault(layer, set())
            for name, array in replacement.tensors.items():
                if name not in put:
                    initializers.add(name, array)
                    put.add(name)
        del graph.node[:]
        graph.node.extend(nodes)
    _drop_unread(model.graph, set(transposed))
    uncalled = {weight for weight, layer in layers.items() if layer not in calls}
    for weight in sorted(uncalled | (set(layers) & names_read(model.graph))):
        initializers.add(weight, quantized.linear(layers[weight]).dequantize())
    if all(known.domain != DOMAIN for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _embedding_of(node: onnx.NodeProto, layers: dict[str, str]) -> str | None:
    """Return the quantized layer of which a node reads rows."""
    return layers.get(node.input[0]) if takes_rows(node) else None


def _layer_of(
    node: onnx.NodeProto, layers: dict[str, str], transposed: dict[str, str]
) -> str | None:
    """Return the quantized layer whose product a node is."""
    if node.op_type == "MatMul":
        return transposed.get(node.input[1])
    if node.op_type == "Gemm":
        plain = {"transB": 0, "transA": 0, "alpha": 1.0, "beta": 1.0}
        for attribute in node.attribute:
            plain[attribute.name] = helper.get_attribute_value(attribute)
        if (plain["transA"], plain["alpha"], plain["beta"]) != (0, 1.0, 1.0):
            return None
        return (layers if plain["transB"] else transposed).get(node.input[1])
    return None


def _replacement(
    node: onnx.NodeProto, layer: str, quantized: QuantizedModel, number: int
) -> QuantizedNodes:
    """Return the nodes in place of a product or of rows that are read, the n-th of this layer."""
    linear = quantized.linear(layer)
    assert isinstance(linear, GroupedLinear), "what ContainerInfo.carries allows"
    call = layer if number == 1 else f"{layer}.{number}"
    x = node.input[0]
    y = node.output[0]
    if takes_rows(node):
        return gather_block_quantized(layer, linear, node.input[1], y, call)
    if len(node.input) < 3:  # of a Gemm the third is a bias
        return matmul_nbits(layer, linear, x, y, call)
    product = f"{call}.product"
    replacement = matmul_nbits(layer, linear, x, product, call)
    bias = helper.make_node("Add", [product, node.input[2]], [y], name=f"{call}.bias")
    return QuantizedNodes([*replacement.nodes, bias], replacement.tensors)


def _drop_unread(graph: onnx.GraphProto, outputs: set[str]) -> None:
    """Take away the nodes of some outputs that no other node reads any more."""
    unread = outputs - names_read(graph)
    for one in graphs_of(graph):
        kept = [node for node in one.node if node.output[0] not in unread]
        del one.node[:]
        one.node.extend(kept)


def read_model(folder: Path, source: TensorSource) -> dict[str, StoredTensor]:
    """Return what the graph really computes with, under the source's names.

    A weight that no node reads is left out, if the model itself reads it.
    """
    model = onnx.load(folder / FILE, load_external_data=False)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in nodes_of(graph) if node.op_type in QUANTIZED_OPERATORS}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    read_by_nodes = names_read(graph) | set(json.loads(properties.get(UNREAD, "[]")))
    stored = {}
    for name in source.names:
        layer = name.removesuffix(WEIGHT)
        if name in tensors and name in read_by_nodes:
            stored[name] = _stored_floats(folder, tensors[name])
        elif layer in nodes:
            parts = {}
            for part in PARTS:
                key = f"{layer}.{part}"
                if key in tensors and key in read_by_nodes:
                    parts[part] = tensors[key]
            stored[name] = _stored_integers(folder, nodes[layer], parts)
    return stored


def _stored_floats(folder: Path, tensor: TensorProto) -> StoredTensor:
    """Describe a weight that is not quantized."""
    kind = FLOATS.get(tensor.data_type) or TensorProto.DataType.Name(tensor.data_type)
    return StoredTensor(kind, tuple(tensor.dims), _size(tensor), partial(_read, folder, tensor))


def _stored_integers(
    folder: Path, node: onnx.NodeProto, parts: dict[str, TensorProto]
) -> StoredTensor:
    """Describe a quantized layer by its node and the tensors that belong to it."""
    attributes = integer_attributes(node)
    bits = attributes["bits"]
    rows, blocks, _ = parts[PACKED].dims
    shape = (rows, blocks * attributes["block_size"])
    if node.op_type == MATMUL:
        shape = (attributes["N"], attributes["K"])
    size = sum(_size(tensor) for tensor in parts.values())
    return StoredTensor(f"int{bits}", shape, size, partial(_dequantize, folder, node, parts, shape))


def _dequantize(
    folder: Path, node: onnx.NodeProto, parts: dict[str, TensorProto], shape: tuple[int, ...]
) -> np.ndarray:
    """Read a quantized layer [out, in]."""
    arrays = {part: _read(folder, tensor) for part, tensor in parts.items()}
    return dequantize(node, arrays, shape[-1])


def _read(folder: Path, tensor: TensorProto) -> np.ndarray:
    """Read a tensor, from the data file if it lies there; one of 16 bits in float32."""
    values = numpy_helper.to_array(tensor, base_dir=str(folder))
    return values.astype(np.float32) if tensor.data_type in TYPES else values


def _size(tensor: TensorProto) -> int:
    """Return the bytes of a tensor."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(np.prod(tensor.dims)) * dtype.itemsize
