"""Graphs inside of a graph: the bodies of its loops."""

from collections.abc import Iterator

import onnx


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph, and the bodies of its loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the bodies of its loops."""
    for one in graphs_of(graph):
        yield from one.node


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the names that nodes read."""
    read: set[str] = set()
    for node in nodes_of(graph):
        read.update(node.input)
    return read
