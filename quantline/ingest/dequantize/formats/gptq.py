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
from quantline.ingest.dequantize.linears import (
    ModelNames,
    as_grouped,
    group_size_of,
    groups_of,
    names_of_model,
    plan_parts,
)
from quantline.ingest.dequantize.stored import StoredTensors
from quantline.model.configuration import CONFIG
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

    SIGNS = (".qweight", ".qzeros")
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
        # Layers of their own form: their width is read off their tensors. A rule that begins with a
        # minus leaves layers plain.
        rules = settings.get("dynamic") or ()
        self.mixed = any(not str(rule).startswith("-:") for rule in rules)
        self.group_size = group_size_of(self, "group_size")
        self.model = ModelNames()

    def plan(self, stored: StoredTensors) -> Plan:
        """Collect the parts of every layer.

        AutoGPTQ gave every layer a bias, zeros where the model has none.
        """
        self.model = names_of_model(self.config)
        plan = plan_parts(stored, PARTS, roots=("qweight", "qzeros", "g_idx"))
        empty = []
        for name in plan.kept:
            module, _, last = name.rpartition(".")
            is_of_layer = last == "bias" and f"{module}.weight" in plan.restored
            if is_of_layer and not self.model.has(name) and not stored.read(name).any():
                empty.append(name)
        kept = [name for name in plan.kept if name not in empty]
        return plan._replace(dropped=[*plan.dropped, *empty], kept=kept)

    def restore(self, parts: Parts) -> np.ndarray:
        """Return (codes - zeros) * scales of one layer."""
        layer = self._layer(parts)
        weight = layer.codes.astype(np.float32)
        weight -= layer.zeros[:, layer.order]
        weight *= layer.scales[:, layer.order]
        return weight.T if self.model.is_conv1d(parts.name) else weight

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return the integers of a layer whose groups are neighbouring inputs."""
        layer = self._layer(parts)
        size = len(layer.order) // layer.scales.shape[1]
        in_order = np.array_equal(layer.order, np.arange(len(layer.order)) // size)
        if not in_order or self.model.is_conv1d(parts.name):
            return None
        return as_grouped(layer.codes, layer.zeros, layer.scales, layer.bits)

    def _layer(self, parts: Parts) -> Layer:
        """Read and check the parts of one layer."""
        scales = parts.finite("scales")
        packed = parts["qweight"]
        zeros = parts["qzeros"]
        if packed.ndim != 2 or scales.ndim != 2 or parts.dtype("qweight") != "I32":
            raise parts.misfit("qweight", "an int32 matrix beside a matrix of scales")
        if zeros.ndim != 2 or parts.dtype("qzeros") != "I32":
            raise parts.misfit("qzeros", "an int32 matrix")
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
        self._check_symmetric(parts, zero_points, 2 ** (bits - 1))
        return Layer(codes, zero_points.T, np.ascontiguousarray(scales.T), order, bits)

    def _bits(self, parts: Parts, shape: tuple[int, ...], rows: int) -> int:
        """Return the width that the packed zeros show, which has to be the one in the options."""
        bits = WORD_BITS * shape[-1] / max(rows, 1)
        wanted = self.settings.get("bits")
        if bits not in BITS or (wanted is not None and not self.mixed and bits != wanted):
            raise parts.misfit("qzeros", f"[groups, {rows} * {wanted} / {WORD_BITS}]")
        return int(bits)

    def _check_symmetric(self, parts: Parts, zeros: np.ndarray, middle: int) -> None:
        """Refuse zero points that the options deny; the format may be the other one in truth."""
        if self.settings.get("sym") is True and not self.mixed and (zeros != middle).any():
            named, other = LESS_ONE, AS_THEY_ARE
            if not self.less_one:
                named, other = other, named
            raise self.refusal(
                f"zero points of {middle}, as sym in {CONFIG} says, in {parts.names['qzeros']}",
                f"others, read in the format {named}; if its checkpoint_format is {other} in "
                f"truth, say so in {CONFIG}",
            )

    def _groups(self, parts: Parts, columns: int, groups: int) -> np.ndarray:
        """Return the group of every input."""
        size = -1 if self.group_size is None else self.group_size
        known = self.group_size is not None and not self.mixed
        ordered = "g_idx" in parts
        if (known or not ordered) and groups_of(columns, size) != groups:
            raise parts.misfit("scales", f"one row for each {size} of {columns} inputs")
        if ordered:
            order = parts.whole_numbers("g_idx").reshape(-1)
            if len(order) != columns or not ((order >= 0) & (order < groups)).all():
                raise parts.misfit("g_idx", f"{columns} numbers of {groups} groups")
            return order
        if self.settings.get("desc_act") and groups > 1:
            raise parts.missing("g_idx")
        return np.arange(columns) // (columns if size == -1 else size)
