"""Random integers of a layer."""

import numpy as np


def random_integers(seed: int, rows: int, columns: int, bits: int) -> np.ndarray:
    """Return uint8 [rows, columns] from 0 to 2^bits - 1."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
