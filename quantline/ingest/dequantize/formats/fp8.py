"""FP8 weights with scales of blocks, rows or tensors: DeepSeek's, Mistral's, MiniMax's and others.

W = codes * scale (DeepSeek-V3, arXiv:2412.19437, section 3.3). The scale is `weight_scale_inv` in
most files, in spite of its name the factor itself. It may be a power of two in one byte (E8M0), and
experts may be 4-bit floats with scales of 32 columns. Scales of activations are left out.
"""

from typing import ClassVar

import numpy as np

from quantline.ingest.dequantize import blocks
from quantline.ingest.dequantize.bits import e2m1, powers_of_two
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.stored import StoredTensors

CODES = frozenset({"F8_E4M3", "F8_E5M2", "F4", "I8", "U8"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
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
        block = self.settings.get("weight_block_size")
        shape = (weight.shape[0], weight.shape[1])
        factors = blocks.spread(scales, shape, block)
        # A grid that was cut may still divide the weight. Microscaling formats, whose scales are
        # powers of two, have blocks of their own beside those that the options state.
        is_stated = is_float8 and parts.dtype("scale") not in ("U8", "F8_E8M0")
        if factors is None or (is_stated and not blocks.has_blocks(scales, shape, block)):
            fits = f"one scale for each block {block or 'that divides them'} of {weight.shape}"
            raise parts.misfit("scale", fits)
        weight *= factors
        return weight

    @staticmethod
    def _scales(parts: Parts) -> np.ndarray:
        """Return the scales in float32."""
        if parts.dtype("scale") != "U8":
            return parts.finite("scale")
        scales = powers_of_two(parts["scale"])
        if not np.isfinite(scales).all():
            raise parts.not_finite("scale")
        return scales
