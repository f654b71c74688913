"""Noise in the place of what a quantized file has lost.

Dequantized weights lie on the file's own grid, which some of the grids that are compared would hit
exactly. So each weight is moved by up to half a step of that grid, which is what rounding may have
moved it by before.
"""

import numpy as np

BLOCK = 32  # weights that share a step, or a multiple of their number does
MOST_VALUES = 16  # that a weight of at most 4 bits can have in a block
SMALLEST_STEP = 1e-9  # nearer values are one value, rounded in two ways


def with_noise(weight: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a dequantized weight with noise as large as its rounding.

    Args:
        weight: float32 [out, in].
        generator: Of the noise.

    Returns:
        float32 [out, in]; the weight itself where its blocks have more values than 4 bits allow.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        return weight
    blocks = weight.reshape(-1, BLOCK)
    distances = np.diff(np.sort(blocks, axis=1), axis=1)
    apart = distances > SMALLEST_STEP
    if (apart.sum(1) >= MOST_VALUES).any():
        return weight
    steps = np.where(apart, distances, np.inf).min(1, keepdims=True)
    steps[np.isinf(steps)] = 0.0  # all alike
    moves = generator.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
    return (blocks + moves * steps).reshape(weight.shape)
