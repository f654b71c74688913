"""Safetensors folders as Hugging Face lays them out, for transformers and vLLM."""

from quantline.config.containers import ContainerInfo, register_container
from quantline.formats.safetensors.layouts import LAYOUTS

register_container(
    ContainerInfo(
        name="safetensors",
        implementation="quantline.formats.safetensors.container:SafetensorsContainer",
        runtime="transformers",
        carries=frozenset({"none", "grouped", "float8"}),
        packages=("compressed-tensors", "safetensors", "tokenizers", "torch", "transformers"),
        colour="#3b6fb6",
        marker="o",
        activations=True,
        layouts=tuple(LAYOUTS),
    )
)
