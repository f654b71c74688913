"""What formats that replace whole linear layers share: their parts, and layers of GPT-2's kind."""

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from quantline.ingest.dequantize.dequantizer import Dequantizer, Plan
from quantline.ingest.dequantize.stored import StoredTensors
from quantline.quantized.tensors import GroupedLinear


def plan_parts(
    stored: StoredTensors,
    parts: Collection[str],
    roots: Collection[str],
    left_out: Collection[str] = (),
) -> Plan:
    """Collect `<module>.<part>` into the plain tensors `<module>.weight`.

    Args:
        stored: The checkpoint.
        parts: Names of parts.
        roots: Parts of which a quantized layer has one at least.
        left_out: Names of tensors of quantized layers that a plain model has no use for.
    """
    modules = set()
    for name in stored.names:
        module, _, last = name.rpartition(".")
        if last in roots:
            modules.add(module)
    restored: dict[str, dict[str, str]] = {f"{module}.weight": {} for module in sorted(modules)}
    dropped = []
    kept = []
    for name in stored.names:
        module, _, last = name.rpartition(".")
        if module in modules and last in parts:
            restored[f"{module}.weight"][last] = name
        elif last in left_out:
            dropped.append(name)
        else:
            kept.append(name)
    return Plan(restored, dropped, kept)


def group_size_of(dequantizer: Dequantizer, *keys: str) -> int | None:
    """Return how many inputs share a scale as the options say, -1 for all; None if they do not.

    Raises:
        StageError: unsupported_architecture, for a value that means nothing.
    """
    for key in keys:
        size = dequantizer.settings.get(key)
        if size is None:
            continue
        if type(size) is not int or size < -1 or size == 0:
            raise dequantizer.refusal(f"a number of inputs, or -1, as {key}", f"{size!r:.80}")
        return size
    return None


def groups_of(columns: int, size: int) -> int:
    """Return how many groups of a size there are, of which the last may be cut short."""
    return 1 if size == -1 else -(-columns // size)


def as_grouped(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int
) -> GroupedLinear | None:
    """Return a layer as recipes hold theirs, which every container of integers can write.

    Args:
        codes: Unsigned integers [out, in], in groups of neighbouring inputs.
        zeros: Unsigned integers [out, groups].
        scales: float32 [out, groups].
        bits: Of an integer.

    Returns:
        None for scales that bfloat16 does not hold, and for groups of other forms.
    """
    columns = codes.shape[1]
    groups = scales.shape[-1]
    if scales.ndim != 2 or len(scales) != len(codes) or columns % groups:
        return None
    if not np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32), scales):
        return None
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    whole = codes.astype(np.uint8)
    return GroupedLinear(whole, scales, zeros.astype(np.uint8), bits, columns // groups, symmetric)


def conv1d_names(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the modules whose plain weights are [in, out], as transformers' Conv1D holds them.

    Libraries that replace linear layers store those of such modules as [out, in] too.
    """
    from transformers.pytorch_utils import Conv1D

    from quantline.ingest.dequantize.plain_checkpoint import without_settings
    from quantline.model.meta_model import meta_model

    model = meta_model(without_settings(config))
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def is_conv1d(tensor: str, names: Collection[str]) -> bool:
    """Whether a checkpoint's weight is that of such a module; files may lack the first parts."""
    module = tensor.removesuffix(".weight")
    return any(name == module or name.endswith(f".{module}") for name in names)
