"""The layout of the GPTQ family (quant_method gptq), which GPTQModel, vLLM and others load.

Per layer, with W = (integers - zeros) * scales transposed to [in, out]:

* `qweight` int32: a stream of bits along the inputs, lowest first;
* `qzeros` int32: the same along the outputs;
* `scales` float16 [groups, out];
* `g_idx` int32 [in]: the group of each input.

Checkpoint format `gptq`, which every loader knows, stores zeros - 1. That has no room for a zero
point of 0, so asymmetric layers are in `gptq_v2`, which stores zeros as they are.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.layout import Layout, only_grid
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import GroupedLinear, Scheme

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ZEROS_LESS_ONE = "gptq"
ZEROS_AS_THEY_ARE = "gptq_v2"
WORD_BITS = 32


class Gptq(Layout[GroupedLinear]):
    """2, 3, 4 or 8 bits; all layers share one grid."""

    one_grid: ClassVar[bool] = True

    def part_names(self, module: str) -> list[str]:
        """Return the tensors of a layer; all are always there."""
        return [f"{module}.{part}" for part in PARTS]

    def tensors(
        self, module: str, linear: GroupedLinear, dtype: npt.DTypeLike
    ) -> dict[str, np.ndarray]:
        """Return a layer's tensors (see Layout)."""
        rows, columns = linear.integers.shape
        check_packable(module, rows, linear.bits)
        check_packable(module, columns, linear.bits)
        zeros = linear.zeros - np.uint8(linear.symmetric)
        groups = np.arange(columns) // linear.group_size
        return {
            f"{module}.qweight": pack(linear.integers.T, linear.bits),
            f"{module}.qzeros": pack(zeros, linear.bits).T.copy(),
            f"{module}.scales": to_float16(module, linear.scales).T.copy(),
            f"{module}.g_idx": groups.astype(np.int32),
        }

    def config(
        self,
        schemes: Mapping[Scheme, list[str]],
        unquantized_modules: list[str],
        of_experts: Collection[str] = (),
        of_head: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return the quantization_config (see Layout)."""
        grid = only_grid(schemes)
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": -1 if grid.group_size is None else grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "checkpoint_format": ZEROS_LESS_ONE if grid.symmetric else ZEROS_AS_THEY_ARE,
            "lm_head": False,
        }

    def stored_type(self, config: dict[str, Any], module: str) -> str:
        """Return what a weight is stored as."""
        return f"int{config['bits']}"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int]:
        """Return (out, in) of a stored layer."""
        return checkpoint.shape(f"{module}.qweight")[1], checkpoint.shape(f"{module}.g_idx")[0]

    def dequantize(self, checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> np.ndarray:
        """Return the weight float32 [out, in] that a stored layer stands for."""
        bits = config["bits"]
        integers = unpack(checkpoint.raw(f"{module}.qweight"), bits).astype(np.float32)
        zeros = unpack(checkpoint.raw(f"{module}.qzeros").T, bits).astype(np.float32)
        zeros = zeros + (config["checkpoint_format"] == ZEROS_LESS_ONE)
        scales = checkpoint.raw(f"{module}.scales").astype(np.float32)
        groups = checkpoint.raw(f"{module}.g_idx")
        return ((integers - zeros.T[groups]) * scales[groups]).T


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [n, columns] into int32 [n * bits / 32, columns].

    It is a stream of bits down each column, lowest first.
    """
    stream = np.unpackbits(values[:, None, :], axis=1, bitorder="little", count=bits)
    words = stream.reshape(-1, WORD_BITS, values.shape[1])
    octets = np.packbits(words, axis=1, bitorder="little").swapaxes(1, 2)
    return np.ascontiguousarray(octets).view("<i4")[..., 0]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Undo `pack`; return uint8 [n, columns]."""
    octets = np.ascontiguousarray(words[..., None]).view(np.uint8).swapaxes(1, 2)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(-1, bits, words.shape[1])
    return np.packbits(stream, axis=1, bitorder="little")[:, 0]


def check_packable(module: str, length: int, bits: int) -> None:
    """Raise StageError(unsupported_width) unless `length` values of `bits` fill whole words."""
    if length * bits % WORD_BITS:
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            f"expected sides of {module} whose {bits}-bit values fill whole {WORD_BITS}-bit words, "
            f"found a side of {length}; use layout: compressed-tensors",
        )


def to_float16(module: str, scales: np.ndarray) -> np.ndarray:
    """Return scales in float16.

    Raises:
        StageError: readback_mismatch, where that would change them.
    """
    converted = scales.astype(np.float16)
    changed = converted.astype(np.float32) != scales
    if changed.any():
        raise StageError(
            Failure.READBACK_MISMATCH,
            f"expected scales of {module} that float16 holds, found {scales[changed].flat[0]:.4g}; "
            "use layout: compressed-tensors",
        )
    return converted
