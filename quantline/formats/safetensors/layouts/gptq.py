"""The layout of the GPTQ family (quant_method gptq), which GPTQModel, vLLM and others load.

Per layer, with W = (integers - zeros) * scales transposed to [in, out]: `qweight` int32, a stream of bits along the
inputs, lowest first; `qzeros` int32, the same along the outputs; `scales` float16 [groups, out]; `g_idx` int32 [in].
Checkpoint format `gptq`, which every loader knows, stores zeros - 1; that has no place for a zero point of 0, so that
asymmetric layers are in `gptq_v2`, which stores them as they are.
"""

import numpy as np

from quantline.quantized.store import GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.formats.safetensors.layouts.layout import Scheme, one_scheme
from quantline.errors import Failure, StageError

BITS = (2, 3, 4, 8)
OLDER, NEWER = "gptq", "gptq_v2"


def parts(module: str) -> list[str]:
    """The tensors of a layer; the first is always there."""
    return [f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, columns] → int32 [n * bits / 32, columns]: a stream of bits down each column, lowest first."""
    stream = np.unpackbits(values[:, None, :], axis=1, bitorder="little", count=bits)
    words = stream.reshape(-1, 32, values.shape[1])
    return np.ascontiguousarray(np.packbits(words, axis=1, bitorder="little").swapaxes(1, 2)).view("<i4")[..., 0]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [n, columns]."""
    octets = np.ascontiguousarray(words[..., None]).view(np.uint8).swapaxes(1, 2)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(-1, bits, words.shape[1])
    return np.packbits(stream, axis=1, bitorder="little")[:, 0]


def check_packable(module: str, length: int, bits: int) -> None:
    """Raise StageError(unsupported_width) unless `length` values of `bits` fill whole words of 32 bits."""
    if length * bits % 32:
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"{module} has a side of {length}, whose {bits}-bit values do not "
                                                    "fill whole 32-bit words; use layout: compressed-tensors")


def half(module: str, scales: np.ndarray) -> np.ndarray:
    """The scales as float16. Raises StageError(readback_mismatch) where that would change them."""
    found = scales.astype(np.float16)
    if not np.array_equal(found.astype(np.float32), scales):
        raise StageError(Failure.READBACK_MISMATCH, f"expected scales of {module} that float16 holds, found "
                         f"{scales[found.astype(np.float32) != scales].flat[0]:.4g}; use layout: compressed-tensors")
    return found


def tensors(module: str, linear: GroupedLinear, dtype: type) -> dict[str, np.ndarray]:
    """A layer's tensors. Raises StageError: unsupported_width, readback_mismatch."""
    for length in linear.integers.shape:
        check_packable(module, length, linear.bits)
    qweight, qzeros, scales, g_idx = parts(module)
    zeros = linear.zeros - np.uint8(linear.symmetric)
    return {qweight: pack(linear.integers.T, linear.bits), qzeros: pack(zeros, linear.bits).T.copy(),
            scales: half(module, linear.scales).T.copy(),
            g_idx: (np.arange(linear.integers.shape[1]) // linear.group_size).astype(np.int32)}


def config(schemes: dict[Scheme, list[str]], kept: list[str]) -> dict:
    """The quantization_config. Raises StageError(unsupported_width) if the layers do not share one scheme."""
    kind, symmetric, size = one_scheme(schemes)
    return {"quant_method": "gptq", "bits": int(kind.removeprefix("int")), "group_size": -1 if size is None else size, "sym": symmetric,
            "desc_act": False, "checkpoint_format": OLDER if symmetric else NEWER, "lm_head": False}


def kind(config: dict, module: str) -> str:
    """What a weight is stored as by a quantization_config."""
    return f"int{config['bits']}"


def shape_of(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(out, in) of a stored layer."""
    return checkpoint.shape(f"{module}.qweight")[1], checkpoint.shape(f"{module}.g_idx")[0]


def dequantize(checkpoint: Checkpoint, module: str, config: dict) -> np.ndarray:
    """The weight float32 [out, in] that a stored layer stands for."""
    qweight, qzeros, scales, g_idx = (checkpoint.raw(part) for part in parts(module))
    zeros = unpack(qzeros.T, config["bits"]).astype(np.float32) + (config["checkpoint_format"] == OLDER)
    integers = unpack(qweight, config["bits"]).astype(np.float32)
    return ((integers - zeros.T[g_idx]) * scales.astype(np.float32)[g_idx]).T
