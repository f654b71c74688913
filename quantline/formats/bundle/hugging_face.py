"""What containers share that are made of the checkpoint's tensors and keep its tokenizer files."""

import shutil
from pathlib import Path
from typing import Any

from quantline.formats.bundle.tokenizer_metadata import metadata_of_tokenizer
from quantline.formats.container import Container
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import side_files
from quantline.text.special_tokens import FILE as SPECIAL_TOKENS
from quantline.text.tokenizer import Tokenizer


class HuggingFaceContainer(Container[Checkpoint]):
    """A container whose bundle is a Hugging Face folder but for the weights."""

    def open_source(self, model: Path) -> Checkpoint:
        """Open the checkpoint."""
        return Checkpoint(model)

    def tokenizer_metadata(self, folder: Path) -> dict[str, Any]:
        """Return what the tokenizer's files say (see Container)."""
        return metadata_of_tokenizer(Tokenizer(folder))


def copy_side_files(checkpoint: Path, folder: Path) -> None:
    """Copy the configuration and the tokenizer of a checkpoint into a bundle."""
    names = side_files(checkpoint)
    if (checkpoint / SPECIAL_TOKENS).is_file():
        names.append(SPECIAL_TOKENS)
    for name in names:
        copy = folder / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint / name, copy)
