"""bitsandbytes checkpoints of 4 and of 8 bits.

4 bits (QLoRA, arXiv:2305.14314): `weight` holds two codes a byte, the high half first, of all rows
one after another, in bytes or in whatever dtype `quant_storage` asked for. Each block of 64 has a
scale in `weight.absmax`; with double quantization that is a code itself, into
`weight.nested_quant_map`, with a scale for each 256 in `weight.nested_absmax` and one offset for
all. `weight.quant_state.bitsandbytes__<type>` is JSON in bytes. 8 bits (LLM.int8(),
arXiv:2208.07339): `weight` int8 [out, in], and `SCB`, the largest value of each row:
W = codes * SCB / 127.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.linears import ModelNames, names_of_model
from quantline.ingest.dequantize.stored import StoredTensors

STATE = ".quant_state.bitsandbytes__"
PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# The 4-bit types: quantiles of a normal distribution (QLoRA, appendix E), and E2M1 over 6 with its
# codes in an order of its own (csrc/kernels.cu of bitsandbytes).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)
FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
TABLE_TOLERANCE = 1e-4
ROW_LAYOUT = 0  # of weight_format: the order of a matrix, and not of a kernel's tiles
ONE_127TH = np.float32(7.874015718698502e-3)  # as the library's own kernel multiplies


@register_dequantizer("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
class BitsAndBytes(Dequantizer):
    """4-bit codes of blocks, or 8-bit codes of rows."""

    SIGNS = (".quant_map", ".SCB")
    NEUTRAL = frozenset(
        {
            *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type"),
            *(
                "bnb_4bit_use_double_quant",
                "llm_int8_enable_fp32_cpu_offload",
                "llm_int8_threshold",
            ),
            *("llm_int8_has_fp16_weight", "llm_int8_skip_modules", "load_in_4bit", "load_in_8bit"),
            *("_load_in_4bit", "_load_in_8bit", "bnb_4bit_blocksize", "target_parameters"),
        }
    )

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options."""
        super().__init__(settings, config)
        self.model = ModelNames()

    def plan(self, stored: StoredTensors) -> Plan:
        """Collect what belongs to each weight."""
        self.model = names_of_model(self.config)
        restored: dict[str, dict[str, str]] = {}
        for name in stored.names:
            base, found, _ = name.partition(STATE)
            if found:
                parts = {"weight": base, "state": name}
                for part in PARTS_4BIT:
                    if f"{base}.{part}" in stored:
                        parts[part] = f"{base}.{part}"
                if base in stored:
                    restored[base] = parts
                continue
            module, _, last = name.rpartition(".")
            if last == "weight" and stored.dtype(name) == "I8":
                parts = {"weight": name}
                for part in ("SCB", "weight_format"):
                    if f"{module}.{part}" in stored:
                        parts[part] = f"{module}.{part}"
                restored[name] = parts
        taken = {name for parts in restored.values() for name in parts.values()}
        return Plan(restored, [], [name for name in stored.names if name not in taken])

    def restore(self, parts: Parts) -> np.ndarray:
        """Return what a layer's codes stand for."""
        weight = self._four_bits(parts) if "state" in parts else self._eight_bits(parts)
        return weight.T if self.model.is_conv1d(parts.name) else weight

    def _eight_bits(self, parts: Parts) -> np.ndarray:
        """Return codes * SCB / 127."""
        codes = parts["weight"]
        scales = parts.finite("SCB").reshape(-1)
        if "weight_format" in parts and (parts["weight_format"] != ROW_LAYOUT).any():
            raise parts.misfit("weight_format", f"{ROW_LAYOUT}, which is row by row")
        if codes.ndim != 2 or len(scales) != len(codes):
            raise parts.misfit("SCB", "one number for each row")
        return codes.astype(np.float32) * scales[:, None] * ONE_127TH

    def _four_bits(self, parts: Parts) -> np.ndarray:
        """Return the values of codes times the scales of their blocks."""
        state = self._state(parts)
        kind = parts.names["state"].partition(STATE)[2]
        table = TABLES.get(kind)
        if table is None or state.get("quant_type", kind) != kind:
            raise self.refusal(f"codes of {' or '.join(TABLES)}", f"{kind} in {parts.name}")
        stated = parts.finite("quant_map").reshape(-1)
        if stated.shape != table.shape or not np.allclose(stated, table, atol=TABLE_TOLERANCE):
            raise parts.misfit("quant_map", f"the 16 values of {kind}")
        shape = tuple(state["shape"])
        count = int(np.prod(shape))
        block = state["blocksize"]
        octets = parts.octets("weight")
        scales = self._block_scales(parts, state)
        if len(octets) != -(-count // 2) or len(scales) != -(-count // block):
            raise parts.misfit("weight", f"{count} codes for the shape {shape}")
        codes = np.stack([octets >> 4, octets & 15], axis=1).reshape(-1)[:count]
        values = table[codes]
        values *= np.repeat(scales, block)[:count]
        return values.reshape(shape)

    @staticmethod
    def _state(parts: Parts) -> dict[str, Any]:
        """Return what is said of a layer's codes."""
        try:
            state = json.loads(bytes(parts.octets("state")))
            sides = [*state["shape"], state["blocksize"]]
            if all(type(side) is int and side > 0 for side in sides):
                return dict(state)
        except (ValueError, TypeError, LookupError):
            pass
        raise parts.misfit("state", "JSON with a shape and a blocksize, all numbers above 0")

    @staticmethod
    def _block_scales(parts: Parts, state: Mapping[str, Any]) -> np.ndarray:
        """Return the scale of every block, in float32."""
        if "nested_absmax" not in parts:
            return parts.finite("absmax").reshape(-1)
        codes = parts["absmax"].reshape(-1)
        table = parts.finite("nested_quant_map").reshape(-1)
        outer = parts.finite("nested_absmax").reshape(-1)
        block = state.get("nested_blocksize")
        if type(block) is not int or block < 1:
            raise parts.misfit("state", "JSON with a nested_blocksize above 0")
        offset = np.float32(state["nested_offset"])
        if not np.isfinite(offset):
            raise parts.not_finite("state")
        if (
            table.shape != (256,)
            or codes.dtype != np.uint8
            or len(outer) != -(-len(codes) // block)
        ):
            raise parts.misfit("absmax", f"bytes, with one scale for each {block} in nested_absmax")
        return table[codes] * np.repeat(outer, block)[: len(codes)] + offset
