"""The plain checkpoint behind what was fetched: itself, or what another form of it stands for."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantline.errors import StageError
from quantline.files import describe_files
from quantline.ingest import dequantize, verify
from quantline.ingest.fetch import weight_files
from quantline.ingest.published_form import split_experts
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, is_sharded, side_files, weight_map
from quantline.model.configuration import read_config
from quantline.quantized.source_codes import FILE as CODES

FOLDER = ".plain"  # in the model's folder while it is made
SPLIT = ".split"  # the same, before it takes that name


class PlainSource(NamedTuple):
    """A checkpoint in the form that models are published in, without any quantization.

    Attributes:
        folder: The checkpoint.
        files: What the source consists of, as `describe_files` says it; None for a plain one,
            whose files are those that are brought.
        transforms: The steps that made it, for the manifest.
        gguf: The GGUF file that it was read from.
        made_by: How the weights were made, if there was a step.
    """

    folder: Path
    files: dict[str, dict[str, Any]] | None = None
    transforms: tuple[dict[str, Any], ...] = ()
    gguf: Path | None = None
    made_by: str = "dequantizing"

    def bring_codes(self, folder: Path) -> None:
        """Move the source's own codes into the model's folder, where recipes look for them."""
        if (self.folder / CODES).is_file():
            (self.folder / CODES).rename(folder / CODES)

    def check_agreement(self, checkpoint: Checkpoint) -> None:
        """Compare what was read from a GGUF file with what llama.cpp runs.

        Args:
            checkpoint: This one, opened.

        Raises:
            StageError: unsupported_architecture.
        """
        if self.gguf is not None:
            from quantline.ingest.dequantize.gguf import check_agreement

            check_agreement(self.gguf, checkpoint)


@contextmanager
def named_by_source(folder: Path, origin: Path) -> Iterator[None]:
    """Name the source in errors that speak of its plain copy, which nobody knows, and which goes.

    Args:
        folder: The model's folder, while it is made.
        origin: What was fetched.

    Raises:
        StageError: Of the same cause.
    """
    try:
        yield
    except StageError as error:
        copy = str(folder / FOLDER)
        if copy not in str(error):
            raise
        message = str(error).replace(copy, f"the plain copy of {origin}")
        raise StageError(error.failure, message, error.reason) from error


def plain_source(origin: Path, folder: Path) -> PlainSource:
    """Return a checkpoint as it is, or write what a quantized or joined one stands for.

    Args:
        origin: What was fetched.
        folder: The model's folder. Whoever has brought the files from there removes FOLDER in it.

    Raises:
        StageError: As `dequantize`, `write_folder` and `check_config` do.
    """
    if origin.is_file():
        from quantline.ingest.dequantize.gguf import write_folder

        step = write_folder(origin, folder / FOLDER)
        verify.check_config(folder / FOLDER)
        files = describe_files(origin.parent, [origin.name])
        return PlainSource(folder / FOLDER, files, (step,), origin)
    index = [INDEX] if is_sharded(origin) else []
    names = [*side_files(origin), *index, *weight_files(origin)]
    if dequantize.settings_of(read_config(origin)) is None:
        dequantize.check_plain(origin, weight_map(origin))
        split = split_experts(origin, folder / FOLDER)
        if split is None:
            return PlainSource(origin)
        files = describe_files(origin, names)
        return PlainSource(folder / FOLDER, files, (split,), made_by="splitting experts")
    steps = [dequantize.dequantize(origin, folder / FOLDER)]
    split = split_experts(folder / FOLDER, folder / SPLIT)
    if split is not None:
        steps.append(split)
        if (folder / FOLDER / CODES).is_file():
            (folder / FOLDER / CODES).rename(folder / SPLIT / CODES)
        shutil.rmtree(folder / FOLDER)
        (folder / SPLIT).rename(folder / FOLDER)
    return PlainSource(folder / FOLDER, describe_files(origin, names), tuple(steps))
