"""Layouts of quantized linear layers inside safetensors: how integers and scales become tensors."""

from typing import NamedTuple


class LayoutInfo(NamedTuple):
    """What is known of a layout without importing it.

    Attributes:
        implementation: "module:Class" of the Layout.
        activations: The same for a server that rounds activations too; None if there is none.
        package: What transformers needs to load it.
    """

    implementation: str
    activations: str | None
    package: str


# By the quant_method that config.json names; the first is the default.
LAYOUTS = {
    "compressed-tensors": LayoutInfo(
        implementation="quantline.formats.safetensors.layouts.compressed_tensors:PackedIntegers",
        activations="quantline.formats.safetensors.layouts.activations:EightBits",
        package="compressed-tensors",
    ),
    "gptq": LayoutInfo("quantline.formats.safetensors.layouts.gptq:Gptq", None, "gptqmodel"),
    "awq": LayoutInfo("quantline.formats.safetensors.layouts.awq:Awq", None, "gptqmodel"),
}
