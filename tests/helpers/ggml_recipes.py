"""Tiny models quantized to ggml's blocks by whole recipes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file

from quantline.calibration.collect import collect_statistics
from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.store import INFO, CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.files import write_json
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.recipes.context import QuantizationContext
from quantline.recipes.quantize import quantize_model
from tests.helpers.gguf import file_of, write_unquantized
from tests.helpers.quantized import tokens_of


class CalibratedModel(NamedTuple):
    """A model with its calibration.

    Attributes:
        source: The model.
        calibration: Its statistics.
        file: The model as a GGUF file in 32 bits; None if it was not asked for.
    """

    source: Checkpoint
    calibration: CalibrationStore
    file: Path | None = None


def calibrated_model(
    folder: Path,
    model: Path,
    batch: int,
    length: int,
    gradients: bool = False,
    with_file: bool = False,
) -> CalibratedModel:
    """Calibrate a model on random tokens [batch, length], below a folder."""
    source = Checkpoint(model)
    tokens = tokens_of(source, batch, length)
    calibration = folder / "calibration"
    calibration.mkdir()
    info = {
        "layers": collect_statistics(source, tokens, calibration, 0 if gradients else None),
        "curvature": gradients,
        "text_sha256": "0" * 64,
        "tokens": int(tokens.size),
        "seed": 0,
        "text": "a/text.txt",
        "sequences": batch,
        "length": length,
    }
    save_file({"tokens": tokens}, calibration / TOKENS)
    write_json(calibration / INFO, info)
    file = None
    if with_file:
        file = file_of(write_unquantized(folder / "plain", model, "float32").bundle)
    return CalibratedModel(source, CalibrationStore(calibration), file)


def kquant(mix: str, **options: Any) -> dict[str, Any]:
    """Return a recipe of llama.cpp's own quantization."""
    return {"method": "kquant", "mix": mix, **options}


def kquant_curvature(mix: str, **options: Any) -> dict[str, Any]:
    """Return a recipe of curvature rounding in ggml's blocks."""
    return {"method": "kquant-curvature", "mix": mix, **options}


def quantize_by(recipe: dict[str, Any], model: CalibratedModel, folder: Path) -> QuantizedModel:
    """Quantize a model by a recipe into a new folder."""
    folder.mkdir()
    quantize_model("r", parse_recipe(recipe), model.source, model.calibration, folder)
    return QuantizedModel(folder)


def context_of(
    recipe: dict[str, Any], source: Checkpoint, calibration: Any, folder: Path
) -> QuantizationContext:
    """Return a context for a recipe; nothing is written yet."""
    writer = QuantizedWriter(folder)
    return QuantizationContext(parse_recipe(recipe), source, source.arch, calibration, writer)


def values_of(quantized: QuantizedModel, name: str) -> np.ndarray:
    """Return what the blocks of a tensor stand for, float32 of its shape."""
    blocks = quantized.ggml_blocks(name)
    if blocks.type == "F32":
        return blocks.data.view(np.float32).reshape(blocks.shape)
    return dequantize_blocks(blocks.data, blocks.type).reshape(blocks.shape)


def with_blocks_as_floats(quantized: QuantizedModel, folder: Path) -> QuantizedModel:
    """Return a store in a new folder with the values of the blocks, which torch_model takes."""
    folder.mkdir()
    writer = QuantizedWriter(folder)
    for name in quantized.ggml_names:
        writer.add_override(name, values_of(quantized, name))
    writer.close({})
    return QuantizedModel(folder)


def importance_in(file: Path) -> dict[str, np.ndarray]:
    """Return an importance matrix as llama-quantize reads it (tools/quantize/quantize.cpp)."""
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}
    importance = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            counts = tensors[name.replace(".in_sum2", ".counts")].reshape(-1, 1)
            importance[name.removesuffix(".in_sum2")] = sums / counts
    return importance


def tensors_in(file: Path) -> dict[str, Any]:
    """Return name → tensor of a GGUF file."""
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def assert_same_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that two files hold the same tensors, byte for byte."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        bytes_of_ours = np.asarray(ours[name].data).view(np.uint8)
        bytes_of_theirs = np.asarray(tensor.data).view(np.uint8)
        assert np.array_equal(bytes_of_ours, bytes_of_theirs), name
