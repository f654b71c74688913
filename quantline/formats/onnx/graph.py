"""Tracing a causal language model with its key-value cache to an ONNX graph without weights.

Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key/value.
Outputs: logits, present.N.key/value.

Weights do not matter to a trace, so none are loaded: the graph names them, and whoever writes the
file puts in what it reads from the checkpoint. Nor can the exporter then merge two weights that
happen to be equal, or fold a transposed copy of one, and lose a name by it.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.configuration import transformers_config
from quantline.model.empty_model import empty_model

OPSET = 18  # the newest that torch's tracing exporter writes without converting
WRAPPER = "model."  # what _WithCache puts before the model's own tensor names
# Sizes of the example inputs, all unlike 1, which a trace would take for a constant.
BATCH = 2
CACHED_TOKENS = 4
NEW_TOKENS = 3


class _WithCache(nn.Module):
    """The model with its cache as flat inputs and outputs."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # A cache that is made without the configuration keeps all positions. One made with it
        # would cut those of layers with a window, each to another length.
        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = []
        for grown in out.past_key_values.layers:
            present += [grown.keys, grown.values]
        return (out.logits, *present)


def trace(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Return the float32 graph.

    Its nodes read weights by the source's names, and it has no initializers for them.
    """
    arch = checkpoint.arch
    past = _cache_names("past_key_values", arch.layers)
    present = _cache_names("present", arch.layers)
    inputs = ["input_ids", "attention_mask", "position_ids", *past]
    axes = {name: {0: "batch", 2: "past"} for name in past}
    axes |= {name: {0: "batch", 2: "total"} for name in present}
    axes |= {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    model = _WithCache(_zero_model(checkpoint), arch.layers)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        warnings.catch_warnings(),
    ):
        path = Path(folder) / "graph.onnx"
        warnings.simplefilter("ignore")  # the tracer warns of every Python branch on a shape
        torch.onnx.export(
            model,
            _example_inputs(checkpoint, arch),
            str(path),
            input_names=inputs,
            output_names=["logits", *present],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
            export_params=False,
        )
        graph = onnx.load(path)
    _name_weights(graph.graph, checkpoint, inputs)
    return graph


def _cache_names(prefix: str, layers: int) -> list[str]:
    """Return the names of a cache's keys and values."""
    names = []
    for layer in range(layers):
        names += [f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"]
    return names


def _zero_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the model with zeros for weights, shared as in the source.

    Zeros take no memory until they are written.
    """
    model: Any = empty_model(checkpoint.folder)
    zeros: dict[int, nn.Parameter] = {}
    # As long as these live, no id of theirs is given to another parameter.
    originals = list(model.parameters())
    # The other attention implementations choose their path by the traced sizes; this one has no
    # branches.
    model.set_attn_implementation("eager")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in zeros:
                zero = torch.zeros(parameter.shape)
                zeros[id(parameter)] = nn.Parameter(zero, requires_grad=False)
            setattr(module, name, zeros[id(parameter)])
    del originals
    return model


def _example_inputs(checkpoint: Checkpoint, arch: Architecture) -> tuple[torch.Tensor, ...]:
    """Return inputs that continue CACHED_TOKENS by NEW_TOKENS, from optimum's generators."""
    from optimum.utils import (
        DummyPastKeyValuesGenerator,
        DummyTextInputGenerator,
        NormalizedConfigManager,
    )

    config = transformers_config(checkpoint.config)
    normalized = NormalizedConfigManager.get_normalized_config_class(arch.normalized)(config)
    task = "text-generation"
    text_generator = DummyTextInputGenerator(
        task, normalized, batch_size=BATCH, sequence_length=NEW_TOKENS
    )
    cache_generator = DummyPastKeyValuesGenerator(
        task, normalized, batch_size=BATCH, sequence_length=CACHED_TOKENS
    )
    # optimum's own shape has a key for every head; grouped-query attention has fewer.
    shape = (BATCH, arch.kv_heads, CACHED_TOKENS, arch.head_dim)
    past = [
        cache_generator.random_float_tensor(shape, framework="pt") for _ in range(2 * arch.layers)
    ]
    input_ids = text_generator.generate("input_ids", framework="pt")
    mask = torch.ones(BATCH, CACHED_TOKENS + NEW_TOKENS, dtype=torch.int64)
    positions = torch.arange(CACHED_TOKENS, CACHED_TOKENS + NEW_TOKENS)
    return input_ids, mask, positions.expand(BATCH, NEW_TOKENS).contiguous(), *past


def _name_weights(graph: onnx.GraphProto, checkpoint: Checkpoint, inputs: list[str]) -> None:
    """Call the weights by the source's names.

    What the exporter made of equal ones is taken away: all are zeros.
    """
    traced = {WRAPPER + name: name for name in checkpoint.names}
    nodes = []
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in traced:
            continue
        for position, name in enumerate(node.input):
            node.input[position] = traced.get(name, name)
        nodes.append(node)
    model_inputs = [value for value in graph.input if value.name in inputs]
    del graph.node[:]
    del graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(model_inputs)
