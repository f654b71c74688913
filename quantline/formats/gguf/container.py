"""GGUF, written tensor by tensor with the gguf package: no 16-bit file in between, and no converter but a named one."""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from quantline.model.architecture import Architecture, architecture
from quantline.quantized.store import Quantized
from quantline.model.gguf_checkpoint import Converted
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Variant
from quantline.formats.container import GGUF, StoredTensor
from quantline.formats.gguf.architectures import (
    WHOLE,
    add_settings,
    by_place,
    container_of,
    dimensions,
    offset,
    row_order,
    tensor_names,
)
from quantline.formats.gguf.rope import Rope
from quantline.formats.gguf.vocabulary import add_vocabulary, name_of
from quantline.errors import Failure, StageError

FILE, ALIGNMENT = "model.gguf", gguf.GGUF_DEFAULT_ALIGNMENT
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def add_provenance(writer: gguf.GGUFWriter, report: dict, plain: str) -> None:
    """What the file says of its making: llama.cpp's own keys, and the whole recipe and calibration."""
    recipe, importance = report["recipe"], report.get("importance")
    mix = recipe.get("mix", plain)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType["ALL_F32" if mix == "F32" else f"MOSTLY_{mix}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if importance:
        writer.add_string("quantize.imatrix.file", importance["file"])
        writer.add_string("quantize.imatrix.dataset", importance["dataset"])
        writer.add_uint32("quantize.imatrix.entries_count", importance["entries"])
        writer.add_uint32("quantize.imatrix.chunks_count", importance["chunks"])
    writer.add_string("quantline.recipe", json.dumps(recipe, sort_keys=True))
    writer.add_string("quantline.calibration", json.dumps(report["calibration"], sort_keys=True))


def begin(model: Checkpoint | Converted, facts: Architecture, report: dict, path: Path, plain: str,
          largest: int = 0) -> tuple[gguf.GGUFWriter, Rope]:
    """(a writer that is told all but the tensors, the rotary settings), for files of at most `largest` bytes."""
    writer = gguf.GGUFWriter(path, container_of(facts).name, split_max_size=largest)
    rope = add_settings(writer, model, facts)
    add_provenance(writer, report, plain)
    if not isinstance(model, Converted):  # whose settings have both already
        writer.add_name(name_of(Tokenizer(model.folder), report["recipe"]["name"]))
        add_vocabulary(writer, Tokenizer(model.folder), model.shape(facts.embedding)[0])
    return writer, rope


def header_bytes(model: Checkpoint | Converted, report: dict) -> int:
    """The bytes of one file with the model that are no weights, whatever types those have: up to `ALIGNMENT` more than is
    needed. `report` is as quantized.json: recipe, calibration, and importance where there is one.
    """
    facts = architecture(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        writer, rope = begin(model, facts, report, path, "F32")
        for place, names in by_place(tensor_names(model, facts)).items():
            shape = model.shape(names[0])
            whole = (len(names), *shape) if dimensions(model, names) > len(shape) else shape
            writer.add_tensor_info(place, whole, np.dtype(np.float32), 4 * int(np.prod(whole)))
        for place, values in rope.tensors.items():
            writer.add_tensor_info(place, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.stat().st_size + ALIGNMENT + sum(padded(values.nbytes) for values in rope.tensors.values())


def padded(size: int) -> int:
    """The bytes that a tensor of `size` bytes takes in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def kind_of(quantized: Quantized, name: str, place: str, many: int, plain: str) -> str:
    """The type of a tensor in the file: that of its blocks, or the plain one for matrices and F32 for all else."""
    if name in quantized.blocks_names:
        return quantized.blocks(name)[0]
    return plain if many > 1 and place.endswith("weight") and not any(part in place for part in WHOLE) else "F32"


def write(model: Checkpoint | Converted, quantized: Quantized, folder: Path, variant: Variant) -> dict[str, str]:
    """Write model.gguf of a checkpoint or of a converter's file, or with `split_max_mib` model-00001-of-0000N.gguf and so
    on; one tensor is in memory at a time.

    Returns source tensor name → requested type.

    Raises StageError: unsupported_architecture, tokenizer_mismatch, non_finite, unsupported_width.
    """
    facts = architecture(model)
    places = by_place(tensor_names(model, facts))
    plain = FLOATS[variant.dtype] if variant.dtype else model.stored_dtype(facts.embedding)
    writer, rope = begin(model, facts, quantized.report, folder / FILE, plain, (variant.split_max_mib or 0) * 2**20)
    kinds = {}
    for place, names in places.items():
        many, shape = dimensions(model, names), model.shape(names[0])
        kind = "F32" if isinstance(model, Converted) and model.whole(place) else plain
        kinds[place] = kind = kind_of(quantized, names[0], place, many, kind)
        kind_id = GGMLQuantizationType[kind]
        block, block_bytes = GGML_QUANT_SIZES[kind_id]
        if shape[-1] % block:
            raise StageError(Failure.UNSUPPORTED_WIDTH, f"expected rows of {names[0]} that {block} divides for {kind}, "
                                                        f"found {shape[-1]}; quantize again")
        row_bytes = (*shape[:-1], shape[-1] // block * block_bytes)
        whole = (len(names), *row_bytes) if many > len(shape) else row_bytes
        writer.add_tensor_info(place, whole, np.dtype(np.uint8), int(np.prod(whole)), raw_dtype=kind_id)
    for place, values in rope.tensors.items():
        writer.add_tensor_info(place, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for place, names in places.items():
        parts = [_in_file(model, quantized, facts, name, kinds[place]) for name in names]
        writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))
    for values in rope.tensors.values():
        writer.write_tensor_data(values)
    writer.close()
    tensors = quantized.report.get("tensors", {})
    return {name: tensors[name]["requested"] if name in quantized.blocks_names else kinds[place]
            for place, names in places.items() for name in names}


def _in_file(model: Checkpoint | Converted, quantized: Quantized, facts: Architecture, name: str, kind: str) -> np.ndarray:
    """A tensor's bytes uint8 [..., bytes per row], in the order of the file."""
    shape = model.shape(name)
    if name in quantized.blocks_names and not offset(facts, name):
        data = quantized.blocks(name)[1]
    else:
        data = _floats(_values(model, quantized, name) + offset(facts, name), kind)
    order = row_order(facts, name, shape[0])
    data = data.reshape(shape[0], -1)
    return np.ascontiguousarray(data if order is None else data[order])


def _values(model: Checkpoint, quantized: Quantized, name: str) -> np.ndarray:
    """A tensor that stays in floats, float32: the source's, or what the recipe put in its place."""
    if name not in quantized.blocks_names:
        return model.tensor(name)
    kind, data, shape = quantized.blocks(name)
    return gguf.quants.dequantize(data, GGMLQuantizationType[kind]).reshape(shape)


def _floats(tensor: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as the bytes of F32, F16 or BF16: uint8 [..., bytes per row]."""
    if not np.isfinite(tensor).all():
        raise StageError(Failure.NON_FINITE, "expected finite weights, found NaN or infinity; run load again")
    with np.errstate(over="ignore"):  # what float16 does not hold becomes infinite, and is refused
        data = np.ascontiguousarray(gguf.quants.quantize(tensor, GGMLQuantizationType[kind])).view(np.uint8)
    if kind == "F16" and not np.isfinite(data.view(np.float16)).all():
        raise StageError(Failure.NON_FINITE, "expected weights that float16 holds, found larger ones; take bfloat16")
    return data


def read_back(folder: Path, model: Checkpoint | Converted) -> dict[str, StoredTensor]:
    """What the file or files hold, under the source's names and in the source's row order."""
    facts = architecture(model)
    there = {tensor.name: tensor for path in sorted(folder.glob(GGUF)) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for place, names in by_place(tensor_names(model, facts)).items():
        if place not in there:
            continue
        tensor, stacked = there[place], ".experts." in names[0]
        held = tuple(int(size) for size in reversed(tensor.shape))
        if stacked and held[0] != len(names):
            continue
        for number, name in enumerate(names):
            def dequantize(tensor=tensor, name=name, number=number if stacked else ...) -> np.ndarray:
                values = gguf.quants.dequantize(tensor.data[number], tensor.tensor_type)
                values = values.reshape(model.shape(name)).astype(np.float32)
                order = row_order(facts, name, len(values))
                return (values if order is None else values[np.argsort(order)]) - offset(facts, name)

            found[name] = StoredTensor(tensor.tensor_type.name, held[1:] if stacked else held,
                                       int(tensor.n_bytes) // len(names), dequantize)
    return found


def expected(model: Checkpoint | Converted, quantized: Quantized, name: str, kind: str) -> np.ndarray:
    """The values, float32, that a tensor stored as `kind` has to have."""
    more = offset(architecture(model), name)
    if name in quantized.blocks_names and not more:
        return _values(model, quantized, name)
    data = gguf.quants.quantize(_values(model, quantized, name) + more, GGMLQuantizationType[kind])
    return gguf.quants.dequantize(data, GGMLQuantizationType[kind]) - more
