"""How near calibration and evaluation come to what the machine can compute.

    python -m benchmarks.limits --model /tmp/smollm2/model \
        --calibration /tmp/smollm2/calibration.txt --evaluation /tmp/smollm2/evaluation.txt

The limit is a product of two large float32 matrices on all threads, before and after what is timed.
Operations are those of the products that torch runs (two for a multiplication and an addition), as
its own counter counts them; what is elementwise counts as nothing. Writes
benchmarks/results/limits-<model>.json and prints the table.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.calibration import calibrate
from benchmarks.model_under_test import add_model_options, read_paragraphs
from benchmarks.paths import RESULTS
from benchmarks.reference import write_hidden_reference
from benchmarks.tables import number_table
from quantline.files import write_json
from quantline.metrics.quality import measure_divergence
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from quantline.text.tokenizer import Tokenizer

SIDE = 4096  # of the matrices whose product is the limit
REPETITIONS = 5
TITLES = ("type", "seconds", "10⁹ operations", "10⁹ a second", "the limit's", "share")


def products_per_second() -> float:
    """Return the operations a second of a large float32 matrix product, the best of several."""
    left, right = torch.randn(2, SIDE, SIDE)
    torch.mm(left, right)
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return float(2 * SIDE**3 / min(seconds))


def share_of_limit(work: Callable[[], Any]) -> dict[str, float]:
    """Run some work; return its seconds and operations, and how near to the limit it came.

    Counting takes part of the seconds: some 50 µs for each call into torch.
    """
    before = products_per_second()
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = time.perf_counter() - started
    operations = float(counter.get_total_flops())
    limit = max(before, products_per_second())
    rate = operations / seconds
    return {
        "seconds": seconds,
        "operations": operations,
        "per_second": rate,
        "limit": limit,
        "share": rate / limit,
    }


def measure(
    model: Path, calibration: np.ndarray, evaluation: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return what was done → its seconds and its share of the limit.

    Args:
        model: Folder of the checkpoint.
        calibration: int32 [sequences, length].
        evaluation: int32 [sequences, length].
    """
    checkpoint = Checkpoint(model)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows["calibrate, with gradients"] = share_of_limit(
            lambda: calibrate(checkpoint, calibration, folder / "calibration", gradients=True)
        )
        reference = write_hidden_reference(checkpoint, evaluation, folder / "reference")
        runtime = open_runtime("transformers", model, os.cpu_count() or 1)
        rows["divergence of a safetensors bundle"] = share_of_limit(
            lambda: measure_divergence(runtime, reference)
        )
    return rows


def main() -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = Tokenizer(options.model)
    tokens = [
        tokenizer.pack(read_paragraphs(path), count, options.length)
        for path, count in zip(
            (options.calibration, options.evaluation[0]), options.sequences, strict=True
        )
    ]
    rows = measure(options.model, *tokens)
    resolved = options.model.resolve()
    results = {
        "model": f"{resolved.parent.name}-{resolved.name}",
        "calibration_tokens": int(tokens[0].size),
        "evaluation_tokens": int(tokens[1].size),
        "threads": os.cpu_count(),
        "rows": rows,
    }
    write_json(RESULTS / f"limits-{results['model']}.json", results)
    cells = [
        [
            label,
            f"{row['seconds']:.1f}",
            f"{row['operations'] / 1e9:.0f}",
            f"{row['per_second'] / 1e9:.0f}",
            f"{row['limit'] / 1e9:.0f}",
            f"{row['share']:.2f}",
        ]
        for label, row in rows.items()
    ]
    Console().print(number_table(TITLES, cells))


if __name__ == "__main__":
    main()
