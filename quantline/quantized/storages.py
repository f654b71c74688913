"""Kinds of quantized weights by the name under which the canonical store keeps them.

Light, so that a method's options can register a kind of its own: the class is imported when a
weight of that kind is read.
"""

from quantline.registry import Registry

GROUPED = "grouped"

# Name → "module:Class" of a QuantizedTensor (quantline.quantized.tensors).
STORAGES: Registry[str] = Registry("storage")


def register_storage(name: str, tensor_class: str) -> None:
    """Register a kind of quantized weights.

    Args:
        name: What `Recipe.storage`, `ContainerInfo.carries` and quantized.json call it.
        tensor_class: "module:Class" of a QuantizedTensor.
    """
    STORAGES.add(name, tensor_class)


register_storage(GROUPED, "quantline.quantized.tensors:GroupedLinear")
register_storage("float8", "quantline.quantized.tensors:FloatLinear")
