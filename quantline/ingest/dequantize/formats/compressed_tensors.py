"""compressed-tensors checkpoints, as llm-compressor and vLLM's friends write them.

Integers are packed (`weight_packed` int32, a stream of bits along the inputs, around the middle of
their range) or plain (`weight` int8); floats are 8-bit (`weight`), or 4 and 6 bits packed in bytes
(`weight_packed`). Scales are those of a tensor, a row, a group of inputs or a block; 4-bit floats
of NVFP4 have a divisor for all of them too, and the scales of MX formats are powers of two.
W = (codes - zeros) * scales. The form of each layer is read off its tensors and has to be one of
those that `config_groups` names, so no name of a layer has to be matched. A grid of scales that is
none of them is refused, also where it would divide the weight: it may have been cut.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
from quantline.ingest.dequantize.schemes import EXPONENTS, WHOLE, Scheme, scheme_of
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


class Layer(NamedTuple):
    """A layer, [out, in].

    Attributes:
        codes: float32 [out, in].
        scales: float32, one for each block of the scheme.
        zeros: The same for zero points; None where there are none.
        order: The group of each input; None for groups of neighbouring inputs.
        scheme: The form.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    order: np.ndarray | None
    scheme: Scheme

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return scales or zero points for every code."""
        if self.order is not None:
            return values[:, self.order]
        shape = (self.codes.shape[0], self.codes.shape[1])
        result = blocks.spread(values, shape, self.scheme.block_in(shape))
        assert result is not None, "the scheme fits"
        return result


@register_dequantizer("compressed-tensors")
class CompressedTensors(Dequantizer):
    """Integers and floats of 1 to 8 bits."""

    SIGNS = (".weight_packed", ".weight_scale")
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
        self.schemes: list[Scheme] = []
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not weights:
                continue
            try:
                self.schemes.append(scheme_of(weights))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                words = f"{name} with {type(error).__name__}: {error}"
                raise self.refusal("config_groups that say the form of weights", words) from None

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
        layer = self._layer(parts)
        codes = layer.codes
        if layer.zeros is not None:
            codes = codes - layer.spread(layer.zeros)
        return codes * layer.spread(layer.scales)

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return the integers of a layer in groups of neighbouring inputs."""
        is_packed = parts.dtype("weight_packed") == "I32"
        if not is_packed and parts.dtype("weight") != "I8":
            return None
        layer = self._layer(parts)
        bits = layer.scheme.bits
        if layer.order is not None or not (is_packed or bits == 8):
            return None
        zeros = np.zeros_like(layer.scales) if layer.zeros is None else layer.zeros
        middle = 2 ** (bits - 1)
        return as_grouped(layer.codes + middle, zeros + middle, layer.scales, bits)

    def _layer(self, parts: Parts) -> Layer:
        """Read and check the parts of one layer."""
        if "weight" in parts and "weight_packed" in parts:
            raise self.refusal("one weight of a layer", f"both {', '.join(parts.names.values())}")
        possible = self._by_codes(parts)
        scales, exponents = self._scales(parts)
        possible = [
            (scheme, shape)
            for scheme, shape in possible
            if scheme.fits(scales.shape, shape) and scheme.exponents in (None, exponents)
        ]
        if not possible:
            forms = sorted({str(scheme.block) for scheme in self.schemes})
            raise parts.misfit(
                "weight_scale",
                f"one number for each block of {' or '.join(forms)} as config_groups says ({WHOLE} "
                "is the whole side), powers of two in bytes or floats as it says",
            )
        if "weight_zero_point" not in parts:
            possible = [(scheme, shape) for scheme, shape in possible if scheme.symmetric]
            if not possible:
                raise parts.missing("weight_zero_point")
        if len({scheme.bits for scheme, _ in possible}) > 1:
            raise parts.misfit("weight_scale", "of one of config_groups alone")
        # Of several forms the one counts that asks for most.
        scheme, shape = min(possible, key=lambda one: (one[0].symmetric, one[0].in_order))
        if any(one.has_divisor for one, _ in possible) or "weight_global_scale" in parts:
            divisor = parts.finite("weight_global_scale").reshape(-1)
            if divisor.shape != (1,) or not divisor[0] > 0:
                raise parts.misfit("weight_global_scale", "one number above 0")
            scales = scales / divisor[0]
        grid = scheme.grid(shape)
        zeros = None
        if "weight_zero_point" in parts:
            zeros = self._zeros(parts, scheme, scales.shape, shape).reshape(grid)
            if scheme.symmetric and zeros.any():
                raise parts.misfit("weight_zero_point", "0, as config_groups says symmetric")
        codes = self._codes(parts, scheme, shape)
        order = self._order(parts, scheme, grid, shape[1])
        return Layer(codes, scales.reshape(grid), zeros, order, scheme)

    def _by_codes(self, parts: Parts) -> list[tuple[Scheme, tuple[int, int]]]:
        """Return the schemes that the codes of a layer can be of, each with the weight's shape."""
        part = "weight_packed" if "weight_packed" in parts else "weight"
        dtype = parts.dtype(part)
        if part not in parts:
            raise parts.missing(part)
        if dtype in PLAIN:
            raise parts.misfit(part, "compressed, as its scale beside it says")
        stored = parts.stored.shape(parts.names[part])
        if len(stored) != 2:
            raise parts.misfit(part, "a matrix")
        if dtype == "I32" and part == "weight_packed":
            return self._by_words(parts, (stored[0], stored[1]))
        found = []
        for scheme in self.schemes:
            if part == "weight":
                is_float8 = dtype.startswith("F8_E") and scheme.kind == "float" and scheme.bits == 8
                if is_float8 or (dtype == "I8" and scheme.kind == "int"):
                    found.append((scheme, (stored[0], stored[1])))
            elif dtype == "U8" and scheme.kind == "float" and scheme.bits in (4, 6):
                found.append((scheme, (stored[0], stored[1] * 8 // scheme.bits)))
        if not found:
            types = ", ".join(sorted({scheme.type_name for scheme in self.schemes}))
            raise self.refusal(f"weights of {types}", f"{parts.names[part]} in {dtype}")
        return found

    def _by_words(
        self, parts: Parts, packed: tuple[int, int]
    ) -> list[tuple[Scheme, tuple[int, int]]]:
        """Return the schemes of integers at whose width the inputs fill the words."""
        stated = parts["weight_shape"].reshape(-1)
        if stated.shape != (2,) or stated.dtype.kind not in "iu":
            raise parts.misfit("weight_shape", "the two sides of the weight")
        rows, columns = (int(side) for side in stated)
        found = []
        for scheme in self.schemes:
            words = -(-columns * scheme.bits // WORD_BITS)
            if scheme.kind == "int" and packed == (rows, words):
                found.append((scheme, (rows, columns)))
        if not found:
            raise parts.misfit(
                "weight_packed", f"[{rows}, {columns} * bits / {WORD_BITS}] of one of config_groups"
            )
        return found

    @staticmethod
    def _codes(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
        """Return the codes of a layer as float32 [out, in]."""
        middle = np.float32(2 ** (scheme.bits - 1))
        if "weight_packed" not in parts:
            codes = parts["weight"].astype(np.float32)
            if scheme.kind == "int" and not ((codes >= -middle) & (codes < middle)).all():
                raise parts.misfit("weight", f"integers of {scheme.bits} bits")
            return codes
        packed = parts["weight_packed"]
        if scheme.kind == "int":
            return unpack(packed, scheme.bits, shape[1]).astype(np.float32) - middle
        return e2m1(packed) if scheme.bits == 4 else E2M3[unpack(packed, scheme.bits, shape[1])]

    @staticmethod
    def _scales(parts: Parts) -> tuple[np.ndarray, bool]:
        """Return the scales in float32, and whether they are powers of two by their dtype."""
        dtype = parts.dtype("weight_scale")
        if dtype != "U8":
            return parts.finite("weight_scale"), dtype in EXPONENTS
        scales = powers_of_two(parts["weight_scale"])
        if not np.isfinite(scales).all():
            raise parts.not_finite("weight_scale")
        return scales, True

    @staticmethod
    def _zeros(
        parts: Parts, scheme: Scheme, grid: tuple[int, ...], shape: tuple[int, int]
    ) -> np.ndarray:
        """Return the zero points in float32, one for each scale."""
        stored = parts["weight_zero_point"]
        if stored.shape == grid and (stored.dtype.kind in "iu" or scheme.kind == "float"):
            return stored.astype(np.float32)
        # Packed like the codes, along the rows.
        words = -(-shape[0] * scheme.bits // WORD_BITS)
        is_packed = parts.dtype("weight_zero_point") == "I32" and "weight_packed" in parts
        if not is_packed or stored.shape != (words, *grid[1:]):
            raise parts.misfit(
                "weight_zero_point",
                f"one for each scale {grid}, or int32 [{words}, {', '.join(map(str, grid[1:]))}]",
            )
        zeros = unpack(stored.T, scheme.bits, shape[0]).T.astype(np.float32)
        return zeros - np.float32(2 ** (scheme.bits - 1))

    @staticmethod
    def _order(
        parts: Parts, scheme: Scheme, grid: tuple[int, int], columns: int
    ) -> np.ndarray | None:
        """Return the group of every input; None for groups of neighbouring inputs."""
        if "weight_g_idx" not in parts:
            if not scheme.in_order and grid[1] > 1:
                raise parts.missing("weight_g_idx")
            return None
        order = parts.whole_numbers("weight_g_idx").reshape(-1)
        if (order == -1).all():  # groups in the order of the inputs
            return None
        if len(order) != columns or not ((order >= 0) & (order < grid[1])).all():
            raise parts.misfit("weight_g_idx", f"{columns} numbers of {grid[1]} groups")
        return order
