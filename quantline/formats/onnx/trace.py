"""Tracing a model with its states to an ONNX graph without weights.

Inputs: input_ids, and attention_mask and position_ids where the model takes them; then the states:
past_key_values.N.key and .value of attention, past_states.N.conv, .recurrent and so on of others.
Outputs: logits, and each state as it is afterwards: present.N.key, present_states.N.conv.

The graph names the weights as the model does. Whoever writes the file puts in what it reads from
the checkpoint. So the exporter cannot merge two weights that happen to be equal, or fold a
transposed copy of one, and lose a name by it.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from quantline.formats.onnx.complex_pairs import in_place_of_complex
from quantline.formats.onnx.recurrences import in_place_of_loops
from quantline.formats.onnx.states import Carried
from quantline.formats.onnx.symbolics import OPSET, registered
from quantline.formats.onnx.weights import zeros

DOMAIN = "com.microsoft"
WRAPPER = "model."  # what _Flat puts before the model's own tensor names
# Sizes of the example inputs, all unlike 1, which a trace would take for a constant.
TEXTS = 2
PAST = 4
TOKENS = 3


class _Flat(nn.Module):
    """The model with its states as flat inputs and outputs."""

    def __init__(self, carried: Carried) -> None:
        super().__init__()
        self.model = carried.model
        self.carried = carried

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(self.carried.inputs)
        inputs = dict(zip(self.carried.inputs, tensors[:count], strict=True))
        return self.carried.call(inputs, tensors[count:])


def trace(carried: Carried, tokens: int = TOKENS) -> onnx.ModelProto:
    """Return the graph that torch's tracing exporter makes of one step over so many tokens."""
    with registered(), in_place_of_complex(), in_place_of_loops(carried.model) as replaced:
        graph = _exported(
            carried,
            tokens,
            dynamic_axes=_axes(carried),
            dynamo=False,
            do_constant_folding=False,
            export_params=False,
            # torch warns of a domain that no node is of.
            custom_opsets={DOMAIN: 1} if replaced else None,
        )
    _name_weights(graph.graph, carried)
    _complete(graph.graph, carried)
    return graph


def export_dynamo(carried: Carried) -> onnx.ModelProto:
    """Return the graph that torch's newer exporter makes; it takes minutes for large models."""
    named = _axes(carried)
    inputs = [*carried.inputs, *(state.past for state in carried.states)]
    varying = [dict.fromkeys(named[name], torch.export.Dim.DYNAMIC) for name in inputs]
    with in_place_of_complex():
        graph = _exported(
            carried,
            TOKENS,
            dynamic_shapes={"tensors": tuple(varying)},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    _name_weights(graph.graph, carried)
    # The exporter gives the axes names of its own.
    for value in (*graph.graph.input, *graph.graph.output):
        for axis, name in named[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    _complete(graph.graph, carried)
    return graph


def _exported(carried: Carried, tokens: int, **options: Any) -> onnx.ModelProto:
    """Call torch.onnx.export, and read what it wrote."""
    states = carried.states
    example = carried.example(TEXTS, PAST, tokens)
    before = [torch.rand(state.zeros(TEXTS, PAST).shape) for state in states]
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        warnings.catch_warnings(),
        zeros(carried.model),
        _silence(),
    ):
        path = Path(folder) / "graph.onnx"
        warnings.simplefilter("ignore")  # the tracer warns of every Python branch on a shape
        program = torch.onnx.export(
            _Flat(carried).eval(),
            (*(example[name] for name in carried.inputs), *before),
            None if options["dynamo"] else str(path),
            input_names=[*carried.inputs, *(state.past for state in states)],
            output_names=["logits", *(state.present for state in states)],
            opset_version=OPSET,
            **options,
        )
        if program is not None:
            initializers = program.model.graph.initializers
            for name in carried.weights():
                initializers.pop(WRAPPER + name, None)
            program.save(path)
        return onnx.load(path)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter from printing its whole graph where it fails."""
    torch._C._jit_set_onnx_log_enabled(False)
    try:
        yield
    finally:
        torch._C._jit_set_onnx_log_enabled(True)


def _axes(carried: Carried) -> dict[str, dict[int, str]]:
    """Return the axes of inputs and outputs that vary, with their names."""
    found = {state.past: state.axes("past") for state in carried.states}
    found |= {state.present: state.axes("total") for state in carried.states}
    for name in ("input_ids", "position_ids", "logits"):
        found[name] = {0: "batch", 1: "sequence"}
    found["attention_mask"] = {0: "batch", 1: "total"}
    return found


def _complete(graph: onnx.GraphProto, carried: Carried) -> None:
    """Give outputs the sizes that the exporter did not infer through operators it does not know."""
    shapes: dict[str, tuple[int | str, ...]] = {"logits": ("batch", "sequence", carried.vocabulary)}
    shapes |= {state.present: state.shape for state in carried.states}
    for value in graph.output:
        dims = value.type.tensor_type.shape.dim
        for axis, size in enumerate(shapes[value.name]):
            if axis == len(dims):
                dims.add()
            if isinstance(size, int) and not dims[axis].dim_value:
                dims[axis].dim_value = size


def _name_weights(graph: onnx.GraphProto, carried: Carried) -> None:
    """Call the weights by the model's own names, and leave them out of the inputs.

    What the exporter made of equal ones is taken away.
    """
    traced = {WRAPPER + name: name for name in carried.weights()}
    nodes = []
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in traced:
            continue
        for position, name in enumerate(node.input):
            node.input[position] = traced.get(name, name)
        nodes.append(node)
    inputs = [value for value in graph.input if value.name not in traced]
    kept = [tensor for tensor in graph.initializer if tensor.name not in traced]
    del graph.node[:]
    del graph.input[:]
    del graph.initializer[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.initializer.extend(kept)
