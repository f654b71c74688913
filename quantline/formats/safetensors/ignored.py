"""What a server is told to leave as it is: the `ignore` of a quantization_config.

A server builds a model of its own, in which layers may be linear that are none in transformers,
such as routers, and may have other names: it maps those that it knows, and takes the rest for
layers that are quantized.
"""

import re

from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel

WEIGHT = ".weight"


def ignored_modules(source: Checkpoint, quantized: QuantizedModel) -> list[str]:
    """Return the names of the modules that are not quantized, and patterns (re:) of some.

    Args:
        source: The unquantized model.
        quantized: The quantized weights.
    """
    arch = source.arch
    kept = [name for name in arch.linears() if name not in quantized.linears]
    outside = arch.unquantized_modules
    head = arch.head.removesuffix(WEIGHT)
    if head in quantized.linears:
        outside = [name for name in outside if name not in arch.module_names(head)]
    names = [*outside, *module_names(source, kept), *_routers(source, quantized)]
    names += [_wherever_it_is(name, quantized) for name in _around_the_blocks(source)]
    return list(dict.fromkeys(names))


def module_names(source: Checkpoint, layers: list[str]) -> list[str]:
    """Return all names of linear layers, the checkpoint's and transformers'."""
    return [module for name in layers for module in source.arch.module_names(name)]


def _routers(source: Checkpoint, quantized: QuantizedModel) -> list[str]:
    """Return modules of blocks with a matrix that is in no linear layer of transformers."""
    structure = source.structure
    linears = {*source.arch.linears(), *quantized.linears}
    found = []
    for name in source.names:
        module = name.removesuffix(WEIGHT)
        if module == name or module in linears or source.arch.layer_index(name) is None:
            continue
        if len(source.shape(name)) == 2:
            paths = structure.tensors[name].paths if structure else ()
            found += [module, *(path.removesuffix(WEIGHT) for path in paths)]
    return found


def _around_the_blocks(source: Checkpoint) -> list[str]:
    """Return linear layers of the text model that lie in no block, without its head.

    No mapping of names is made for them as it is for whole towers, which vLLM has taken along.
    """
    structure = source.structure
    if structure is None:
        return []
    weights = [f"{name}{WEIGHT}" for name in structure.kept_linears]
    return [
        weight.removesuffix(WEIGHT)
        for weight in weights
        if weight in structure.tensors
        and weight not in structure.blocks_of_names
        and weight != structure.head
    ]


def _wherever_it_is(name: str, quantized: QuantizedModel) -> str:
    """Return a pattern for the end of a name, the shortest that fits no quantized layer."""
    layers = [f".{layer}" for layer in quantized.linears]
    parts = name.split(".")
    for first in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[first:])
        if not parts[first].isdecimal() and not any(layer.endswith(f".{end}") for layer in layers):
            return rf"re:(.*\.)?{re.escape(end)}$"
    return name
