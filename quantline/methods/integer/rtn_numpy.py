"""Round to nearest on min-max grids in numpy: what k-quants are held against, where loading torch would cost as much time as
the rounding itself. The same numbers as quantline/methods/integer/rtn.py, to the bit.
"""

import ml_dtypes
import numpy as np

SMALLEST = 1e-10  # scale


def nearest(weight: np.ndarray, bits: int, group_size: int, symmetric: bool) -> np.ndarray:
    """A weight float32 [out, in], each group of `group_size` inputs rounded to the grid that spans it and holds 0."""
    grouped, half, top = weight.reshape(len(weight), -1, group_size), 2 ** (bits - 1), 2**bits - 1
    low, high = grouped.min(-1, keepdims=True).clip(max=0), grouped.max(-1, keepdims=True).clip(min=0)
    scale = np.maximum(-low / half, high / (half - 1)) if symmetric else (high - low) / top
    scale = scale.clip(min=SMALLEST).astype(ml_dtypes.bfloat16).astype(np.float32)
    zero = half if symmetric else np.rint(-low / scale).clip(0, top)
    integers = (np.rint(grouped / scale) + zero).clip(0, top)
    return ((integers - zero) * scale).astype(np.float32).reshape(weight.shape)
