"""The GGUF file that a converter made of a checkpoint, read with the names of the file.

It lies beside the checkpoint, unquantized. The calibrated layer of a tensor is found through gguf's
own map of names, and the order of its rows, which converters change for llama.cpp's rotary
embedding, by the rows themselves.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from quantline.errors import Failure, StageError
from quantline.files import stamp
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import Block, Family, GgufFamily
from quantline.model.tensor_source import TensorSource

FILE = "converted.gguf"
# What quantline writes anew instead of copying it.
REWRITTEN = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.type",
)


def _open(path: Path) -> gguf.GGUFReader:
    """Return a reader of a file. Raises StageError: missing_shard, if it is damaged."""
    try:
        reader = gguf.GGUFReader(path)
        reader.fields["general.architecture"].contents()
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected the converter's GGUF file in {path}, found one that is damaged or cut "
            f"short ({error}); run load again",
        ) from None
    return reader


class GgufCheckpoint:
    """A checkpoint folder with a converter's file in it, as a TensorSource."""

    converted = True
    tied_head: str | None = None

    def __init__(self, folder: Path | str) -> None:
        """Read the header of the file."""
        self.folder = Path(folder)
        self.checkpoint = Checkpoint(folder)
        reader = _open(self.folder / FILE)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = sorted(self.tensors)
        self.fields = {
            name: field
            for name, field in reader.fields.items()
            if name not in REWRITTEN and not name.startswith(("GGUF.", "split."))
        }
        self.architecture_name = str(reader.fields["general.architecture"].contents())

    @property
    def config(self) -> dict[str, Any]:
        """The content of the checkpoint's config.json."""
        return self.checkpoint.config

    @property
    def configuration(self) -> dict[str, Any]:
        """What the checkpoint's config.json means."""
        return self.checkpoint.configuration

    @cached_property
    def arch(self) -> Architecture:
        """The checkpoint's sizes, with llama.cpp's names."""
        family = Family(
            Block({}, ()),
            blocks="blk",
            outside={
                "token_embd": "token_embd",
                "output_norm": "output_norm",
                "output": "output",
            },
            gguf=GgufFamily(self.architecture_name),
        )
        return replace(
            self.checkpoint.arch,
            model_type=self.architecture_name,
            family=family,
            tied="output.weight" not in self.tensors,
        )

    def stamp(self) -> dict[str, list[int]]:
        """Return size and time of change of the checkpoint's files and of the converter's."""
        return self.checkpoint.stamp() | stamp([self.folder / FILE])

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a weight [out, in]."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of the checkpoint's matrices, which is that of the file's."""
        return self.checkpoint.stored_dtype(self.checkpoint.arch.embedding)

    def keeps_float32(self, name: str) -> bool:
        """Whether the converter kept a tensor in float32 though the checkpoint is in half."""
        return self.tensors[name].tensor_type.name == "F32" and self.stored_dtype(name) != "F32"

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        tensor = self.tensors[name]
        data = tensor.data
        if tensor.tensor_type.name == "BF16":
            data = data.view(ml_dtypes.bfloat16)
        return data.reshape(self.shape(name))

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in float32."""
        tensor = self.tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(self.shape(name)).astype(np.float32)

    def optional(self, name: str) -> np.ndarray | None:
        """Return a tensor in float32; None where the file has none of that name."""
        return self.tensor(name) if name in self.tensors else None

    def write_fields(self, writer: gguf.GGUFWriter) -> None:
        """Write what the file says of the model and of its tokenizer."""
        for name, field in self.fields.items():
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            item_type = field.types[-1] if is_array else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item_type)

    @cached_property
    def checkpoint_names(self) -> dict[str, str]:
        """Tensor of the file → that of the checkpoint, by gguf's map of the architecture."""
        by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        kind = by_name.get(self.architecture_name)
        if kind is None:
            return {}
        name_map = gguf.get_tensor_name_map(kind, self.arch.layers)
        names = {}
        for name in self.checkpoint.names:
            gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name in self.tensors:
                names[gguf_name] = name
        return names

    def layer_of(self, name: str) -> str | None:
        """Return the checkpoint's module whose weight a tensor is; None if that is not known."""
        source = self.checkpoint_names.get(name, "")
        return source.removesuffix(".weight") if source.endswith(".weight") else None

    def row_order(self, name: str) -> np.ndarray | None:
        """Return the rows of the checkpoint's tensor in the order of the file, int [rows].

        Raises:
            StageError: unsupported_architecture, if they are not the checkpoint's rows.
        """
        ours = self.tensor(name)
        source = self.checkpoint_names[name]
        theirs = self.checkpoint.tensor(source)
        # Equal rows are handed out in their order, so the last is put down first.
        numbers: dict[bytes, list[int]] = {}
        for number in reversed(range(len(theirs))):
            numbers.setdefault(theirs[number].tobytes(), []).append(number)
        order = []
        for row in ours if ours.shape == theirs.shape else ():
            same = numbers.get(row.tobytes())
            order.append(same.pop() if same else -1)
        if len(order) != len(ours) or -1 in order:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected the rows of {source} in {name}, as curvature rounding needs them, "
                "found other ones, which the converter made; take the method kquant",
            )
        return np.array(order)


def source_for_gguf(folder: Path | str) -> TensorSource:
    """Return what a GGUF file is made of: the converter's file, or the checkpoint itself."""
    if (Path(folder) / FILE).is_file():
        return GgufCheckpoint(folder)
    return Checkpoint(folder)
