"""The layout of AutoAWQ's GEMM kernels (quant_method awq).

vLLM, transformers and others load it. It has four bits only. Per layer, with
W = (integers - zeros) * scales transposed to [in, out]:

* `qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8]: eight neighbouring outputs a
  word, in the order 0 2 4 6 1 3 5 7;
* `scales` float16 [groups, out].
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.gptq import check_packable, to_float16
from quantline.formats.safetensors.layouts.layout import Layout, only_grid
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import GroupedLinear, Scheme

PARTS = ("qweight", "qzeros", "scales")
BITS = 4
WORD_VALUES = 8
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which of the eight outputs comes next in a word


class Awq(Layout[GroupedLinear]):
    """4 bits; all layers share one grid."""

    one_grid: ClassVar[bool] = True

    def part_names(self, module: str) -> list[str]:
        """Return the tensors of a layer; all are always there."""
        return [f"{module}.{part}" for part in PARTS]

    def tensors(
        self, module: str, linear: GroupedLinear, dtype: npt.DTypeLike
    ) -> dict[str, np.ndarray]:
        """Return a layer's tensors (see Layout)."""
        if linear.bits != BITS:
            raise StageError(
                Failure.UNSUPPORTED_WIDTH,
                f"expected {BITS} bits for the AWQ layout, found {linear.bits} in {module}; use "
                "layout: compressed-tensors",
            )
        check_packable(module, len(linear.integers), linear.bits)
        return {
            f"{module}.qweight": pack(linear.integers.T),
            f"{module}.qzeros": pack(linear.zeros.T),
            f"{module}.scales": to_float16(module, linear.scales).T.copy(),
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
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": -1 if grid.group_size is None else grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def stored_type(self, config: dict[str, Any], module: str) -> str:
        """Return what a weight is stored as."""
        return f"int{config['bits']}"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int]:
        """Return (out, in) of a stored layer."""
        inputs, words = checkpoint.shape(f"{module}.qweight")
        return words * WORD_VALUES, inputs

    def dequantize(self, checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> np.ndarray:
        """Return the weight float32 [out, in] that a stored layer stands for."""
        integers = unpack(checkpoint.raw(f"{module}.qweight")).astype(np.float32)
        zeros = unpack(checkpoint.raw(f"{module}.qzeros")).astype(np.float32)
        scales = checkpoint.raw(f"{module}.scales").astype(np.float32)
        group_size = len(integers) // len(zeros)
        zeros = np.repeat(zeros, group_size, 0)
        scales = np.repeat(scales, group_size, 0)
        return ((integers - zeros) * scales).T


def pack(values: np.ndarray) -> np.ndarray:
    """Pack uint8 [rows, n], from 0 to 15, into int32 [rows, n / 8]."""
    nibbles = values.reshape(len(values), -1, WORD_VALUES)[:, :, ORDER]
    octets = nibbles[:, :, ::2] | nibbles[:, :, 1::2] << np.uint8(4)
    return np.ascontiguousarray(octets).view("<i4")[..., 0]


def unpack(words: np.ndarray) -> np.ndarray:
    """Undo `pack`; return uint8 [rows, n]."""
    octets = np.ascontiguousarray(words[..., None]).view(np.uint8)
    nibbles = np.stack([octets & 15, octets >> 4], -1).reshape(*words.shape, WORD_VALUES)
    return nibbles[:, :, np.argsort(ORDER)].reshape(len(words), -1)
