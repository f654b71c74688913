"""A graph that takes a text token by token, for models whose computation follows its length.

A trace writes a Python loop over the tokens as often as its example had some. The step of one token
has no such loop. It becomes the body of an ONNX Loop, and the states go from one turn to the next.
The result is the same, but long prompts take as long as if they were generated.
"""

import onnx
from onnx import TensorProto, helper

from quantline.formats.onnx.states import Carried, State
from quantline.formats.onnx.trace import trace

STEP = "step."  # what names inside the body begin with, where the graph has them too


def trace_in_loop(carried: Carried) -> onnx.ModelProto:
    """Return the graph with the inputs and outputs of `trace`."""
    model = trace(carried, tokens=1)
    step = model.graph
    states = carried.states
    own = list(step.input)
    outputs = list(step.output)
    # The exporter leaves out what a model takes and does not read.
    inputs = [value.name for value in own if value.name in carried.inputs]
    outer = _sequence_nodes(inputs) + _hoisted(step, set(carried.weights()))
    body = _body(step, carried.states, inputs, own, outputs)
    loop = helper.make_node(
        "Loop",
        ["loop.tokens", "", *(state.past for state in states)],
        [*(state.present for state in states), "loop.logits"],
        name="loop",
        body=body,
    )
    last = [
        helper.make_node("Constant", [], ["loop.two"], value_ints=[2]),
        helper.make_node("Squeeze", ["loop.logits", "loop.two"], ["loop.by_token"]),
        helper.make_node("Transpose", ["loop.by_token"], ["logits"], perm=[1, 0, 2]),
    ]
    graph = helper.make_graph(
        [*outer, loop, *last],
        "token_loop",
        [_of_sequence(value) for value in own],
        [_of_sequence(value) for value in outputs],
        list(step.initializer),
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _of_sequence(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Describe an input or output of the step as one of the graph: with all tokens."""
    described = onnx.ValueInfoProto()
    described.CopyFrom(value)
    if value.name in ("input_ids", "position_ids", "logits"):
        described.type.tensor_type.shape.dim[1].dim_param = "sequence"
    return described


def _sequence_nodes(inputs: list[str]) -> list[onnx.NodeProto]:
    """Count the tokens, and those before them."""
    nodes = [
        helper.make_node("Constant", [], ["loop.one"], value_int=1),
        helper.make_node("Constant", [], ["loop.axis"], value_ints=[1]),
        helper.make_node("Constant", [], ["loop.zero"], value_ints=[0]),
        helper.make_node("Shape", ["input_ids"], ["loop.shape"]),
        helper.make_node("Gather", ["loop.shape", "loop.one"], ["loop.tokens"]),
    ]
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Shape", ["attention_mask"], ["loop.mask"]),
            helper.make_node("Gather", ["loop.mask", "loop.one"], ["loop.total"]),
            helper.make_node("Sub", ["loop.total", "loop.tokens"], ["loop.past"]),
        ]
    return nodes


def _hoisted(step: onnx.GraphProto, weights: set[str]) -> list[onnx.NodeProto]:
    """Take the transposing of weights out of the step, which would repeat it for every token."""
    hoisted: list[onnx.NodeProto] = []
    kept: list[onnx.NodeProto] = []
    for node in step.node:
        outside = node.op_type == "Transpose" and node.input[0] in weights
        (hoisted if outside else kept).append(node)
    del step.node[:]
    step.node.extend(kept)
    return hoisted


def _body(
    step: onnx.GraphProto,
    states: list[State],
    inputs: list[str],
    own: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.GraphProto:
    """Return the step as the body of a Loop: number, condition, states → condition, states, logits.

    It cuts its own token, position and mask out of the graph's inputs.
    """
    renamed = {value.name: STEP + value.name for value in (*own, *outputs)}
    for node in step.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        for position, name in enumerate(node.output):
            node.output[position] = renamed.get(name, name)
    cut = [helper.make_node("Unsqueeze", ["loop.number", "loop.zero"], ["loop.at"])]
    for name in inputs:
        if name == "attention_mask":
            cut += [
                helper.make_node("Add", ["loop.past", "loop.number"], ["loop.before"]),
                helper.make_node("Add", ["loop.before", "loop.one"], ["loop.until"]),
                helper.make_node("Unsqueeze", ["loop.until", "loop.zero"], ["loop.end"]),
                helper.make_node(
                    "Slice", [name, "loop.zero", "loop.end", "loop.axis"], [renamed[name]]
                ),
            ]
        else:
            cut.append(helper.make_node("Gather", [name, "loop.at"], [renamed[name]], axis=1))
    cut.append(helper.make_node("Identity", ["loop.go_on"], ["loop.goes_on"]))
    inner = {}
    for value in (*own, *outputs):
        described = onnx.ValueInfoProto()
        described.CopyFrom(value)
        described.name = renamed[value.name]
        inner[value.name] = described
    return helper.make_graph(
        [*cut, *step.node],
        "step",
        [
            helper.make_tensor_value_info("loop.number", TensorProto.INT64, []),
            helper.make_tensor_value_info("loop.go_on", TensorProto.BOOL, []),
            *(inner[state.past] for state in states),
        ],
        [
            helper.make_tensor_value_info("loop.goes_on", TensorProto.BOOL, []),
            *(inner[state.present] for state in states),
            inner["logits"],
        ],
    )
