"""The protocol of a container, and a tensor as a container holds it.

Every stage imports this file, so it imports no numpy.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from quantline.config.containers import CONTAINERS
from quantline.registry import load_object

if TYPE_CHECKING:
    import numpy as np

    from quantline.config.variants import Variant
    from quantline.model.tensor_source import TensorSource
    from quantline.quantized.store import QuantizedModel

Source = TypeVar("Source", bound="TensorSource")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a container holds it, under the source's name and with the source's shape.

    Attributes:
        type: What one value is stored as, such as "int4", "Q4_K" or "BF16".
        shape: Of the source's tensor.
        bytes: With its scales and zero points.
        dequantize: Reads the values, float32 of that shape.
    """

    type: str
    shape: tuple[int, ...]
    bytes: int
    dequantize: "Callable[[], np.ndarray]"

    @property
    def weights(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights


class Container(ABC, Generic[Source]):
    """A container format, written from one kind of TensorSource.

    Life cycle of an export (formats/bundle/export.py):

        source = container.open_source(model)                      # the unquantized model
        requested = container.write(source, quantized, folder, variant)
        stored = container.read_back(folder, source)               # every tensor, from the file
        wanted = container.expected(source, quantized, name, type) # what it has to hold
        texts = container.texts(model, folder)                     # for other programs, if any
        text = container.serve(manifest)                           # for the bundle's README

    The smoke test calls `tokenizer_metadata` in the runtime's own process, so the module of an
    implementation imports torch, onnx and the like only inside the functions that need them.
    """

    @abstractmethod
    def open_source(self, model: Path) -> Source:
        """Open the unquantized model in artifacts/model as this container wants its tensors."""

    @abstractmethod
    def write(
        self, source: Source, quantized: "QuantizedModel", folder: Path, variant: "Variant"
    ) -> dict[str, str]:
        """Write the bundle's files into an empty folder, tokenizer included.

        Args:
            source: What `open_source` returned.
            quantized: The quantized weights; it may have none.
            folder: Where to write.
            variant: Its dtype, layout, runtime and size of files are followed.

        Returns:
            Source tensor → the type that was asked for.

        Raises:
            StageError: If the container cannot hold the model as it is asked to.
        """

    @abstractmethod
    def read_back(self, folder: Path, source: Source) -> dict[str, StoredTensor]:
        """Return what the files hold, under the source's names."""

    @abstractmethod
    def expected(
        self, source: Source, quantized: "QuantizedModel", name: str, stored_type: str
    ) -> "np.ndarray":
        """Return the values, float32, that a tensor stored as `stored_type` has to have."""

    @abstractmethod
    def serve(self, manifest: dict[str, Any]) -> str:
        """Return the section "## Serve it" of a bundle's README, in Markdown."""

    def texts(self, model: Path, folder: Path) -> dict[str, str]:
        """Return name → content of texts that lie beside the model's own files in a bundle.

        They are hashed like those, and do not count as the model's size.

        Args:
            model: The unquantized model, as load made it.
            folder: The bundle, with what `write` wrote.
        """
        return {}

    def limits(self, source: Source) -> list[str]:
        """Return sentences on where the bundle is another model than the source.

        Such as beyond a length. They become warnings of the export, and stand in its README.
        """
        return []

    @abstractmethod
    def tokenizer_metadata(self, folder: Path) -> dict[str, Any]:
        """Return what a bundle says of its tokenizer.

        Returns:
            {bos, eos, unk, pad: id or None; adds_bos; chat_template}, and where the format has
            words for them {ends: ids; adds_eos; named_templates: name → template}.
        """


def load_container(name: str) -> Container[Any]:
    """Import the implementation of a container.

    Raises:
        ConfigError: If no container of that name is registered.
    """
    implementation = load_object(CONTAINERS[name].implementation)
    return cast(Callable[[], Container[Any]], implementation)()
