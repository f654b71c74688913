"""MXFP4 experts as gpt-oss stores them: `<experts>_blocks` and `<experts>_scales`.

32 values along the inputs share a scale, a power of two (OCP Microscaling Formats 1.0). Blocks are
uint8 [experts, out, blocks, 16], two values a byte, the low half first; the plain tensor is what
transformers' module holds, [experts, in, out].
"""

import numpy as np

from quantline.ingest.dequantize.bits import e2m1, powers_of_two
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.stored import StoredTensors

ENDINGS = {"_blocks": "blocks", "_scales": "scales"}


@register_dequantizer("mxfp4")
class Mxfp4(Dequantizer):
    """Blocks of 4-bit floats beside their scales."""

    SIGNS = tuple(f"_proj{ending}" for ending in ENDINGS)
    NEUTRAL = frozenset({"modules_to_not_convert", "dequantize"})

    def plan(self, stored: StoredTensors) -> Plan:
        """Pair blocks with their scales."""
        restored: dict[str, dict[str, str]] = {}
        kept = []
        for name in stored.names:
            ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
            if ending is None or stored.dtype(name) != "U8":
                kept.append(name)
                continue
            restored.setdefault(name.removesuffix(ending), {})[ENDINGS[ending]] = name
        return Plan(restored, [], kept)

    def experts(self, parts: Parts) -> int | None:
        """Return the number of experts of a tensor."""
        blocks = parts["blocks"]
        if blocks.ndim != 4 or parts["scales"].shape != blocks.shape[:-1]:
            raise parts.misfit(
                "blocks", "[experts, out, blocks, 16] beside scales [experts, out, blocks]"
            )
        return len(blocks)

    def restore(self, parts: Parts) -> np.ndarray:
        """Multiply the blocks of one expert by their scales, and transpose them."""
        values = e2m1(parts["blocks"])
        scales = powers_of_two(parts["scales"])
        if not np.isfinite(scales).all():
            raise parts.not_finite("scales")
        return (values * scales[..., None]).reshape(len(values), -1).T
