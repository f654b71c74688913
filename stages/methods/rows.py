"""Rows of a weight do not feel each other where only H counts, so compiled kernels take them in threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def over_rows(count: int, run: Callable[[slice], None]) -> None:
    """Call `run` on slices of `count` rows, one a thread. What it writes must not depend on where the slices are cut."""
    threads = torch.get_num_threads()
    step = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, (slice(start, start + step) for start in range(0, count, step))))
