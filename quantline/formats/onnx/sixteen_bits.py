"""Tensors that a file holds in 16 bits, and that a graph computes with in float32.

onnxruntime casts them once, when it loads the graph. Of a table of which rows are read, the rows
are cast.
"""

import onnx
from onnx import TensorProto, helper

from quantline.formats.onnx.subgraphs import graphs_of, names_read

TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
AS_FLOAT32 = ".float32"  # what the name of a tensor ends with after its cast
ROWS = ".rows"


def takes_rows(node: onnx.NodeProto) -> bool:
    """Whether a node reads rows of its first input."""
    return node.op_type == "Gather" and all(attribute.i == 0 for attribute in node.attribute)


def read_as_float32(graph: onnx.GraphProto) -> None:
    """Have the nodes of a graph read its initializers of 16 bits as float32."""
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type in TYPES}
    for one in graphs_of(graph):
        nodes = []
        for node in one.node:
            nodes.append(node)
            if takes_rows(node) and node.input[0] in halves:
                rows = node.output[0]
                node.output[0] = f"{rows}{ROWS}"
                nodes.append(_cast(node.output[0], rows))
                continue
            for position, name in enumerate(node.input):
                if name in halves:
                    node.input[position] = f"{name}{AS_FLOAT32}"
        del one.node[:]
        one.node.extend(nodes)
    read = names_read(graph)
    casts = [_cast(name, f"{name}{AS_FLOAT32}") for name in sorted(halves)]
    kept = [*(cast for cast in casts if cast.output[0] in read), *graph.node]
    del graph.node[:]
    graph.node.extend(kept)


def _cast(name: str, result: str) -> onnx.NodeProto:
    """Return the node that casts a tensor to float32."""
    return helper.make_node("Cast", [name], [result], name=f"{result}.cast", to=TensorProto.FLOAT)
