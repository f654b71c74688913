"""The GGUF file that a converter made of a checkpoint, read with the names of the file.

It lies beside the checkpoint's folder, unquantized, with a note of which layer each of its tensors
came from (formats/gguf/converter/origins.py). The order of its rows, which converters change for
llama.cpp's rotary embedding, is found by the rows themselves.

The experts of a block lie in one tensor, [experts, out, in]. Here each is a tensor of its own, as
in checkpoints: blk.0.ffn_up_exps.weight is blk.0.experts.0.ffn_up_exps.weight and so on.
"""

import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from quantline.errors import Failure, StageError
from quantline.files import read_json, stamp
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import Block, Family, GgufFamily

FILE = "converted.gguf"
PROJECTOR = "mmproj.gguf"  # what a wrapper has beside its text model
NOTE = "conversion.json"
CHECKED = "logits.json"  # how the file's logits differ from the checkpoint's
STACKED = re.compile(r"(blk\.\d+\.)(\w*exps\w*\.weight)")
# What the file says of itself rather than of the model's computation; quantline writes it anew.
GENERAL = "general."
SAMPLING = "general.sampling."  # how the model's authors want it to be asked


class Part(NamedTuple):
    """A tensor of the file, or one expert's part of it.

    Attributes:
        tensor: Its name in the file.
        number: Of the expert; None for the whole.
    """

    tensor: str
    number: int | None = None


def _is_rewritten(key: str) -> bool:
    """Whether quantline writes a setting anew instead of copying it."""
    return key.startswith(GENERAL) and not key.startswith(SAMPLING)


