"""AWQ checkpoints in the layout "gemm" of AutoAWQ.

Per layer, transposed to [in, out]: `qweight` int32 [in, out / 8], eight 4-bit codes a word, in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; `qzeros` the same for [groups, out]; `scales`
[groups, out]. W = (codes - zeros) * scales. Without zero points the codes are around 8.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantline.ingest.dequantize.bits import unpack
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.linears import (
    as_grouped,
    group_size_of,
    groups_of,
    plan_parts,
)
from quantline.ingest.dequantize.stored import StoredTensors
from quantline.quantized.tensors import GroupedLinear

PARTS = ("qweight", "qzeros", "scales")
BITS = 4
WORD = 8  # codes
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def unpack_interleaved(words: np.ndarray) -> np.ndarray:
    """Return the codes of int32 [rows, words], uint8 [rows, 8 * words]."""
    rows, count = words.shape
    stored = unpack(words, BITS, WORD * count).reshape(rows, count, WORD)
    codes = np.empty_like(stored)
    codes[..., ORDER] = stored
    return codes.reshape(rows, -1)


@register_dequantizer("awq")
class Awq(Dequantizer):
    """Integers of 4 bits."""

    SIGNS = (".qweight", ".qzeros")
    NEUTRAL = frozenset(
        {
            *(
                "backend",
                "do_fuse",
                "exllama_config",
                "fuse_max_seq_len",
                "group_size",
                "modules_to_fuse",
            ),
            *("modules_to_not_convert", "q_group_size", "sym", "zero_point", "desc_act", "lm_head"),
            *("dynamic", "meta", "damp_percent", "true_sequential", "act_group_aware"),
        }
    )
    FIXED: Mapping[str, tuple[Any, ...]] = {
        "bits": (BITS,),
        "w_bit": (BITS,),
        "version": ("gemm", "GEMM"),
        "format": ("gemm", "GEMM", None),
        "checkpoint_format": ("gemm", "GEMM", None),
        "pack_dtype": (None, "int32"),
    }

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options."""
        super().__init__(settings, config)
        self.group_size = group_size_of(self, "group_size", "q_group_size")

    def plan(self, stored: StoredTensors) -> Plan:
        """Collect the parts of every layer."""
        return plan_parts(stored, PARTS, roots=("qweight", "qzeros"))

    def restore(self, parts: Parts) -> np.ndarray:
        """Return (codes - zeros) * scales of one layer."""
        codes, zeros, scales = self._layer(parts)
        order = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
        weight = codes.astype(np.float32)
        weight -= zeros[:, order]
        weight *= scales[:, order]
        return weight

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return the integers of a layer."""
        codes, zeros, scales = self._layer(parts)
        return as_grouped(codes, zeros, scales, BITS)

    def _layer(self, parts: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return codes [out, in], zeros and scales [out, groups] of one layer."""
        scales = parts.finite("scales")
        packed = parts["qweight"]
        if packed.ndim != 2 or scales.ndim != 2 or parts.dtype("qweight") != "I32":
            raise parts.misfit("qweight", "an int32 matrix beside a matrix of scales")
        columns, rows = packed.shape[0], packed.shape[1] * WORD
        groups = len(scales)
        if not groups or scales.shape != (groups, rows) or columns % groups:
            raise parts.misfit("scales", f"[groups, {rows}], of groups that divide {columns}")
        size = self.group_size
        is_stated = size is not None and not self.settings.get("dynamic")
        if is_stated and groups_of(columns, size or -1) != groups:
            raise parts.misfit("scales", f"one row for each {size} of {columns} inputs")
        codes = unpack_interleaved(packed)
        middle = 2 ** (BITS - 1)
        asymmetric = self.settings.get("zero_point", True)
        if not asymmetric and "qzeros" not in parts:
            return codes.T, np.full_like(scales, middle).T, np.ascontiguousarray(scales.T)
        packed_zeros = parts["qzeros"]
        if packed_zeros.shape != (groups, rows // WORD) or parts.dtype("qzeros") != "I32":
            raise parts.misfit("qzeros", f"int32 [{groups}, {rows} / {WORD}]")
        zeros = unpack_interleaved(packed_zeros).astype(np.float32)
        if not asymmetric and (zeros != middle).any():
            raise parts.misfit("qzeros", f"zero points of {middle}, as zero_point false says")
        return codes.T, zeros.T, np.ascontiguousarray(scales.T)
