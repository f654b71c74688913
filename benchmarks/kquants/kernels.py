"""The speed of our search of k-quant blocks beside that of ggml's, and whether both agree."""

import time
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.tables import number_table
from quantline.methods.ggml.quantize import SEARCHED_TYPES, quantize_blocks

SHAPE = (1024, 4096)  # rows and width of the weight
BLOCK_SIZE = 256
KERNELS = ("numba", "ggml")
REPETITIONS = 3
TITLES = ("type", "importance", "M weights/s", "ggml's", "ratio", "equal blocks")


def measure_kernels(threads: int) -> list[dict[str, Any]]:
    """Time both kernels on a random weight.

    Args:
        threads: Of either.

    Returns:
        For each type, without and with importance: million weights a second of both kernels, and
        the share of blocks that are equal.
    """
    draw = np.random.default_rng(0)
    weight = (draw.standard_t(5, size=SHAPE) * 0.02).astype(np.float32)
    importance = np.exp(draw.normal(size=SHAPE[1])).astype(np.float32)
    rows = []
    for ggml_type in SEARCHED_TYPES:
        rows.append(_measure_type(weight, ggml_type, None, threads))
        rows.append(_measure_type(weight, ggml_type, importance, threads))
    return rows


def _measure_type(
    weight: np.ndarray, ggml_type: str, importance: np.ndarray | None, threads: int
) -> dict[str, Any]:
    """Time both kernels on one type."""
    blocks = {}
    speeds = {}
    for kernel in KERNELS:
        quantize_blocks(weight[:16], ggml_type, importance, threads, kernel)  # compiles
        best = np.inf
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            data = quantize_blocks(weight, ggml_type, importance, threads, kernel)
            best = min(best, time.perf_counter() - started)
        speeds[kernel] = weight.size / best / 1e6
        blocks[kernel] = data.reshape(weight.size // BLOCK_SIZE, -1)
    return {
        "type": ggml_type,
        "importance": importance is not None,
        "mweights_s": speeds["numba"],
        "ggml_mweights_s": speeds["ggml"],
        "ratio": speeds["numba"] / speeds["ggml"],
        "equal": float((blocks["numba"] == blocks["ggml"]).all(1).mean()),
    }


def kernel_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of what `measure_kernels` returned."""
    cells = []
    for row in rows:
        cells.append(
            [
                row["type"],
                "yes" if row["importance"] else "no",
                f"{row['mweights_s']:.1f}",
                f"{row['ggml_mweights_s']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['equal']:.4%}",
            ]
        )
    return number_table(TITLES, cells)
