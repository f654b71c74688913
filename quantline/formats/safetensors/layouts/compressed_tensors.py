"""compressed-tensors' layout pack-quantized, which transformers and vLLM load.

It is written by the package's own packing and its own schema. Integers are packed along the inputs
and zero points along the outputs, both moved by 2^(bits-1) to signed numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from quantline.formats.safetensors.layouts.layout import Layout, group_by_grid
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import GroupedLinear, Scheme

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
ALL_LINEARS = "Linear"  # a target that means every linear layer
ALONG_OUTPUTS = 0
ALONG_INPUTS = 1


class PackedIntegers(Layout[GroupedLinear]):
    """2, 3, 4 or 8 bits; layers may have grids of their own."""

    def part_names(self, module: str) -> list[str]:
        """Return the tensors of a layer; symmetric ones have no zero points."""
        return [f"{module}.{part}" for part in PARTS]

    def tensors(
        self, module: str, linear: GroupedLinear, dtype: npt.DTypeLike
    ) -> dict[str, np.ndarray]:
        """Return a layer's tensors (see Layout); the scales in `dtype`."""
        tensors = {
            f"{module}.weight_packed": _pack(linear.integers, linear.bits, ALONG_INPUTS),
            f"{module}.weight_scale": linear.scales.astype(dtype),
            f"{module}.weight_shape": np.array(linear.integers.shape, np.int64),
        }
        if not linear.symmetric:
            zeros = _pack(linear.zeros, linear.bits, ALONG_OUTPUTS)
            tensors[f"{module}.weight_zero_point"] = zeros
        return tensors

    def config(
        self, schemes: Mapping[Scheme, list[str]], unquantized_modules: list[str]
    ) -> dict[str, Any]:
        """Return the quantization_config (see Layout).

        It has one scheme for all linear layers, or where there are several, lists the layers.
        """
        grids = group_by_grid(schemes)
        groups = {}
        for number, (grid, names) in enumerate(grids.items()):
            weights = QuantizationArgs(
                num_bits=grid.bits,
                type="int",
                symmetric=grid.symmetric,
                group_size=grid.group_size,
                strategy="channel" if grid.group_size is None else "group",
            )
            targets = names if len(grids) > 1 else [ALL_LINEARS]
            groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights)
        return QuantizationConfig(
            config_groups=groups,
            ignore=unquantized_modules,
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
        ).model_dump(mode="json")

    def stored_type(self, config: dict[str, Any], module: str) -> str:
        """Return what a weight of a layer is stored as."""
        return f"int{_bits(config, module)}"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int]:
        """Return (out, in) of a stored layer."""
        rows, columns = checkpoint.raw(f"{module}.weight_shape")
        return int(rows), int(columns)

    def dequantize(self, checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> np.ndarray:
        """Return the weight float32 [out, in] that a stored layer stands for."""
        shape = self.shape(checkpoint, module)
        bits = _bits(config, module)
        scales = checkpoint.tensor(f"{module}.weight_scale")
        packed = checkpoint.raw(f"{module}.weight_packed")
        integers = _unpack(packed, bits, shape, ALONG_INPUTS)
        steps = integers.reshape(shape[0], scales.shape[1], -1)
        if f"{module}.weight_zero_point" in checkpoint:
            packed = checkpoint.raw(f"{module}.weight_zero_point")
            zeros = _unpack(packed, bits, scales.shape, ALONG_OUTPUTS)
            steps = steps - zeros[:, :, None]
        return (steps * scales[:, :, None]).reshape(shape)


def _bits(config: dict[str, Any], module: str) -> int:
    """Return the bits of a layer's integers by a quantization_config."""
    groups = [
        group
        for group in config["config_groups"].values()
        if module in group["targets"] or ALL_LINEARS in group["targets"]
    ]
    return groups[0]["weights"]["num_bits"]


def _pack(unsigned: np.ndarray, bits: int, dimension: int) -> np.ndarray:
    """Pack uint8 along a dimension into int32."""
    signed = torch.from_numpy(unsigned.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    return pack_to_int32(signed, bits, packed_dim=dimension).contiguous().numpy()


def _unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...], dimension: int) -> np.ndarray:
    """Undo `_pack` but for the signs; return float32 of a shape."""
    words = torch.from_numpy(packed)
    signed = unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dimension)
    return signed.numpy().astype(np.float32)
