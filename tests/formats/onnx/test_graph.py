"""Graphs of models of unlike kinds, and of one that a trace would freeze."""

import numpy as np
import pytest
import torch
from torch import nn

from quantline.errors import Failure, StageError
from quantline.formats.onnx import graph as graph_module
from quantline.formats.onnx import recurrences
from quantline.formats.onnx.check import difference
from quantline.formats.onnx.graph import right_graph
from quantline.formats.onnx.states import Carried
from quantline.formats.onnx.subgraphs import nodes_of
from quantline.formats.onnx.token_loop import trace_in_loop
from quantline.formats.onnx.trace import export_dynamo, trace
from quantline.formats.onnx.weights import stand_in_weights, zeros
from tests.helpers.small_models import small_model


def kinds(graph) -> set[str]:
    return {node.op_type for node in nodes_of(graph.graph)}


@pytest.fixture
def by_trace_alone(monkeypatch):
    monkeypatch.setattr(graph_module, "WAYS", {"torch's tracing exporter": trace})


@pytest.mark.parametrize("model_type", ["deepseek_v2", "lfm2", "mamba", "mamba2", "gpt_bigcode"])
def test_right_graph_of_unlike_models(model_type, by_trace_alone):
    model = small_model(model_type)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    graph = right_graph(model)
    inputs = {value.name for value in graph.graph.input}
    assert "input_ids" in inputs
    assert ("LinearAttention" in kinds(graph)) == model_type.startswith("mamba")
    assert not model.training
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_right_graph_names_every_cause_where_a_trace_freezes_the_length(monkeypatch):
    """Without the operator, Mamba's loop runs as often as the example had tokens."""
    monkeypatch.setattr(recurrences, "KERNELS", {})

    def fails(carried: Carried) -> None:
        raise NotImplementedError("no such exporter")

    ways = {"a trace": trace, "another": fails}
    monkeypatch.setattr(graph_module, "WAYS", ways)
    with pytest.raises(StageError, match="another: NotImplementedError: no such exp") as caught:
        right_graph(small_model("mamba"))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert "a trace: " in str(caught.value)
    assert "choose format safetensors" in str(caught.value)


def test_right_graph_names_a_model_that_does_not_run_with_its_cache(by_trace_alone):
    """transformers' hybrid caches need a layer with attention."""
    model = small_model("qwen3_next", layer_types=["linear_attention"] * 2)
    with pytest.raises(StageError, match="a pass with its cache: ValueError") as caught:
        right_graph(model)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_right_graph_takes_the_loop_where_a_trace_freezes_the_length(monkeypatch):
    monkeypatch.setattr(graph_module, "WAYS", {"a trace": trace, "a loop": trace_in_loop})
    model = small_model("minimax")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()  # its fused experts are another matter
    graph = right_graph(model)
    assert "Loop" in kinds(graph)
    # Weights are transposed once, and not for every token.
    outside = {name for node in graph.graph.node for name in node.input}
    assert "model.layers.0.self_attn.qkv_proj.weight" in outside


def test_difference_sees_a_state_that_is_not_carried():
    with torch.inference_mode():
        carried = Carried(small_model("lfm2"))
    graph = trace(carried)
    assert difference(graph, carried) is None
    for node in graph.graph.node:
        for position, name in enumerate(node.input):
            if name == "past_states.0.conv":
                node.input[position] = "zeros"
    import onnx

    shape = (2, 32, 3)
    none = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "zeros")
    graph.graph.initializer.append(none)
    wrong = difference(graph, carried)
    assert wrong is not None
    assert "in pieces of" in wrong


@pytest.mark.slow
def test_export_dynamo_makes_a_graph_that_is_right():
    with torch.inference_mode():
        carried = Carried(small_model("gemma3_text"))
    graph = export_dynamo(carried)
    assert difference(graph, carried) is None
    names = {value.name for value in graph.graph.input}
    assert names == {*carried.inputs, *(state.past for state in carried.states)}
    assert not {tensor.name for tensor in graph.graph.initializer} & set(carried.weights())


def test_stand_in_weights_share_the_matrices_of_unlike_layers():
    model = small_model("gemma3_text")
    own = {"model.norm.weight": np.full(32, 2, np.float32)}
    stand_in_weights(model, own)
    named = dict(model.named_parameters())
    first, second = (named[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert first is not second
    assert named["model.norm.weight"].tolist() == [2] * 32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_zeros_are_there_for_a_while_and_tied_as_the_weights():
    model = small_model("gemma3_text")
    own = dict(model.named_parameters())
    with zeros(model):
        assert not model.model.embed_tokens.weight.any()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(one is own[name] for name, one in model.named_parameters())
