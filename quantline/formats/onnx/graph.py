"""The ONNX graph of a checkpoint, without weights, by the first of several ways that is right."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.formats.onnx.check import difference
from quantline.formats.onnx.states import Carried
from quantline.formats.onnx.subgraphs import nodes_of
from quantline.formats.onnx.token_loop import trace_in_loop
from quantline.formats.onnx.trace import export_dynamo, trace
from quantline.formats.onnx.weights import LARGEST_OWN, stand_in_weights
from quantline.model.checkpoint import Checkpoint
from quantline.model.empty_model import empty_model

# In this order: the first is quick and its graphs are, the last is always slow.
WAYS: dict[str, Callable[[Carried], onnx.ModelProto]] = {
    "torch's tracing exporter": trace,
    "torch's dynamo exporter": export_dynamo,
    "a loop over tokens": trace_in_loop,
}
LONGEST_CAUSE = 300  # letters


def graph_of(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Return the float32 graph, whose nodes read weights by the source's names.

    Raises:
        StageError: unsupported_architecture.
    """
    model: Any = empty_model(checkpoint)
    # The other attention implementations choose their path by the traced sizes; this one has no
    # branches.
    model.set_attn_implementation("eager")
    names = names_of_paths(checkpoint)
    small = {}
    for path, name in names.items():
        if np.prod(checkpoint.shape(name)) <= LARGEST_OWN:
            small[path] = checkpoint.tensor(name)
    stand_in_weights(model, small)
    graph = right_graph(model)
    for node in nodes_of(graph.graph):
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    return graph


def names_of_paths(checkpoint: Checkpoint) -> dict[str, str]:
    """Return path of a tensor in the model → its name in the checkpoint."""
    if checkpoint.structure is None:
        return {name: name for name in checkpoint.names}
    tensors = checkpoint.structure.tensors
    return {path: name for name, place in tensors.items() for path in place.paths}


def right_graph(model: Any) -> onnx.ModelProto:
    """Return a graph whose logits are the model's, whatever the length.

    Args:
        model: Of transformers, with weights that are not all alike. See `stand_in_weights`.

    Raises:
        StageError: unsupported_architecture, with the cause of each way.
    """
    try:
        with torch.inference_mode():
            carried = Carried(model)
    except StageError:
        raise
    except Exception as error:  # whatever a model breaks on
        raise _refused(model, [_cause("a pass with its cache", error)]) from error
    causes = []
    for name, way in WAYS.items():
        try:
            graph = way(carried)
            wrong = difference(graph, carried)
        except Exception as error:  # whatever strange code breaks in exporters and in onnxruntime
            causes.append(_cause(name, error))
            continue
        if wrong is None:
            return graph
        causes.append(f"{name}: {wrong}")
    raise _refused(model, causes)


def _cause(name: str, error: Exception) -> str:
    """Say in one line why something failed.

    Raises:
        StageError: If it was the machine.
    """
    raise_if_of_machine(error)
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{name}: {words[:LONGEST_CAUSE]}"


def _refused(model: Any, causes: list[str]) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected a graph that computes what {type(model).__name__} computes, found none ("
        f"{'; '.join(causes)}); choose format safetensors",
    )
