"""Tensors that a bundle holds in floats."""

import numpy as np
import numpy.typing as npt

from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel


def unquantized_values(
    source: TensorSource,
    quantized: QuantizedModel,
    name: str,
    dtype: npt.DTypeLike | None = np.float32,
) -> np.ndarray:
    """Return a tensor that is not quantized.

    Args:
        source: The unquantized model.
        quantized: May have changed the tensor without quantizing it, such as a norm into which
            scales were folded.
        name: The source's name for it.
        dtype: Float type of the result; None for the type that it is stored in.
    """
    changed = name in quantized.overrides
    tensor = quantized.override(name) if changed else source.raw(name)
    return tensor if dtype is None else tensor.astype(dtype, copy=False)
