"""One tensor of a GGUF file: its type, its bytes, and the values that it stands for."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from quantline.config.variants import Variant
from quantline.errors import Failure, StageError
from quantline.formats.bundle.unquantized import unquantized_values
from quantline.formats.gguf.architectures import dimensions, norm_offset, row_order
from quantline.model.dtypes import STORED_NAMES
from quantline.model.family import ROUTER
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel

FULL_PRECISION_PARTS = ("position_embd", ROUTER)  # llama.cpp wants these in F32


def float_type_of(source: TensorSource, variant: Variant) -> str:
    """Return the type of matrices that are not quantized: the variant's, else the checkpoint's."""
    if variant.dtype:
        return STORED_NAMES[variant.dtype]
    return source.stored_dtype(source.arch.embedding)


def type_of_tensor(
    source: TensorSource,
    quantized: QuantizedModel,
    gguf_name: str,
    names: list[str],
    float_type: str,
) -> str:
    """Return the type of a tensor of the file.

    It is that of its blocks; else the float type for matrices, and F32 for all else.
    """
    if names[0] in quantized.ggml_names:
        return quantized.ggml_blocks(names[0]).type
    is_matrix = dimensions(source, names) > 1 and gguf_name.endswith("weight")
    full_precision = any(part in gguf_name for part in FULL_PRECISION_PARTS)
    if is_matrix and not full_precision and not source.keeps_float32(names[0]):
        return float_type
    return "F32"


def bytes_of_tensor(
    source: TensorSource, quantized: QuantizedModel, name: str, type_name: str
) -> np.ndarray:
    """Return a tensor as uint8 [rows, bytes per row], with rows in the order of the file."""
    arch = source.arch
    rows = source.shape(name)[0]
    offset = norm_offset(arch, name)
    # Gemma's norms are F32 blocks without the offset that the file adds.
    if name in quantized.ggml_names and not offset:
        data = quantized.ggml_blocks(name).data
    else:
        data = _floats(values_of_tensor(source, quantized, name) + offset, type_name)
    data = data.reshape(rows, -1)
    order = row_order(arch, name, rows)
    return np.ascontiguousarray(data if order is None else data[order])


def values_of_tensor(source: TensorSource, quantized: QuantizedModel, name: str) -> np.ndarray:
    """Return the values of a tensor, float32: of its blocks, or else those that stay in floats."""
    if name not in quantized.ggml_names:
        return unquantized_values(source, quantized, name)
    blocks = quantized.ggml_blocks(name)
    values = gguf.quants.dequantize(blocks.data, GGMLQuantizationType[blocks.type])
    return values.reshape(blocks.shape)


def _floats(tensor: np.ndarray, type_name: str) -> np.ndarray:
    """Return float32 values as the bytes of F32, F16 or BF16: uint8 [..., bytes per row].

    Raises:
        StageError: non_finite, also for what F16 does not hold.
    """
    if not np.isfinite(tensor).all():
        raise StageError(
            Failure.NON_FINITE, "expected finite weights, found NaN or infinity; run load again"
        )
    with np.errstate(over="ignore"):  # what float16 does not hold becomes infinite
        data = gguf.quants.quantize(tensor, GGMLQuantizationType[type_name])
    data = np.ascontiguousarray(data).view(np.uint8)
    if type_name == "F16" and not np.isfinite(data.view(np.float16)).all():
        raise StageError(
            Failure.NON_FINITE,
            "expected weights that float16 holds, found larger ones; take bfloat16",
        )
    return data


def read_tensor(
    source: TensorSource, name: str, data: np.ndarray, ggml_type: GGMLQuantizationType
) -> np.ndarray:
    """Return a tensor of a file as the source has it: float32, its rows in the source's order.

    Args:
        source: The unquantized model.
        name: The source's name for the tensor.
        data: The bytes of the file; of an expert its part of them.
        ggml_type: Their type.
    """
    arch = source.arch
    values = gguf.quants.dequantize(data, ggml_type)
    values = values.reshape(source.shape(name)).astype(np.float32)
    order = row_order(arch, name, len(values))
    if order is not None:
        values = values[np.argsort(order)]
    return values - norm_offset(arch, name)
