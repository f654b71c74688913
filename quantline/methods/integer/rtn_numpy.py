"""Round to nearest in numpy: what k-quants are compared with.

Loading torch for it would cost as much time as the rounding itself. The numbers are those of
quantline/methods/integer/rtn.py, to the bit.
"""

import ml_dtypes
import numpy as np

SMALLEST_SCALE = 1e-10


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int, symmetric: bool) -> np.ndarray:
    """Round each group of a weight to the grid that spans it and holds 0.

    Args:
        weight: float32 [out, in].
        bits: Of an integer.
        group_size: Neighbouring inputs that share a scale; it divides `in`.
        symmetric: Whether the zero point is fixed in the middle.

    Returns:
        The rounded weight float32 [out, in].
    """
    groups = weight.reshape(len(weight), -1, group_size)
    half = 2 ** (bits - 1)
    top = 2**bits - 1
    low = groups.min(-1, keepdims=True).clip(max=0)
    high = groups.max(-1, keepdims=True).clip(min=0)
    scale = np.maximum(-low / half, high / (half - 1)) if symmetric else (high - low) / top
    scale = scale.clip(min=SMALLEST_SCALE).astype(ml_dtypes.bfloat16).astype(np.float32)
    zero = half if symmetric else np.rint(-low / scale).clip(0, top)
    integers = (np.rint(groups / scale) + zero).clip(0, top)
    return ((integers - zero) * scale).astype(np.float32).reshape(weight.shape)
