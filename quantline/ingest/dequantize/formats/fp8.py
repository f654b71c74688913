"""FP8 weights with scales of blocks, rows or tensors: DeepSeek's, Mistral's, MiniMax's and others.

W = codes * scale (DeepSeek-V3, arXiv:2412.19437, section 3.3). The scale is `weight_scale_inv` in
most files, in spite of its name the factor itself. It may be a power of two in one byte (E8M0), and
experts may be 4-bit floats with scales of 32 columns. Scales of activations are left out.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from quantline.ingest.dequantize import blocks
from quantline.ingest.dequantize.bits import e2m1, powers_of_two
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.schemes import EXPONENTS
from quantline.ingest.dequantize.stored import StoredTensors

CODES = frozenset({"F8_E4M3", "F8_E5M2", "F4", "I8", "U8"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
USUAL_BLOCK = (128, 128)  # where none is stated, as for transformers
MICROSCALING = (1, 32)
# How the scale of a tensor is called, behind the name of the tensor itself …
SCALES = ("_scale_inv", "_scale")
# … or in the place of "weight".
MODULE_SCALES = ("scale", "qscale_weight", "weight_scale", "weight_scale_inv")
# What belongs to activations and caches of keys and values.
OF_ACTIVATIONS = (
    "activation_scale",
    "input_scale",
    "output_scale",
    "qscale_act",
    "k_scale",
    "v_scale",
    "kv_scale",
)


@register_dequantizer("fp8", "mxfp8", "fbgemm_fp8")
class Fp8(Dequantizer):
    """Codes of 8 bits beside their scales."""

    SIGNS = (".weight_scale", ".weight_scale_inv")
    NEUTRAL = frozenset(
        {
            "activation_scale_ub",
            "activation_scheme",
            "dequantize",
            "fmt",
            "ignored_layers",
            "kv_cache_scheme",
            "modules_to_convert",
            "modules_to_not_convert",
            "scale_fmt",
            "weight_block_size",
        }
    )
    CODES: ClassVar[frozenset[str]] = CODES

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options."""
        super().__init__(settings, config)
        stated = settings.get("weight_block_size")
        self.has_blocks = stated is not None
        block = list(USUAL_BLOCK if stated is None else stated)
        if len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
            raise self.refusal("a height and a width as weight_block_size", f"{stated!r:.80}")
        self.stated_block = (block[0], block[1])

    def plan(self, stored: StoredTensors) -> Plan:
        """Pair every tensor of codes with its scale."""
        restored: dict[str, dict[str, str]] = {}
        taken = set()
        for name in stored.names:
            if stored.dtype(name) not in self.CODES:
                continue
            scale = self._scale_of(name, stored)
            if scale is None and stored.dtype(name) not in FLOAT8:
                continue  # an integer that is none of this format's; whoever writes it refuses it
            restored[name] = {"weight": name}
            if scale is not None:
                restored[name]["scale"] = scale
                taken.add(scale)
        # The scale of a tensor that is 8-bit itself, as E8M0 in uint8 is.
        for scale in taken & set(restored):
            del restored[scale]
        dropped = [name for name in stored.names if name.endswith(OF_ACTIVATIONS)]
        dropped = sorted(set(dropped) - taken - set(restored))
        kept = sorted(set(stored.names) - taken - set(restored) - set(dropped))
        return Plan(restored, dropped, kept)

    @staticmethod
    def _scale_of(name: str, stored: StoredTensors) -> str | None:
        """Return the name of a tensor's scale, if there is one."""
        module, _, last = name.rpartition(".")
        candidates = [name + suffix for suffix in SCALES]
        if last == "weight":
            candidates += [f"{module}.{suffix}" for suffix in MODULE_SCALES]
        found = [candidate for candidate in candidates if candidate in stored]
        return found[0] if found else None

    def experts(self, parts: Parts) -> int | None:
        """Return the number of experts of a fused tensor."""
        shape = parts.stored.shape(parts.names["weight"])
        return shape[0] if len(shape) == 3 else None

    def restore(self, parts: Parts) -> np.ndarray:
        """Multiply codes by their scales."""
        scales = self._scales(parts)
        codes = parts["weight"]
        is_float8 = parts.dtype("weight") in FLOAT8
        weight = codes.astype(np.float32) if is_float8 else e2m1(codes)
        if weight.ndim != 2:
            raise parts.misfit("weight", "a matrix")
        shape = (weight.shape[0], weight.shape[1])
        block = self._block_of(parts, scales, shape, is_float8)
        factors = None if block is None else blocks.spread(scales, shape, block)
        if factors is None:
            fits = f"one scale for each block {list(self.stated_block)} of {weight.shape}"
            raise parts.misfit("scale", fits)
        weight *= factors
        return weight

    def _block_of(
        self, parts: Parts, scales: np.ndarray, shape: tuple[int, int], is_float8: bool
    ) -> tuple[int, int] | None:
        """Return the block that shares a scale; None for scales of no known form.

        A grid that was cut may still divide the weight, so it has to be that of a block which is
        stated, or which the formats have of themselves.
        """
        stated = self.stated_block
        if parts.dtype("scale") in EXPONENTS or not is_float8:
            known = [MICROSCALING, stated]
        else:
            known = [stated]
        for block in known:
            if scales.shape == blocks.grid_of(shape, block):
                return block
        rows_alone = self.method == "fbgemm_fp8"
        if (self.has_blocks and not rows_alone) or not blocks.is_one_or_rows(scales, shape):
            return None
        if rows_alone and scales.size == 1 and shape[0] > 1:
            return None
        return shape if scales.size == 1 else (1, shape[1])

    @staticmethod
    def _scales(parts: Parts) -> np.ndarray:
        """Return the scales in float32."""
        if parts.dtype("scale") != "U8":
            return parts.finite("scale")
        scales = powers_of_two(parts["scale"])
        if not np.isfinite(scales).all():
            raise parts.not_finite("scale")
        return scales
