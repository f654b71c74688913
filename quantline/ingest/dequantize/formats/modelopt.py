"""NVIDIA's Model Optimizer: NVFP4 and FP8 weights, told apart by the dtypes of their tensors.

NVFP4: `weight` uint8, two 4-bit floats a byte, the low half first; 16 along the inputs share
`weight_scale`, an 8-bit float, and all share `weight_scale_2`, so that
W = codes * weight_scale * weight_scale_2. FP8: W = codes * weight_scale.
"""

import numpy as np

from quantline.ingest.dequantize import blocks
from quantline.ingest.dequantize.bits import e2m1
from quantline.ingest.dequantize.dequantizer import Parts, Plan, register_dequantizer
from quantline.ingest.dequantize.formats.fp8 import Fp8
from quantline.ingest.dequantize.stored import StoredTensors

SECOND = "weight_scale_2"
SMOOTHED = "pre_quant_scale"
GROUP = 16


@register_dequantizer("modelopt", "modelopt_fp4", "modelopt_mixed")
class ModelOpt(Fp8):
    """FP8 beside NVFP4, whose codes are uint8."""

    NEUTRAL = frozenset(
        {
            *("config_groups", "exclude_modules", "ignore", "producer", "quant_algo"),
            *("group_size", "kv_cache_quant_algo", "kv_cache_scheme", "quantized_layers"),
            *("quant_type", "quantization", "targets"),
        }
    )
    CODES = frozenset({"F8_E4M3", "U8"})

    def plan(self, stored: StoredTensors) -> Plan:
        """Pair codes with their scales, the second of NVFP4 included."""
        for name in stored.names:
            if name.endswith(SMOOTHED):
                raise self.refusal(
                    "weights that stand for themselves", f"{name}, which scales inputs"
                )
        plan = super().plan(stored)
        seconds = set()
        for name, parts in plan.restored.items():
            second = f"{name.rpartition('.')[0]}.{SECOND}"
            if second in stored:
                parts["second"] = second
                seconds.add(second)
        kept = [name for name in plan.kept if name not in seconds]
        return Plan(plan.restored, plan.dropped, kept)

    def restore(self, parts: Parts) -> np.ndarray:
        """Multiply codes by their scales."""
        if parts.dtype("weight") != "U8":
            return super().restore(parts)
        values = e2m1(parts["weight"])
        second = parts.finite("second").reshape(-1)
        if second.shape != (1,):
            raise parts.misfit("second", "one number")
        scales = parts.finite("scale") * second
        if values.ndim != 2 or scales.shape != (len(values), values.shape[1] / GROUP):
            raise parts.misfit("scale", f"one for each {GROUP} inputs of a row")
        factors = blocks.spread(scales, (values.shape[0], values.shape[1]))
        assert factors is not None, "checked above"
        return values * factors
