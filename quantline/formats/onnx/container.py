"""ONNX with a KV cache: float32, or with the canonical integers in the place of the decoder's linear layers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantline.quantized.store import Quantized
from quantline.model.checkpoint import Checkpoint
from quantline.ingest.fetch import SIDE_FILES
from quantline.config.params import Variant
from quantline.formats.container import StoredTensor
from quantline.formats.onnx import genai_config as onnx_genai
from quantline.formats.onnx.quantized_nodes import INTEGERS, PARTS, attributes, dequantize, nodes_of
from quantline.files import write_json

FILE, DATA = "model.onnx", "model.onnx.data"
LARGEST_INSIDE = 1536 << 20  # bytes of weights in model.onnx itself; protobuf ends at 2 GiB
ALIGNED = 4096  # onnxruntime maps a tensor of the data file that starts at a page
WEIGHT = ".weight"


def write(model: Checkpoint, quantized: Quantized, folder: Path, variant: Variant) -> dict[str, str]:
    """Write model.onnx, and model.onnx.data beside it for a large model; returns source tensor name → requested type.

    Raises StageError(unsupported_width).
    """
    from quantline.formats.onnx.graph import trace

    made = trace(model)
    rounded = {f"{name}{WEIGHT}": name for name in quantized.linears}
    largest = sum(int(np.prod(model.shape(name))) * (1 if name in rounded else 4) for name in model.names)
    with Weights(folder, in_file=largest <= LARGEST_INSIDE) as weights:
        for name in model.names:
            if name not in rounded:
                weights.add(name, values(model, quantized, name))
        if rounded:
            _put_integers(made, quantized, rounded, weights)
    made.graph.initializer.extend(weights.tensors)
    # onnx.save would look at every tensor again; the bytes are all in place.
    (folder / FILE).write_bytes(made.SerializeToString(deterministic=True))
    onnx.checker.check_model(folder / FILE)
    for name in SIDE_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if variant.runtime == "onnxruntime-genai":
        write_json(folder / onnx_genai.FILE, onnx_genai.config(model, FILE))
    return {name: f"int{quantized.linear(rounded[name]).bits}" if name in rounded else "F32" for name in model.names}


def values(model: Checkpoint, quantized: Quantized, name: str) -> np.ndarray:
    """A tensor that is not rounded, float32: the method's where it has one, else the source's."""
    return quantized.override(name) if name in quantized.overrides else model.tensor(name)


class Weights:
    """Collects initializers: their bytes inside the graph, or appended one by one to a data file beside it."""

    def __init__(self, folder: Path, in_file: bool) -> None:
        self.tensors: list[TensorProto] = []
        self.path = None if in_file else folder / DATA

    def __enter__(self) -> Self:
        self.data = self.path.open("wb") if self.path else None
        return self

    def __exit__(self, *_) -> None:
        if self.data:
            self.data.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        if self.data is None:
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            return
        self.data.write(bytes(-self.data.tell() % ALIGNED))
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                             data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        for key, value in {"location": DATA, "offset": self.data.tell(), "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(np.ascontiguousarray(array).tobytes())
        self.tensors.append(tensor)


def _put_integers(model: onnx.ModelProto, quantized: Quantized, rounded: dict[str, str], weights: Weights) -> None:
    """Replace the Transpose and the MatMul of every rounded layer by nodes that carry its integers."""
    graph = model.graph
    turned = {node.output[0]: rounded[node.input[0]] for node in graph.node
              if node.op_type == "Transpose" and node.input[0] in rounded}
    nodes = []
    for node in graph.node:
        if node.output[0] in turned:
            continue
        name = turned.get(node.input[1]) if node.op_type == "MatMul" else None
        if name is None:
            nodes.append(node)
            continue
        made, tensors = nodes_of(name, quantized.linear(name), node.input[0], node.output[0])
        nodes += made
        for key, array in tensors.items():
            weights.add(key, array)
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def read_back(folder: Path, model: Checkpoint) -> dict[str, StoredTensor]:
    """What the graph really computes with, under the source's names: a weight that no node reads is not there."""
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node if node.op_type in ("MatMulNBits", "MatMulInteger")}
    read = {name for node in graph.node for name in node.input}
    found = {}
    for name in model.names:
        module = name.removesuffix(WEIGHT)
        if name in tensors and name in read:
            tensor = tensors[name]
            kind = "F32" if tensor.data_type == TensorProto.FLOAT else TensorProto.DataType.Name(tensor.data_type)
            found[name] = StoredTensor(kind, tuple(tensor.dims), _bytes(tensor), _reader(folder, tensor))
        elif module in nodes:
            parts = {part: tensors[key] for part in PARTS if (key := f"{module}.{part}") in tensors and key in read}
            found[name] = _stored(folder, nodes[module], parts)
    return found


def _bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _reader(folder: Path, tensor: TensorProto) -> Callable[[], np.ndarray]:
    return lambda: numpy_helper.to_array(tensor, base_dir=str(folder))


def _stored(folder: Path, node: onnx.NodeProto, parts: dict[str, TensorProto]) -> StoredTensor:
    """A rounded layer, from its node and the tensors that belong to it."""
    if node.op_type == "MatMulNBits":
        facts = attributes(node)
        bits, shape = facts["bits"], (facts["N"], facts["K"])
    else:
        bits, shape = 8, tuple(reversed(parts[INTEGERS].dims))

    def read() -> np.ndarray:
        return dequantize(node, {part: _reader(folder, tensor)() for part, tensor in parts.items()})

    return StoredTensor(f"int{bits}", shape, sum(map(_bytes, parts.values())), read)


def expected(model: Checkpoint, quantized: Quantized, name: str, kind: str) -> np.ndarray:
    """The values, float32, that a tensor has to have."""
    module = name.removesuffix(WEIGHT)
    return quantized.linear(module).dequantize() if module in quantized.linears else values(model, quantized, name)
