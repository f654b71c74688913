"""compressed-tensors' layouts int-quantized and float-quantized: eight bits for weights, and for activations token by token.

A layer has `weight` int8 or float8_e4m3fn [out, in] and `weight_scale` [out, 1]. The server finds the scale of each token's
activations when it sees them.
"""

import numpy as np
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from quantline.quantized.store import FloatLinear, GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.formats.safetensors.layouts.layout import Scheme, one_scheme

GROUP = "group_0"  # the one scheme, by which all quantized layers are stored
TYPES = {"int8": ("int", "int-quantized"), "float8": ("float", "float-quantized")}
MIDDLE = 128  # the zero point of symmetric integers of eight bits


def parts(module: str) -> list[str]:
    """The tensors of a layer; the first is there for quantized layers alone."""
    return [f"{module}.weight_scale", f"{module}.weight"]


def tensors(module: str, linear: GroupedLinear | FloatLinear, dtype: type) -> dict[str, np.ndarray]:
    """A layer's tensors; the scales in `dtype`."""
    scale, weight = parts(module)
    values = linear.values if isinstance(linear, FloatLinear) else (linear.integers.astype(np.int16) - MIDDLE).astype(np.int8)
    return {weight: values, scale: linear.scales.astype(dtype)}


def config(schemes: dict[Scheme, list[str]], kept: list[str]) -> dict:
    """The quantization_config. Raises StageError(unsupported_width) if the layers do not share one scheme."""
    kind, *_ = one_scheme(schemes)
    number, layout = TYPES[kind]
    weights = QuantizationArgs(num_bits=8, type=number, symmetric=True, strategy="channel")
    tokens = QuantizationArgs(num_bits=8, type=number, symmetric=True, strategy="token", dynamic=True)
    return QuantizationConfig(
        config_groups={GROUP: QuantizationScheme(targets=["Linear"], weights=weights, input_activations=tokens)},
        ignore=kept, format=layout, quantization_status=QuantizationStatus.COMPRESSED,
    ).model_dump(mode="json")


def kind(config: dict, module: str) -> str:
    """What a weight is stored as by a quantization_config."""
    number = config["config_groups"][GROUP]["weights"]["type"]
    return next(kind for kind, (one, _) in TYPES.items() if one == number)


def shape_of(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(out, in) of a stored layer."""
    return checkpoint.shape(f"{module}.weight")


def dequantize(checkpoint: Checkpoint, module: str, config: dict) -> np.ndarray:
    """The weight float32 [out, in] that a stored layer stands for."""
    return checkpoint.tensor(f"{module}.weight") * checkpoint.tensor(f"{module}.weight_scale")
