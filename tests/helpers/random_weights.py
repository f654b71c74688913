"""Random quantized layers."""

import ml_dtypes
import numpy as np

from quantline.quantized.tensors import FloatLinear, GroupedLinear


def random_scales(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return scales that bfloat16 holds exactly, float32."""
    return generator.random(shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def random_grouped(seed: int = 0, bits: int = 4, group_size: int = 32) -> GroupedLinear:
    """Return a layer of 6 outputs and 64 inputs in grouped integers."""
    generator = np.random.default_rng(seed)
    shape = (6, 64 // group_size)
    integers = generator.integers(0, 1 << bits, (6, 64)).astype(np.uint8)
    scales = random_scales(generator, shape)
    zeros = generator.integers(0, 1 << bits, shape).astype(np.uint8)
    return GroupedLinear(integers, scales, zeros, bits, group_size, False)


def random_float8(seed: int = 0) -> FloatLinear:
    """Return a layer of 6 outputs and 64 inputs in eight-bit floats."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(6, 64)).astype(ml_dtypes.float8_e4m3fn)
    return FloatLinear(values, random_scales(generator, (6, 1)))
