"""GPTQ checkpoints, of AutoGPTQ, GPTQModel and AutoRound.

Per layer, transposed to [in, out]: `qweight` int32, a stream of bits along the inputs, lowest
first; `qzeros` int32 [groups, out * bits / 32], the same along the outputs; `scales` [groups, out];
and `g_idx` [in], the group of each input, in any order where the layer was rounded by activation
order. W = (codes - zeros) * scales. The checkpoint format `gptq` stores zeros - 1, `gptq_v2` stores
them as they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from quantline.ingest.dequantize.bits import unpack
from quantline.ingest.dequantize.dequantizer import (
    Dequantizer,
    Parts,
    Plan,
    register_dequantizer,
)
from quantline.ingest.dequantize.linears import as_grouped, conv1d_names, is_conv1d, plan_parts
from quantline.ingest.dequantize.stored import StoredTensors
from quantline.quantized.tensors import GroupedLinear

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32
LESS_ONE = "gptq"
AS_THEY_ARE = "gptq_v2"
BITS = (2, 3, 4, 8)
FORMAT_KEYS = ("checkpoint_format", "format")


class Layer(NamedTuple):
    """A layer, [out, in].

    Attributes:
        codes: uint8 [out, in].
        zeros: float32 [out, groups].
        scales: float32 [out, groups].
        order: The group of each input.
        bits: Of a code.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    order: np.ndarray
    bits: int


@register_dequantizer("gptq")
class Gptq(Dequantizer):
    """Integers of 2, 3, 4 or 8 bits."""

    NEUTRAL = frozenset(
        {
            *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "damp_percent"),
            *(
                "cache_block_outputs",
                "dataset",
                "desc_act",
                "dynamic",
                "exllama_config",
                "group_size",
            ),
            *("damp_auto_increment", "disable_exllama", "lm_head", "max_input_length", "meta"),
            *("model_file_base_name", "model_name_or_path", "model_seqlen", "mse", "pad_token_id"),
            *("module_name_preceding_first_block", "modules_in_block_to_quantize", "quantizer"),
            *(
                "static_groups",
                "sym",
                "tokenizer",
                "true_sequential",
                "use_cuda_fp16",
                "use_exllama",
            ),
            *("modules_to_not_convert", "offload_to_disk", "offload_to_disk_path", "version"),
        }
    )
    FIXED: Mapping[str, tuple[Any, ...]] = {
        "bits": BITS,
        "format": (None, LESS_ONE, AS_THEY_ARE),
        "checkpoint_format": (None, LESS_ONE, AS_THEY_ARE),
        "pack_dtype": (None, "int32"),
    }

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options."""
        super().__init__(settings, config)
        named = {str(settings[key]) for key in FORMAT_KEYS if settings.get(key) is not None}
        if len(named) > 1:
            raise self.refusal("one format", f"checkpoint_format and format, {sorted(named)}")
        self.less_one = AS_THEY_ARE not in named
        self.conv1d: frozenset[str] = frozenset()

    def plan(self, stored: StoredTensors) -> Plan:
        """Collect the parts of every layer."""
        self.conv1d = conv1d_names(self.config)
        return plan_parts(stored, PARTS, roots=("qweight",))

    def restore(self, parts: Parts) -> np.ndarray:
        """Return (codes - zeros) * scales of one layer."""
        layer = self._layer(parts)
        weight = layer.codes.astype(np.float32)
        weight -= layer.zeros[:, layer.order]
        weight *= layer.scales[:, layer.order]
        return weight.T if is_conv1d(parts.name, self.conv1d) else weight

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return the integers of a layer whose groups are neighbouring inputs."""
        layer = self._layer(parts)
        size = len(layer.order) // layer.scales.shape[1]
        in_order = np.array_equal(layer.order, np.arange(len(layer.order)) // size)
        if not in_order or is_conv1d(parts.name, self.conv1d):
            return None
        return as_grouped(layer.codes, layer.zeros, layer.scales, layer.bits)

    def _layer(self, parts: Parts) -> Layer:
        """Read and check the parts of one layer."""
        scales = parts.finite("scales")
        packed = parts["qweight"]
        zeros = parts["qzeros"]
        if packed.ndim != 2 or scales.ndim != 2 or parts.dtype("qweight") != "I32":
            raise parts.misfit("qweight", "an int32 matrix beside a matrix of scales")
        groups, rows = scales.shape
        bits = self._bits(parts, zeros.shape, rows)
        columns = packed.shape[0] * WORD_BITS // bits
        codes = unpack(packed.T, bits, columns)
        zero_points = unpack(zeros, bits, rows).astype(np.float32)
        if self.less_one:
            # The sum stays within the bits, as in the kernels: what was 0 is stored as all ones.
            zero_points = (zero_points + 1) % 2**bits
        order = self._groups(parts, columns, groups)
        if zero_points.shape != scales.shape or codes.shape[0] != rows:
            raise parts.misfit("scales", f"[groups, {codes.shape[0]}]")
        return Layer(codes, zero_points.T, np.ascontiguousarray(scales.T), order, bits)

    def _bits(self, parts: Parts, shape: tuple[int, ...], rows: int) -> int:
        """Return the width that the packed zeros show, which has to be the one in the options."""
        bits = WORD_BITS * shape[-1] / rows
        wanted = self.settings.get("bits")
        mixed = self.settings.get("dynamic") or self.settings.get("extra_config")
        if bits not in BITS or (wanted is not None and not mixed and bits != wanted):
            raise parts.misfit("qzeros", f"[groups, {rows} * {wanted} / {WORD_BITS}]")
        return int(bits)

    def _groups(self, parts: Parts, columns: int, groups: int) -> np.ndarray:
        """Return the group of every input."""
        if "g_idx" in parts:
            order = parts["g_idx"].astype(np.int64).reshape(-1)
            if len(order) != columns or not ((order >= 0) & (order < groups)).all():
                raise parts.misfit("g_idx", f"{columns} numbers of {groups} groups")
            return order
        size = self.settings.get("group_size") or -1
        size = columns if size == -1 else int(size)
        if -(-columns // size) != groups:
            raise parts.misfit("scales", f"one row for each {size} of {columns} inputs")
        return np.arange(columns) // size
