"""compressed-tensors' pack-quantized layout, by its own packing and its own schema; transformers and vLLM load it.

Integers are packed along the inputs and zero points along the outputs, both moved by 2^(bits-1) to signed numbers.
"""

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from quantline.quantized.store import GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.formats.safetensors.layouts.layout import Scheme, by_grid

BITS = (2, 3, 4, 8)


def parts(module: str) -> list[str]:
    """The tensors that a layer may have; the first is always there."""
    return [f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")]


def tensors(module: str, linear: GroupedLinear, dtype: type) -> dict[str, np.ndarray]:
    """A layer's tensors; the scales in `dtype`."""
    def pack(unsigned: np.ndarray, axis: int) -> np.ndarray:
        signed = torch.from_numpy(unsigned.astype(np.int16) - (1 << (linear.bits - 1))).to(torch.int8)
        return pack_to_int32(signed, linear.bits, packed_dim=axis).contiguous().numpy()

    packed, scale, zero, shape = parts(module)
    found = {packed: pack(linear.integers, 1), scale: linear.scales.astype(dtype),
             shape: np.array(linear.integers.shape, np.int64)}
    return found if linear.symmetric else found | {zero: pack(linear.zeros, 0)}


def config(schemes: dict[Scheme, list[str]], kept: list[str]) -> dict:
    """The quantization_config: one scheme for all linear layers, or where there are several, layer by layer."""
    grids = by_grid(schemes)
    groups = {}
    for (kind, symmetric, size), names in grids.items():
        weights = QuantizationArgs(num_bits=int(kind.removeprefix("int")), type="int", symmetric=symmetric, group_size=size,
                                   strategy="channel" if size is None else "group")
        targets = names if len(grids) > 1 else ["Linear"]
        groups[f"group_{len(groups)}"] = QuantizationScheme(targets=targets, weights=weights)
    return QuantizationConfig(config_groups=groups, ignore=kept, format="pack-quantized",
                              quantization_status=QuantizationStatus.COMPRESSED).model_dump(mode="json")


def kind(config: dict, module: str) -> str:
    """What a weight of a layer is stored as by a quantization_config."""
    own = next(one for one in config["config_groups"].values() if {module, "Linear"} & set(one["targets"]))
    return f"int{own['weights']['num_bits']}"


def shape_of(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(out, in) of a stored layer."""
    rows, columns = checkpoint.raw(f"{module}.weight_shape")
    return int(rows), int(columns)


def dequantize(checkpoint: Checkpoint, module: str, config: dict) -> np.ndarray:
    """The weight float32 [out, in] that a stored layer stands for."""
    shape, bits = shape_of(checkpoint, module), int(kind(config, module).removeprefix("int"))

    def unpack(part: str, size: tuple[int, ...], axis: int) -> np.ndarray:
        words = torch.from_numpy(checkpoint.raw(f"{module}.{part}"))
        return unpack_from_int32(words, bits, torch.Size(size), packed_dim=axis).numpy().astype(np.float32)

    scales = checkpoint.tensor(f"{module}.weight_scale")
    grouped = unpack("weight_packed", shape, 1).reshape(shape[0], scales.shape[1], -1)
    if f"{module}.weight_zero_point" in checkpoint.files:
        grouped = grouped - unpack("weight_zero_point", scales.shape, 0)[:, :, None]
    return (grouped * scales[:, :, None]).reshape(shape)
