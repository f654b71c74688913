"""GGUF, written tensor by tensor with the gguf package.

There is no 16-bit file in between, but for models that quantline has no table for: llama.cpp's
converter makes it.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from quantline.config.variants import Variant
from quantline.errors import Failure, StageError
from quantline.files import MIB, read_json
from quantline.formats.container import Container, StoredTensor
from quantline.formats.gguf.architectures import (
    gguf_family,
    gguf_names,
    group_by_gguf_name,
    is_stacked,
    norm_offset,
)
from quantline.formats.gguf.modelfile import modelfile
from quantline.formats.gguf.naming import names_of, write_metadata
from quantline.formats.gguf.rope import Rope
from quantline.formats.gguf.serve import serve_text
from quantline.formats.gguf.settings import limits, write_settings
from quantline.formats.gguf.source import MANIFEST, source_for_gguf
from quantline.formats.gguf.special_tokens import keys_of_more_ends, metadata_of_fields
from quantline.formats.gguf.tensors import (
    bytes_of_tensor,
    float_type_of,
    read_tensor,
    type_of_tensor,
    values_of_tensor,
)
from quantline.formats.gguf.vocabulary import write_vocabulary
from quantline.links import clone_or_copy
from quantline.model.gguf_checkpoint import GgufCheckpoint
from quantline.model.gguf_files import MODELFILE, model_file, model_files, projector_files
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel
from quantline.run.progress import progress
from quantline.text.tokenizer import Tokenizer

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# Of a model that nobody looked at, such as one that an older release loaded.
UNKNOWN_FORM = {"reason": "the model's manifest does not say how its chats are written"}
SETTING_BYTES = 128  # of a setting that is found when a converter's file is tried


class GgufContainer(Container[TensorSource]):
    """GGUF, made of a checkpoint or of the file that a converter made of one."""

    def open_source(self, model: Path) -> TensorSource:
        """Open the checkpoint, or the converter's file of it (see source.py)."""
        return source_for_gguf(model)

    def write(
        self, source: TensorSource, quantized: QuantizedModel, folder: Path, variant: Variant
    ) -> dict[str, str]:
        """Write <Model>-<Size>-Q4_K_M.gguf, or with split_max_mib …-00001-of-0000N.gguf and so on.

        Beside them lie Ollama's Modelfile, and what makes tokens of images and sound, where the
        converter has made it. One tensor is in memory at a time.

        Returns:
            Source tensor → the type that was asked for.

        Raises:
            StageError: unsupported_architecture, tokenizer_mismatch, non_finite,
                unsupported_width.
        """
        groups = group_by_gguf_name(gguf_names(source))
        float_type = float_type_of(source, variant)
        split_bytes = (variant.split_max_mib or 0) * MIB
        names_of_files = names_of(source)
        path = folder / names_of_files.file(encoding_of(quantized.report, float_type))
        metadata = names_of_files.metadata
        writer, rope = _open_writer(
            source, quantized.report, path, float_type, metadata, split_bytes
        )
        types = {}
        for gguf_name, names in groups.items():
            types[gguf_name] = type_of_tensor(source, quantized, gguf_name, names, float_type)
            _add_tensor_info(writer, source, gguf_name, names, types[gguf_name])
        _write_header(writer, rope)
        for gguf_name, names in progress(groups.items(), "writing", "tensor"):
            parts = [bytes_of_tensor(source, quantized, name, types[gguf_name]) for name in names]
            writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))
        for values in rope.tensors.values():
            writer.write_tensor_data(values)
        writer.close()
        if isinstance(source, GgufCheckpoint) and source.projector is not None:
            clone_or_copy(source.projector, folder / names_of_files.projector)
        tensor_reports = quantized.report.get("tensors", {})
        requested = {}
        for gguf_name, names in groups.items():
            for name in names:
                requested[name] = types[gguf_name]
                if name in quantized.ggml_names:
                    requested[name] = tensor_reports[name]["requested"]
        return requested

    def read_back(self, folder: Path, source: TensorSource) -> dict[str, StoredTensor]:
        """Return what the file or files hold, with rows in the source's order."""
        tensors = {}
        for path in model_files(folder):
            for read in gguf.GGUFReader(path).tensors:
                tensors[read.name] = read
        stored = {}
        for gguf_name, names in group_by_gguf_name(gguf_names(source)).items():
            tensor = tensors.get(gguf_name)
            if tensor is None:
                continue
            shape = tuple(int(size) for size in reversed(tensor.shape))
            stacked = is_stacked(names)
            if stacked and shape[0] != len(names):
                continue
            for number, name in enumerate(names):
                data = tensor.data[number] if stacked else tensor.data
                stored[name] = StoredTensor(
                    tensor.tensor_type.name,
                    shape[1:] if stacked else shape,
                    int(tensor.n_bytes) // len(names),
                    partial(read_tensor, source, name, data, tensor.tensor_type),
                )
        return stored

    def expected(
        self, source: TensorSource, quantized: QuantizedModel, name: str, stored_type: str
    ) -> np.ndarray:
        """Return the values, float32, that a tensor stored as `stored_type` has to have."""
        values = values_of_tensor(source, quantized, name)
        offset = norm_offset(source.arch, name)
        # Gemma's norms are F32 blocks without the offset that the file adds.
        if name in quantized.ggml_names and not offset:
            return values
        ggml_type = GGMLQuantizationType[stored_type]
        data = gguf.quants.quantize(values + offset, ggml_type)
        return gguf.quants.dequantize(data, ggml_type) - offset

    def serve(self, manifest: dict[str, Any]) -> str:
        """Return the section "## Serve it" of a bundle's README."""
        return serve_text(manifest)

    def limits(self, source: TensorSource) -> list[str]:
        """Say where llama.cpp computes another model (see Container)."""
        return limits(source)

    def tokenizer_metadata(self, folder: Path) -> dict[str, Any]:
        """Return what the file says of its tokenizer (see Container)."""
        return metadata_of_fields(gguf.GGUFReader(model_files(folder)[0]).fields)

    def texts(self, model: Path, folder: Path) -> dict[str, str]:
        """Return Ollama's Modelfile; Ollama takes no model in several files (see Container)."""
        if len(model_files(folder)) > 1:
            return {}
        names = sorted(path.name for path in folder.iterdir())
        manifest = model / MANIFEST
        loaded = read_json(manifest) if manifest.is_file() else {}
        form = loaded.get("chat_form", UNKNOWN_FORM)
        text = modelfile(model_file(names), projector_files(names), form, Tokenizer(model))
        return {MODELFILE: text}


