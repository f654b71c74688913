"""The plain checkpoint behind what was fetched: itself, or what a quantized source stands for."""

from pathlib import Path
from typing import Any, NamedTuple

from quantline.files import describe_files
from quantline.ingest import dequantize
from quantline.ingest.fetch import weight_files
from quantline.model.checkpoint_files import INDEX, is_sharded, side_files
from quantline.model.configuration import read_config

FOLDER = ".plain"  # in the model's folder while it is made


class PlainSource(NamedTuple):
    """A checkpoint that transformers loads without knowing of any quantization.

    Attributes:
        folder: The checkpoint.
        files: What the source consists of, as `describe_files` says it; None for a plain one,
            whose files are those that are brought.
        transforms: The step that made it, for the manifest.
    """

    folder: Path
    files: dict[str, dict[str, Any]] | None = None
    transforms: tuple[dict[str, Any], ...] = ()


def plain_source(origin: Path, folder: Path) -> PlainSource:
    """Return a checkpoint as it is, or write what a quantized one stands for.

    Args:
        origin: What was fetched.
        folder: The model's folder. Whoever has brought the files from there removes FOLDER in it.

    Raises:
        StageError: As `dequantize` does.
    """
    if dequantize.settings_of(read_config(origin)) is None:
        return PlainSource(origin)
    index = [INDEX] if is_sharded(origin) else []
    names = [*side_files(origin), *index, *weight_files(origin)]
    step = dequantize.dequantize(origin, folder / FOLDER)
    return PlainSource(folder / FOLDER, describe_files(origin, names), (step,))
