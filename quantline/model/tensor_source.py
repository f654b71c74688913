"""Where the tensors of an unquantized model come from."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantline.model.architecture import Architecture


class TensorSource(Protocol):
    """A model's tensors, read one at a time.

    `Checkpoint` is a Hugging Face folder; `GgufCheckpoint` the GGUF file that a converter made of
    one, whose names are those of the file.

    Attributes:
        folder: The checkpoint's folder.
        names: The tensors that the model consists of, sorted.
        converted: Whether a converter made the tensors of the checkpoint.
        passed: Stored tensors that a bundle keeps as they are, though the text model lacks them.
        tied_head: The tensor of a head that is the embedding, which a file may hold twice.
    """

    folder: Path
    names: list[str]
    passed: tuple[str, ...]
    converted: bool
    tied_head: str | None

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    @property
    def configuration(self) -> dict[str, Any]:
        """What config.json means, with transformers' defaults."""

    @property
    def arch(self) -> Architecture:
        """Sizes and names of the model, with the names of this source."""

    def stamp(self) -> dict[str, list[int]]:
        """Return size and time of change of the weight files."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a weight [out, in]."""

    def stored_dtype(self, name: str) -> str:
        """Return the dtype on disk, such as F32, F16 or BF16."""

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in float32, which holds every bfloat16 and float16 exactly."""

    def optional(self, name: str | None) -> np.ndarray | None:
        """Return a tensor in float32; None where there is none of that name."""

    def keeps_float32(self, name: str) -> bool:
        """Whether a tensor has to stay in float32 though the checkpoint is in half precision."""

    def layer_of(self, name: str) -> str | None:
        """Return the calibrated module whose weight a tensor is; None if that is not known."""

    def in_order_of(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return values of its layer's inputs, [in], in the order of a tensor's columns."""

    def has_rows_of_layer(self, name: str) -> bool:
        """Whether a tensor has the rows of its layer's weight, each once, in whatever order."""

    def row_order(self, name: str) -> np.ndarray | None:
        """Return the checkpoint's rows in this source's order, int [rows]; None if it is the same.

        Raises:
            StageError: unsupported_architecture, if they are not the checkpoint's rows.
        """
