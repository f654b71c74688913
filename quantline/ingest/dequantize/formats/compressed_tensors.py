"""compressed-tensors checkpoints, as llm-compressor and vLLM's friends write them.

Integers are packed (`weight_packed` int32, a stream of bits along the inputs, around the middle of
their range) or plain (`weight` int8); floats are 8-bit (`weight`), or 4 and 6 bits packed in bytes
(`weight_packed`). Scales are those of a tensor, a row, a group of inputs or a block; 4-bit floats
of NVFP4 have a divisor for all of them too, and the scales of MX formats are powers of two.
W = (codes - zeros) * scales. The form of each layer is read off its tensors and has to be one of
those that `config_groups` names, so no name of a layer has to be matched.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantline.ingest.dequantize import blocks
from quantline.ingest.dequantize.bits import E2M3, e2m1, powers_of_two, unpack
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.linears import as_grouped, plan_parts
from quantline.ingest.dequantize.stored import PLAIN, StoredTensors
from quantline.quantized.tensors import GroupedLinear

PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
)
ROOTS = ("weight_packed", "weight_scale")
# Of activations, and of caches of keys and values.
LEFT_OUT = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("k_scale", "k_zero_point", "v_scale", "v_zero_point", "q_scale", "q_zero_point"),
    *("k_global_scale", "v_global_scale", "q_global_scale"),
)
WORD_BITS = 32
DENSE: tuple[Any, ...] = (None, {}, [], "dense")


@register_dequantizer("compressed-tensors")
class CompressedTensors(Dequantizer):
    """Integers and floats of 1 to 8 bits."""

    NEUTRAL = frozenset(
        {
            "config_groups",
            "format",
            "global_compression_ratio",
            "ignore",
            "kv_cache_scheme",
            "version",
        }
    )
    FIXED: Mapping[str, tuple[Any, ...]] = {"quantization_status": ("compressed",)}

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options."""
        super().__init__(settings, config)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refusal("config_groups", f"{groups!r:.80}")
        self.types: set[tuple[str, int]] = set()
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            if weights:
                self.types.add((str(weights.get("type", "int")), int(weights["num_bits"])))

    def _check_option(self, option: str, value: Any) -> None:
        """Refuse sparse weights, and turned ones, which stand for nothing without their turns."""
        if option == "sparsity_config":
            if value and value.get("format") not in DENSE:
                raise self.refusal("dense weights", f"{option} of {value.get('format')}")
        elif option == "transform_config":
            if value and value.get("config_groups"):
                raise self.refusal("weights as they are", f"{option}, which turns inputs as well")
        else:
            super()._check_option(option, value)

    def plan(self, stored: StoredTensors) -> Plan:
        """Collect the parts of every layer that has a scale."""
        return plan_parts(stored, PARTS, ROOTS, LEFT_OUT)

    def restore(self, parts: Parts) -> np.ndarray:
        """Return (codes - zeros) * scales of one layer."""
        codes = self._codes(parts)
        if codes.ndim != 2:
            raise parts.misfit("weight_scale", "that of a matrix")
        shape = (codes.shape[0], codes.shape[1])
        scales = self._scales(parts)
        if "weight_zero_point" in parts:
            zeros = self._zeros(parts, scales, shape)
            codes = codes - self._spread(parts, "weight_zero_point", zeros, shape)
        return codes * self._spread(parts, "weight_scale", scales, shape)

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return the integers of a layer in groups of neighbouring inputs."""
        is_packed = parts.dtype("weight_packed") == "I32"
        if "weight_g_idx" in parts or not (is_packed or parts.dtype("weight") == "I8"):
            return None
        codes = self._codes(parts)
        shape = (codes.shape[0], codes.shape[1])
        bits = self._packed_bits(parts, *shape) if is_packed else 8
        scales = self._scales(parts)
        zeros = np.zeros_like(scales)
        if "weight_zero_point" in parts:
            zeros = self._zeros(parts, scales, shape)
        if ("int", bits) not in self.types or zeros.shape != scales.shape:
            return None
        middle = 2 ** (bits - 1)
        return as_grouped(codes + middle, zeros + middle, scales, bits)

    def _codes(self, parts: Parts) -> np.ndarray:
        """Return the codes of a layer as float32 [out, in]."""
        if "weight_packed" not in parts:
            dtype = parts.dtype("weight")
            if dtype in PLAIN:
                raise parts.misfit("weight", "compressed, as its scale beside it says")
            self._check_type(parts, "float" if dtype.startswith("F8") else "int", 8)
            return parts["weight"].astype(np.float32)
        packed = parts["weight_packed"]
        if parts.dtype("weight_packed") == "I32":
            rows, columns = (int(side) for side in parts["weight_shape"].reshape(-1))
            bits = self._packed_bits(parts, rows, columns)
            return unpack(packed, bits, columns).astype(np.float32) - np.float32(2 ** (bits - 1))
        if ("float", 6) in self.types and ("float", 4) not in self.types:
            self._check_type(parts, "float", 6)
            return E2M3[unpack(packed, 6, packed.shape[-1] * 8 // 6)]
        self._check_type(parts, "float", 4)
        return e2m1(packed)

    def _packed_bits(self, parts: Parts, rows: int, columns: int) -> int:
        """Return the width at which the inputs fill the words that are there."""
        shape = parts.stored.shape(parts.names["weight_packed"])
        found = []
        for kind, bits in sorted(self.types):
            if kind == "int" and shape == (rows, -(-columns * bits // WORD_BITS)):
                found.append(bits)
        if len(found) != 1:
            raise parts.misfit(
                "weight_packed", f"[{rows}, {columns} * bits / {WORD_BITS}] of one of config_groups"
            )
        return found[0]

    def _check_type(self, parts: Parts, kind: str, bits: int) -> None:
        """Refuse a layer of a type that no group has; int8 holds narrower integers as well."""
        known = {(kind, bits)} | ({("int", n) for n in range(1, 9)} if kind == "int" else set())
        if not known & self.types:
            groups = ", ".join(f"{name}{width}" for name, width in sorted(self.types))
            raise self.refusal(f"weights of {groups}", f"{parts.name} of {kind}{bits}")

    @staticmethod
    def _scales(parts: Parts) -> np.ndarray:
        """Return the scales in float32, with the one for all of them."""
        if parts.dtype("weight_scale") == "U8":
            scales = powers_of_two(parts["weight_scale"])
            if not np.isfinite(scales).all():
                raise parts.not_finite("weight_scale")
        else:
            scales = parts.finite("weight_scale")
        if "weight_global_scale" in parts:
            divisor = parts.finite("weight_global_scale").reshape(-1)
            if divisor.shape != (1,) or not divisor[0] > 0:
                raise parts.misfit("weight_global_scale", "one number above 0")
            scales = scales / divisor[0]
        return scales

    def _zeros(self, parts: Parts, scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Return the zero points in float32, in the shape of the scales."""
        if parts.dtype("weight_zero_point") != "I32" or "weight_packed" not in parts:
            return parts["weight_zero_point"].astype(np.float32)
        # Packed like the codes, along the rows.
        bits = self._packed_bits(parts, *shape)
        packed = parts["weight_zero_point"]
        if packed.shape == scales.shape:  # of one tensor, they are not packed
            return packed.astype(np.float32)
        zeros = unpack(packed.T, bits, shape[0]).T.astype(np.float32)
        return zeros - np.float32(2 ** (bits - 1))

    def _spread(
        self, parts: Parts, part: str, values: np.ndarray, shape: tuple[int, int]
    ) -> np.ndarray:
        """Return scales or zero points for every code."""
        if "weight_g_idx" in parts:
            order = parts["weight_g_idx"].astype(np.int64).reshape(-1)
            if (order >= 0).all():  # -1 stands for groups in the order of the inputs
                if len(order) != shape[1] or not order.max() < values.shape[-1]:
                    raise parts.misfit("weight_g_idx", f"{shape[1]} numbers of groups")
                return values[:, order]
        result = blocks.spread(values, shape, self._block(values, shape))
        if result is None:
            raise parts.misfit(part, f"one number for each group or block of {shape}")
        return result

    def _block(self, values: np.ndarray, shape: tuple[int, int]) -> list[int] | None:
        """Return the block structure of the group that the grid of scales belongs to, if any."""
        for group in self.settings["config_groups"].values():
            block = (group.get("weights") or {}).get("block_structure")
            if isinstance(block, str):
                block = block.lower().split("x")
            if block and values.shape == tuple(
                -(-side // int(size)) for side, size in zip(shape, block, strict=True)
            ):
                return [int(size) for size in block]
        return None
