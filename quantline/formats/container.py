"""Containers: one file each, with `write(model, quantized, folder, variant)` and `read_back(folder)`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np

GGUF = "model*.gguf"  # the file of a GGUF bundle, or the files of a split one, which sort by their number
ABOUT = ("manifest.json", "smoke.json", "README.md")  # what a bundle says of itself, beside the files it consists of


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a container holds it, under the source's name and in the source's layout."""

    type: str
    shape: tuple[int, ...]
    bytes: int  # with its scales and zero points
    dequantize: Callable[[], np.ndarray]  # float32 of that shape

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / int(np.prod(self.shape))


def load_format(name: str) -> ModuleType:
    """The module of a container, imported only now."""
    return import_module(f"quantline.formats.{name}.container")