def conversion_folder(folder: Path | str) -> Path:
    """Return where the converter's file of a checkpoint's folder lies: beside it."""
    path = Path(folder)
    return path.with_name(f"{path.name}-gguf")


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
    """A checkpoint's folder with a converter's file beside it, as a TensorSource."""

    converted = True
    passed: tuple[str, ...] = ()
    tied_head: str | None = None

    def __init__(self, folder: Path | str, converted: Path | None = None) -> None:
        """Read the header of the file.

        Args:
            folder: The checkpoint.
            converted: The folder of the converter's file, where it is not `conversion_folder`.
        """
        self.folder = Path(folder)
        self.converted_folder = converted or conversion_folder(folder)
        self.checkpoint = Checkpoint(folder)
        reader = _open(self.converted_folder / FILE)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.parts: dict[str, Part] = {}
        for name, tensor in self.tensors.items():
            stacked = STACKED.fullmatch(name)
            if stacked is None or len(tensor.shape) != 3:
                self.parts[name] = Part(name)
                continue
            for number in range(int(tensor.shape[2])):
                self.parts[f"{stacked[1]}experts.{number}.{stacked[2]}"] = Part(name, number)
        self.names = sorted(self.parts)
        self.fields = {
            name: field
            for name, field in reader.fields.items()
            if not name.startswith(("GGUF.", "split.")) and not _is_rewritten(name)
        }
        self.architecture_name = str(reader.fields["general.architecture"].contents())

    @cached_property
    def note(self) -> dict[str, Any]:
        """What was written down when the file was made; empty where nothing was."""
        path = self.converted_folder / NOTE
        return read_json(path) if path.is_file() else {}

    @property
    def path(self) -> Path:
        """The converter's file."""
        return self.converted_folder / FILE

    @property
    def figures(self) -> Path:
        """The file that says how the logits differ from the checkpoint's, once that is known."""
        return self.converted_folder / CHECKED

    @property
    def step(self) -> dict[str, Any]:
        """How the file was made and checked, for a manifest's transforms."""
        checked = {"logits": read_json(self.figures)} if self.figures.is_file() else {}
        return self.note["step"] | checked

    @property
    def projector(self) -> Path | None:
        """The file of what a wrapper has beside its text model, if there is one."""
        path = self.converted_folder / PROJECTOR
        return path if path.is_file() else None

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
            heads=self._number("attention.head_count"),
            kv_heads=self._number("attention.head_count_kv"),
            experts=self._number("expert_count"),
            structure=None,
        )

    def _number(self, key: str) -> int:
        """Return what the file says of the first block; 0 where it says nothing."""
        field = self.fields.get(f"{self.architecture_name}.{key}")
        return int(np.ravel(field.contents())[0]) if field else 0

    def stamp(self) -> dict[str, list[int]]:
        """Return size and time of change of the checkpoint's files and of the converter's."""
        return self.checkpoint.stamp() | stamp([self.path])

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        """Return the tensor of the file that a name belongs to."""
        return self.tensors[self.parts[name].tensor]

    def _data(self, name: str) -> np.ndarray:
        """Return the values of a tensor, or of an expert's part of it, as the file has them."""
        number = self.parts[name].number
        data = self._tensor(name).data
        return data if number is None else data[number]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a weight [out, in]."""
        shape = tuple(int(size) for size in reversed(self._tensor(name).shape))
        return shape if self.parts[name].number is None else shape[1:]

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of the checkpoint's matrices, which is that of the file's."""
        return self.checkpoint.stored_dtype(self.checkpoint.arch.embedding)

    def stored_type(self, name: str) -> str:
        """Return ggml's name of the type that a tensor has in the file."""
        return self._tensor(name).tensor_type.name

    def keeps_float32(self, name: str) -> bool:
        """Whether the converter kept a tensor in float32 though the checkpoint is in half."""
        return self.stored_type(name) == "F32" and self.stored_dtype(name) != "F32"

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        data = self._data(name)
        if self.stored_type(name) == "BF16":
            data = data.view(ml_dtypes.bfloat16)
        return data.reshape(self.shape(name))

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in float32."""
        values = gguf.quants.dequantize(self._data(name), self._tensor(name).tensor_type)
        return values.reshape(self.shape(name)).astype(np.float32)

    def optional(self, name: str | None) -> np.ndarray | None:
        """Return a tensor in float32; None where the file has none of that name."""
        return self.tensor(name) if name is not None and name in self.parts else None

    @property
    def settings(self) -> dict[str, float]:
        """Key → a number that config.json does not say, as the comparison of logits found it."""
        return read_json(self.figures).get("settings", {}) if self.figures.is_file() else {}

    def write_fields(
        self, writer: gguf.GGUFWriter, settings: dict[str, float] | None = None
    ) -> None:
        """Write what the file says of the model and of its tokenizer.

        Args:
            writer: Of another file.
            settings: In place of those that were found.
        """
        given = self.settings if settings is None else settings
        for name, value in given.items():
            if isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, value)
        for name, field in self.fields.items():
            if name in given:
                continue
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            item_type = field.types[-1] if is_array else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item_type)

    def write_copy(self, path: Path, settings: dict[str, float], widened: bool) -> None:
        """Write the file again, one tensor at a time.

        Args:
            path: Of the copy.
            settings: As `write_fields` takes them.
            widened: Whether all tensors become float32.
        """
        writer = gguf.GGUFWriter(path, self.architecture_name)
        self.write_fields(writer, settings)
        full = gguf.GGMLQuantizationType.F32
        for name, tensor in self.tensors.items():
            kind = full if widened else tensor.tensor_type
            shape = tuple(int(size) for size in reversed(tensor.shape))
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            byte_shape = (*shape[:-1], shape[-1] // block_size * block_bytes)
            size = int(np.prod(byte_shape))
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors.values():
            values: np.ndarray = tensor.data
            if widened:
                values = gguf.quants.dequantize(values, tensor.tensor_type).astype(np.float32)
            writer.write_tensor_data(np.ascontiguousarray(values))
        writer.close()

    def layer_of(self, name: str) -> str | None:
        """Return the checkpoint's module whose weight a tensor is; None if that is not known."""
        origin = self.note.get("origins", {}).get(name)
        return origin["layer"] if origin else None

    def has_rows_of_layer(self, name: str) -> bool:
        """Whether a tensor has the rows of its layer's weight, each once, in whatever order."""
        origin = self.note.get("origins", {}).get(name)
        return bool(origin and origin["whole"])

    def in_order_of(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return values of its layer's inputs, [in], in the order of a tensor's columns."""
        columns = self.note.get("origins", {}).get(name, {}).get("columns")
        return values if columns is None else values[columns]

    def row_order(self, name: str) -> np.ndarray | None:
        """Return the rows of the checkpoint's tensor in the order of the file, int [rows].

        Raises:
            StageError: unsupported_architecture, if they are not the checkpoint's rows.
        """
        source = f"{self.layer_of(name)}.weight"
        ours = self.tensor(name)
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
