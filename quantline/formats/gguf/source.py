"""What a GGUF file is made of: the checkpoint, or what llama.cpp's converter made of it."""

from pathlib import Path

from quantline.config.params import AUTO
from quantline.errors import StageError
from quantline.files import read_json
from quantline.formats.gguf.architectures import gguf_names
from quantline.formats.gguf.converter.conversion import conversion_of, has_towers
from quantline.formats.gguf.rope import rope_of
from quantline.model.checkpoint import Checkpoint
from quantline.model.tensor_source import TensorSource

MANIFEST = "manifest.json"  # of the model's folder, where load has written which converter to take


def source_for_gguf(folder: Path | str) -> TensorSource:
    """Return what a GGUF file of a model is made of.

    It is the checkpoint itself, if quantline has a table of the family that fits it, else the
    file of llama.cpp's converter, which is made if it is not there yet.

    Args:
        folder: The checkpoint, as load made it.

    Raises:
        StageError: unsupported_architecture, where no converter may be taken; as `conversion_of`
            does.
    """
    folder = Path(folder)
    converter = converter_of(folder)
    checkpoint = Checkpoint(folder)
    if converter is None or has_own_table(checkpoint, converter):
        return checkpoint
    return conversion_of(folder, converter)


def has_own_table(checkpoint: Checkpoint, converter: str | None) -> bool:
    """Whether GGUF files are made of the checkpoint itself, without a converter.

    Tables know no towers for images or sound, which the converter writes into a file of their own.
    """
    return converter == AUTO and not has_towers(checkpoint) and table_problem(checkpoint) is None


def converter_of(folder: Path) -> str | None:
    """Return which converter a model's folder asks for: auto, a path, or None."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    return manifest.get("converter", AUTO)


def table_problem(checkpoint: Checkpoint) -> StageError | None:
    """Return why quantline's own tables do not serve for a checkpoint; None if they do."""
    try:
        gguf_names(checkpoint)
        family = checkpoint.arch.family.gguf
        assert family is not None, "gguf_names refuses families without a table"
        rope_of(checkpoint.configuration, checkpoint.arch, family)
    except StageError as error:
        return error
    return None