def header_bytes(source: TensorSource, report: dict[str, Any]) -> int:
    """Return an upper bound of a file's bytes that are not weights.

    They are metadata, vocabulary, tensor infos and rope tensors. Tensor types do not change it.

    Args:
        source: The unquantized model.
        report: As quantized.json: recipe, calibration, and importance where there is one.

    Returns:
        The bytes, at most ALIGNMENT more than a file has.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer, rope = _open_writer(source, report, path, "F32", names_of(source).metadata)
        for gguf_name, names in group_by_gguf_name(gguf_names(source)).items():
            _add_tensor_info(writer, source, gguf_name, names, "F32")
        _write_header(writer, rope)
        writer.close()
        size = path.stat().st_size + ALIGNMENT
    if source.converted:
        size += SETTING_BYTES
    return size + sum(padded_size(values.nbytes) for values in rope.tensors.values())


def padded_size(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _open_writer(
    source: TensorSource,
    report: dict[str, Any],
    path: Path,
    float_type: str,
    metadata: gguf.Metadata,
    split_bytes: int = 0,
) -> tuple[gguf.GGUFWriter, Rope]:
    """Return a writer that has all metadata, and the rotary embedding.

    Args:
        source: The unquantized model.
        report: As quantized.json.
        path: Of the file.
        float_type: Type of the matrices that are not quantized.
        metadata: What the file says of its model.
        split_bytes: Size of one file at most; 0 for no limit.
    """
    writer = gguf.GGUFWriter(path, gguf_family(source.arch).name, split_max_size=split_bytes)
    rope = write_settings(writer, source)
    _write_provenance(writer, report, float_type)
    tokenizer = Tokenizer(source.folder)
    write_metadata(writer, metadata, tokenizer)
    if isinstance(source, GgufCheckpoint):  # its file has the tokenizer among its settings
        for key, token_id in keys_of_more_ends(tokenizer).items():
            if key not in source.fields:
                writer.add_uint32(key, token_id)
    else:
        write_vocabulary(writer, tokenizer, source.shape(source.arch.embedding)[0])
    return writer, rope


def encoding_of(report: dict[str, Any], float_type: str) -> str:
    """Return llama.cpp's name of a file's types: that of the recipe's mix, or of its floats."""
    return str(report["recipe"].get("mix", float_type))


def _write_provenance(writer: gguf.GGUFWriter, report: dict[str, Any], float_type: str) -> None:
    """Write how the file was made: llama.cpp's own keys, and the recipe and the calibration."""
    recipe = report["recipe"]
    importance = report.get("importance")
    mix = encoding_of(report, float_type)
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


def _write_header(writer: gguf.GGUFWriter, rope: Rope) -> None:
    """Write metadata and tensor infos; those of the rope tensors come last."""
    for name, values in rope.tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add_tensor_info(
    writer: gguf.GGUFWriter, source: TensorSource, gguf_name: str, names: list[str], type_name: str
) -> None:
    """Describe a tensor of the file, which consists of the source's `names`.

    Raises:
        StageError: unsupported_width, if the type's blocks do not divide its rows.
    """
    shape = source.shape(names[0])
    ggml_type = GGMLQuantizationType[type_name]
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block_size:
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            f"expected rows of {names[0]} that {block_size} divides for {type_name}, found "
            f"{shape[-1]}; quantize again",
        )
    byte_shape = (*shape[:-1], shape[-1] // block_size * block_bytes)
    if is_stacked(names):
        byte_shape = (len(names), *byte_shape)
    size = int(np.prod(byte_shape))
    writer.add_tensor_info(gguf_name, byte_shape, np.dtype(np.uint8), size, raw_dtype=ggml_type)
