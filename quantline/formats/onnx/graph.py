"""Tracing a causal language model with its KV cache to an ONNX graph that has names in the place of weights.

Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key/value; outputs: logits, present.N.key/value.
Weights do not matter to a trace, so none are loaded: the graph names them, and whoever writes the file puts in what it
reads from the checkpoint. Nor can the exporter then merge two weights that happen to be equal, or fold a transposed
copy of one, and lose a name by it.
"""

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from quantline.model.architecture import Architecture, architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.empty_model import empty_model

OPSET = 18  # the newest that torch's tracing exporter writes without converting
WRAPPER = "model."  # what the wrapper below puts before the model's own tensor names
BATCH, BEFORE, NEW = 2, 4, 3  # sizes of the dummy inputs: all unlike 1, which a trace would take for a constant


class WithCache(nn.Module):
    """The model with its cache as flat inputs and outputs."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids, attention_mask, position_ids, *past):
        # Made without the configuration, it keeps all positions: layers with a window would cut it, each to another length.
        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=cache, use_cache=True)
        present = [one for layer in out.past_key_values.layers for one in (layer.keys, layer.values)]
        return (out.logits, *present)


def trace(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The float32 graph. Its nodes read weights by the source's names, and it has no initializers for them."""
    facts = architecture(checkpoint)
    names = [f"{part}.{layer}.{kind}" for part in ("past_key_values", "present")
             for layer in range(facts.layers) for kind in ("key", "value")]
    axes = {name: {0: "batch", 2: "past" if name.startswith("past") else "total"} for name in names}
    axes |= {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    inputs = ["input_ids", "attention_mask", "position_ids", *names[:2 * facts.layers]]
    with tempfile.TemporaryDirectory() as work, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every Python branch on a shape
        torch.onnx.export(
            WithCache(hollow(checkpoint), facts.layers), dummy_inputs(checkpoint, facts), str(Path(work) / "graph.onnx"),
            input_names=inputs, output_names=["logits", *names[2 * facts.layers:]], dynamic_axes=axes,
            opset_version=OPSET, dynamo=False, do_constant_folding=False, export_params=False)
        graph = onnx.load(Path(work) / "graph.onnx")
    _name_weights(graph.graph, checkpoint, inputs)
    return graph


def hollow(checkpoint: Checkpoint) -> nn.Module:
    """The model with zeros for weights, which take no memory until they are written, and sharing as in the source."""
    model, made = empty_model(checkpoint.folder), {}
    before = list(model.parameters())  # held on to, so that no id of theirs is given to another
    # The other attention implementations choose their path by the traced sizes; this one has no branches.
    model.set_attn_implementation("eager")
    for module in model.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            if id(one) not in made:
                made[id(one)] = nn.Parameter(torch.zeros(one.shape), requires_grad=False)
            setattr(module, name, made[id(one)])
    del before
    return model


def dummy_inputs(checkpoint: Checkpoint, facts: Architecture) -> tuple[torch.Tensor, ...]:
    """A continuation of BEFORE cached tokens by NEW, with optimum's generators."""
    from optimum.utils import DummyPastKeyValuesGenerator, DummyTextInputGenerator, NormalizedConfigManager
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    normalized = NormalizedConfigManager.get_normalized_config_class(facts.normalized)(config)
    text = DummyTextInputGenerator("text-generation", normalized, batch_size=BATCH, sequence_length=NEW)
    memory = DummyPastKeyValuesGenerator("text-generation", normalized, batch_size=BATCH, sequence_length=BEFORE)
    # optimum's own shape has a key for every head; grouped-query attention has fewer.
    shape = (BATCH, facts.kv_heads, BEFORE, facts.head_dim)
    past = [memory.random_float_tensor(shape, framework="pt") for _ in range(2 * facts.layers)]
    positions = torch.arange(BEFORE, BEFORE + NEW).expand(BATCH, NEW).contiguous()
    mask = torch.ones(BATCH, BEFORE + NEW, dtype=torch.int64)
    return text.generate("input_ids", framework="pt"), mask, positions, *past


def _name_weights(graph: onnx.GraphProto, checkpoint: Checkpoint, inputs: list[str]) -> None:
    """Call the weights by the source's names, and take away what the exporter made of equal ones (all are zeros)."""
    traced = {WRAPPER + name: name for name in checkpoint.names}
    nodes = [node for node in graph.node if not (node.op_type == "Identity" and node.output[0] in traced)]
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = traced.get(name, name)
    kept = [one for one in graph.input if one.name in inputs]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(kept)
