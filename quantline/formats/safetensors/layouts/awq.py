"""The layout of AutoAWQ's GEMM kernels (quant_method awq), which transformers, vLLM and others load: four bits only.

Per layer, with W = (integers - zeros) * scales transposed to [in, out]: `qweight` int32 [in, out / 8] and `qzeros` int32
[groups, out / 8] hold eight neighbouring outputs a word, in the order 0 2 4 6 1 3 5 7; `scales` float16 [groups, out].
"""

import numpy as np

from quantline.quantized.store import GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.formats.safetensors.layouts.layout import Scheme, one_scheme
from quantline.formats.safetensors.layouts.gptq import check_packable, half
from quantline.errors import Failure, StageError

BITS = (4,)
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which of the eight outputs comes next in a word


def parts(module: str) -> list[str]:
    """The tensors of a layer; the first is always there."""
    return [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]


def pack(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] in 0 … 15 → int32 [rows, n / 8]."""
    nibbles = values.reshape(len(values), -1, 8)[:, :, ORDER]
    octets = nibbles[:, :, ::2] | nibbles[:, :, 1::2] << np.uint8(4)
    return np.ascontiguousarray(octets).view("<i4")[..., 0]


def unpack(words: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: uint8 [rows, n]."""
    octets = np.ascontiguousarray(words[..., None]).view(np.uint8)
    nibbles = np.stack([octets & 15, octets >> 4], -1).reshape(*words.shape, 8)
    return nibbles[:, :, np.argsort(ORDER)].reshape(len(words), -1)


def tensors(module: str, linear: GroupedLinear, dtype: type) -> dict[str, np.ndarray]:
    """A layer's tensors. Raises StageError: unsupported_width (also for other bits than 4), readback_mismatch."""
    if linear.bits not in BITS:
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"expected 4 bits for the AWQ layout, found {linear.bits} in {module}; "
                                                    "use layout: compressed-tensors")
    check_packable(module, len(linear.integers), linear.bits)
    qweight, qzeros, scales = parts(module)
    return {qweight: pack(linear.integers.T), qzeros: pack(linear.zeros.T),
            scales: half(module, linear.scales).T.copy()}


def config(schemes: dict[Scheme, list[str]], kept: list[str]) -> dict:
    """The quantization_config. Raises StageError(unsupported_width) if the layers do not share one scheme."""
    kind, _, size = one_scheme(schemes)
    return {"quant_method": "awq", "bits": int(kind.removeprefix("int")), "group_size": -1 if size is None else size, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": None}


def kind(config: dict, module: str) -> str:
    """What a weight is stored as by a quantization_config."""
    return f"int{config['bits']}"


def shape_of(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(out, in) of a stored layer."""
    inputs, words = checkpoint.shape(f"{module}.qweight")
    return words * 8, inputs


def dequantize(checkpoint: Checkpoint, module: str, config: dict) -> np.ndarray:
    """The weight float32 [out, in] that a stored layer stands for."""
    qweight, qzeros, scales = (checkpoint.raw(part) for part in parts(module))
    group = len(qweight) // len(qzeros)
    zeros, steps = (np.repeat(one.astype(np.float32), group, 0) for one in (unpack(qzeros), scales))
    return ((unpack(qweight).astype(np.float32) - zeros) * steps).T
