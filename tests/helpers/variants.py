"""Variants, and the containers that they are written in."""

from pathlib import Path
from typing import Any

from quantline.config.containers import CONTAINERS
from quantline.config.variants import Variant
from quantline.formats.container import Container, load_container
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel

GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 16}  # sizes that a tiny Gemma needs


def variant(format: str, **options: Any) -> Variant:
    """Return a variant in a container, by default in the container's own runtime."""
    defaults = {"recipe": "rounded", "runtime": CONTAINERS[format].runtime}
    return Variant(format=format, **(defaults | options))


def write_variant(
    format: str,
    folder: Path,
    source: TensorSource,
    quantized: QuantizedModel,
    **options: Any,
) -> dict[str, str]:
    """Write a container into a new folder; return source tensor → the type asked for."""
    folder.mkdir(parents=True)
    container: Container[Any] = load_container(format)
    return container.write(source, quantized, folder, variant(format, **options))
