"""What formats that replace whole linear layers share: their parts, and layers of GPT-2's kind."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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


class ModelNames(NamedTuple):
    """What formats that replace whole linear layers have to know of the plain model.

    Attributes:
        conv1d: The modules whose plain weights are [in, out], as transformers' Conv1D holds them.
            Libraries that replace linear layers store those of such modules as [out, in] too.
        tensors: The names of all tensors.
    """

    conv1d: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()

    def is_conv1d(self, tensor: str) -> bool:
        """Whether a checkpoint's weight is that of a Conv1D."""
        return _is_among(tensor.removesuffix(".weight"), self.conv1d)

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor of a checkpoint's name."""
        return _is_among(tensor, self.tensors)


def _is_among(name: str, names: Collection[str]) -> bool:
    """Whether a name is among those of a model; files may lack the first parts."""
    return name in names or any(other.endswith(f".{name}") for other in names)


def names_of_model(config: Mapping[str, Any]) -> ModelNames:
    """Build the plain model of a config.json, and return what its parts are called."""
    from transformers.pytorch_utils import Conv1D

    from quantline.ingest.dequantize.plain_checkpoint import without_settings
    from quantline.model.meta_model import meta_model

    model = meta_model(without_settings(config))
    modules = model.named_modules()
    conv1d = frozenset(name for name, module in modules if isinstance(module, Conv1D))
    return ModelNames(conv1d, frozenset(model.state_dict()))
