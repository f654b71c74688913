"""Unquantized GGUF files of a checkpoint."""

from pathlib import Path
from typing import NamedTuple

from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_files import model_files
from quantline.quantized.store import QuantizedModel
from tests.helpers.quantized import rounded
from tests.helpers.variants import write_variant


class Written(NamedTuple):
    """A bundle and what it was made of."""

    source: Checkpoint
    quantized: QuantizedModel
    bundle: Path
    requested: dict[str, str]


def write_unquantized(folder: Path, checkpoint: Path, dtype: str | None) -> Written:
    """Write the GGUF file of a checkpoint below a folder."""
    source = Checkpoint(checkpoint)
    quantized = rounded(folder / "quantized", source, bits=0)
    bundle = folder / "bundle"
    requested = write_variant("gguf", bundle, source, quantized, dtype=dtype)
    return Written(source, quantized, bundle, requested)


def file_of(bundle: Path) -> Path:
    """Return the file of a bundle's model."""
    return model_files(bundle)[0]
