"""compressed-tensors' layouts int-quantized and float-quantized, for rounded activations.

Weights have eight bits, and so have activations, token by token. A layer has `weight` int8 or
float8_e4m3fn [out, in] and `weight_scale` [out, 1]. The server finds the scale of each token's
activations when it computes them.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from quantline.formats.safetensors.layouts.layout import Layout, only_grid
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import FloatLinear, GroupedLinear, Scheme

GROUP = "group_0"  # the one scheme, by which all quantized layers are stored
NUMBER_TYPES = {"int8": "int", "float8": "float"}  # by what one weight is stored as
FORMATS = {"int8": "int-quantized", "float8": "float-quantized"}
INT8_ZERO = 128  # the zero point of symmetric integers of eight bits


class EightBits(Layout[GroupedLinear | FloatLinear]):
    """int8 or float8, one scale per row; all layers share one kind."""

    def part_names(self, module: str) -> list[str]:
        """Return the tensors of a layer; `weight` is also that of one that is not quantized."""
        return [f"{module}.weight_scale", f"{module}.weight"]

    def tensors(
        self, module: str, linear: GroupedLinear | FloatLinear, dtype: npt.DTypeLike
    ) -> dict[str, np.ndarray]:
        """Return a layer's tensors (see Layout); the scales in `dtype`."""
        if isinstance(linear, FloatLinear):
            values = linear.values
        else:
            values = (linear.integers.astype(np.int16) - INT8_ZERO).astype(np.int8)
        scales = linear.scales.astype(dtype)
        return {f"{module}.weight": values, f"{module}.weight_scale": scales}

    def config(
        self,
        schemes: Mapping[Scheme, list[str]],
        unquantized_modules: list[str],
        of_experts: Collection[str] = (),
        of_head: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return the quantization_config (see Layout)."""
        kind = only_grid(schemes).kind
        number = NUMBER_TYPES[kind]
        weights = QuantizationArgs(num_bits=8, type=number, symmetric=True, strategy="channel")
        tokens = QuantizationArgs(
            num_bits=8, type=number, symmetric=True, strategy="token", dynamic=True
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=tokens)
        return QuantizationConfig(
            config_groups={GROUP: scheme},
            ignore=unquantized_modules,
            format=FORMATS[kind],
            quantization_status=QuantizationStatus.COMPRESSED,
        ).model_dump(mode="json")

    def stored_type(self, config: dict[str, Any], module: str) -> str:
        """Return what a weight is stored as."""
        number = config["config_groups"][GROUP]["weights"]["type"]
        kinds = {number_type: kind for kind, number_type in NUMBER_TYPES.items()}
        return kinds[number]

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int]:
        """Return (out, in) of a stored layer."""
        rows, columns = checkpoint.shape(f"{module}.weight")
        return rows, columns

    def dequantize(self, checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> np.ndarray:
        """Return the weight float32 [out, in] that a stored layer stands for."""
        return checkpoint.tensor(f"{module}.weight") * checkpoint.tensor(f"{module}.weight_scale")
