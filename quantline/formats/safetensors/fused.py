"""Stored tensors that several tensors of the model are parts of, such as all experts of a block."""

from collections.abc import Iterator

import numpy as np

from quantline.formats.bundle.unquantized import unquantized_values
from quantline.model.checkpoint import Checkpoint
from quantline.model.dtypes import NUMPY_DTYPES
from quantline.quantized.store import QuantizedModel


def keys_as_stored(source: Checkpoint, quantized: QuantizedModel) -> set[str]:
    """Return the stored tensors that a bundle keeps whole: those no part of which is quantized."""
    keep: set[str] = set()
    drop: set[str] = set()
    for name in source.names:
        view = source.view_of(name)
        if view is not None:
            is_quantized = name.removesuffix(".weight") in quantized.linears
            (drop if is_quantized else keep).update(view.keys)
    return keep - drop


def fused_tensors(
    source: Checkpoint, quantized: QuantizedModel, keys: set[str], types: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield stored tensors with what quantize has changed in their parts.

    Args:
        source: The unquantized model.
        quantized: What changed.
        keys: The stored tensors.
        types: Tensor of the model → the type that it is written in.
    """
    parts: dict[str, list[str]] = {key: [] for key in sorted(keys)}
    for name in source.names:
        view = source.view_of(name)
        if view is not None and set(view.keys) <= keys:
            for key in view.keys:
                parts[key].append(name)
    for key, names in parts.items():
        dtype = NUMPY_DTYPES[types[names[0]]]
        values = np.ascontiguousarray(source.stored_tensor(key).astype(dtype))
        for name in names:
            view = source.view_of(name)
            if view is not None and name in quantized.overrides:
                changed = unquantized_values(source, quantized, name, dtype)
                view.write_part(changed, key, values)
        yield key, values
