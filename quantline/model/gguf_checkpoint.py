"""The GGUF file that a user's converter made of the checkpoint, read as a checkpoint whose names are those of the file.

It lies beside the checkpoint, unquantized. What the calibration says of a layer is found through gguf's own map of
tensor names, and the order of rows, which converters change for llama.cpp's rotary embedding, by the rows themselves.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from quantline.model.architecture import Architecture, architecture
from quantline.model.families import Block, Family
from quantline.model.checkpoint import Checkpoint, stamp

FILE = "converted.gguf"
FLOATS = ("F32", "F16", "BF16")
# Names of llama.cpp instead of those of a family.
IN_FILE = Family(Block({}, ()), blocks="blk",
                 outside={"token_embd": "token_embd", "output_norm": "output_norm", "output": "output"})
REWRITTEN = ("general.architecture", "general.file_type", "general.quantization_version", "general.type")


class Converted:
    """A checkpoint folder with a converter's file in it. `names` are the file's tensors; `facts` are the model's, with
    `model_type` what llama.cpp calls the architecture.
    """

    tied_head = None

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.source, reader = Checkpoint(folder), gguf.GGUFReader(self.folder / FILE)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = sorted(self.tensors)
        self.settings = {name: field for name, field in reader.fields.items()
                         if name not in REWRITTEN and not name.startswith(("GGUF.", "split."))}
        self.name = str(reader.fields["general.architecture"].contents())

    @property
    def config(self) -> dict:
        return self.source.config

    @cached_property
    def facts(self) -> Architecture:
        return replace(architecture(self.source), model_type=self.name, family=IN_FILE,
                       tied="output.weight" not in self.tensors)

    def stamp(self) -> dict[str, list[int]]:
        """As Checkpoint's."""
        return self.source.stamp() | stamp([self.folder / FILE])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def stored_dtype(self, name: str) -> str:
        """The dtype of the checkpoint's matrices: the file's own, save of what llama.cpp wants in full precision."""
        return self.source.stored_dtype(architecture(self.source).embedding)

    def whole(self, name: str) -> bool:
        """Whether the converter kept a tensor in full precision though the checkpoint is in half."""
        return self.tensors[name].tensor_type.name == "F32" != self.stored_dtype(name)

    def raw(self, name: str) -> np.ndarray:
        """The tensor in the dtype that it is stored in."""
        data, kind = self.tensors[name].data, self.tensors[name].tensor_type.name
        return (data.view(ml_dtypes.bfloat16) if kind == "BF16" else data).reshape(self.shape(name))

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in float32."""
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name)).astype(np.float32)

    def add_settings(self, writer: gguf.GGUFWriter) -> None:
        """Write what the file says of the model and of its tokenizer."""
        for name, field in self.settings.items():
            more = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=more)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Tensor of the file → that of the checkpoint which gguf's map of the architecture's names says it is."""
        kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name), None)
        names = gguf.get_tensor_name_map(kind, self.facts.layers) if kind is not None else None
        ours = self.source.names if names else []
        found = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in ours}
        return {there: name for there, name in found.items() if there in self.tensors}

    def layer(self, name: str) -> str | None:
        """The module of the checkpoint whose weight a tensor of the file is; None if that is not known."""
        source = self.sources.get(name, "")
        return source.removesuffix(".weight") if source.endswith(".weight") else None

    def row_order(self, name: str) -> np.ndarray | None:
        """The rows of the checkpoint's tensor in the order of the file, int [rows]; None if they are not the same rows."""
        ours, theirs = self.tensor(name), self.source.tensor(self.sources[name])
        if ours.shape != theirs.shape:
            return None
        places: dict[bytes, list[int]] = {}
        for number, row in reversed(list(enumerate(theirs))):
            places.setdefault(row.tobytes(), []).append(number)
        order = [places[key].pop() if places.get(key := row.tobytes()) else -1 for row in ours]
        return None if -1 in order else np.array(order)


def in_gguf(folder: Path | str) -> Checkpoint | Converted:
    """What a GGUF file is made of: the converter's file if there is one in a checkpoint's folder, or the checkpoint."""
    return Converted(folder) if (Path(folder) / FILE).is_file() else Checkpoint(folder)


