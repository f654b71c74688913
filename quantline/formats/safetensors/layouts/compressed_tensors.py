"""compressed-tensors' layout pack-quantized, which transformers and vLLM load.

It is written by the package's own packing and its own schema. Integers are packed along the inputs
and zero points along the outputs, both moved by 2^(bits-1) to signed numbers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
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

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.layout import LayerGrid, Layout, group_by_grid
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
        self,
        schemes: Mapping[Scheme, list[str]],
        unquantized_modules: list[str],
        of_experts: Collection[str] = (),
        of_head: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return the quantization_config (see Layout).

        It has one scheme for all linear layers. Where experts have another grid than the rest,
        they have a scheme of their own, by patterns: transformers and vLLM fuse experts when they
        load them, and then find no layers by the names of the file. Where the rest has several
        grids, its layers are listed.
        """
        experts = frozenset(of_experts)
        head = frozenset(of_head)
        rest = _without(schemes, experts | head)
        grids = group_by_grid(rest)
        targets = {
            grid: names if len(grids) > 1 else [ALL_LINEARS] for grid, names in grids.items()
        }
        groups = list(targets.items())
        for grid in group_by_grid(_only(schemes, experts)):
            if list(grids) != [grid]:
                patterns = [ALL_LINEARS] if not grids else expert_patterns(experts)
                groups.insert(0, (grid, patterns))
        # By its name: to vLLM a head is no linear layer.
        groups += group_by_grid(_only(schemes, head)).items()
        return QuantizationConfig(
            config_groups={
                f"group_{number}": QuantizationScheme(targets=names, weights=_arguments(grid))
                for number, (grid, names) in enumerate(groups)
            },
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


def _only(schemes: Mapping[Scheme, list[str]], names: Collection[str]) -> dict[Scheme, list[str]]:
    """Return the schemes of some layers alone."""
    kept = {scheme: [name for name in of if name in names] for scheme, of in schemes.items()}
    return {scheme: of for scheme, of in kept.items() if of}


def _without(
    schemes: Mapping[Scheme, list[str]], names: Collection[str]
) -> dict[Scheme, list[str]]:
    """Return the schemes of all layers but some."""
    every = {name for of in schemes.values() for name in of}
    return _only(schemes, every.difference(names))


def _arguments(grid: LayerGrid) -> QuantizationArgs:
    """Return a grid in the package's own schema."""
    return QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        group_size=grid.group_size,
        strategy="channel" if grid.group_size is None else "group",
    )


def expert_patterns(layers: Iterable[str]) -> list[str]:
    """Return targets that match layers of experts in every block, whatever their own names.

    vLLM looks for an expert's layers by names of its own, such as gate_proj where a file has w1,
    and a wrapper of theirs has another name before the blocks. So a pattern is what lies between
    the block's number and the expert's. transformers takes the scheme of the experts from the
    first group that has a pattern with "experts" in it.
    """
    found = set()
    for layer in layers:
        parts = layer.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
        if len(numbers) < 2:
            found.add(f"{re.escape(layer)}$")
            continue
        inside = r"\.".join(map(re.escape, parts[numbers[0] + 1 : numbers[-1]]))
        end = "$" if numbers[-1] == len(parts) - 1 else r"\."
        found.add(rf".*\.{inside}\.\d+{end}")
    patterns = [f"re:{pattern}" for pattern in sorted(found)]
    if not any("experts" in pattern for pattern in patterns):
        patterns[0] = patterns[0].replace("re:", "re:(?#experts)", 1)
    return patterns


def _bits(config: dict[str, Any], module: str) -> int:
    """Return the bits of a layer's integers by a quantization_config."""
    groups = config["config_groups"].values()
    for matches in (_is_listed, _is_in_pattern, _is_linear):
        for group in groups:
            if matches(module, group["targets"]):
                bits: int = group["weights"]["num_bits"]
                return bits
    raise StageError(
        Failure.READBACK_MISMATCH,
        f"expected {module} in a group of quantization_config, found it in none; export it again",
    )


def _is_listed(module: str, targets: list[str]) -> bool:
    return module in targets


def _is_in_pattern(module: str, targets: list[str]) -> bool:
    patterns = (target.removeprefix("re:") for target in targets if target.startswith("re:"))
    return any(re.match(pattern, module) for pattern in patterns)


def _is_linear(module: str, targets: list[str]) -> bool:
    return ALL_LINEARS in targets


def _pack(unsigned: np.ndarray, bits: int, dimension: int) -> np.ndarray:
    """Pack uint8 along a dimension into int32."""
    signed = torch.from_numpy(unsigned.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    return pack_to_int32(signed, bits, packed_dim=dimension).contiguous().numpy()


def _unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...], dimension: int) -> np.ndarray:
    """Undo `_pack` but for the signs; return float32 of a shape."""
    words = torch.from_numpy(packed)
    signed = unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dimension)
    return signed.numpy().astype(np.float32)
