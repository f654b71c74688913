"""Threads over rows of a weight, for compiled kernels that release Python's lock."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")


def usual_threads() -> int:
    """Return as many threads as OpenMP's: OMP_NUM_THREADS, else one for each core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay: starting them costs more than a small layer's work.

    Each computes without threads of torch's own.
    """
    import torch

    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def in_threads(parts: Iterable[Part], run: Callable[[Part], None]) -> None:
    """Call `run` on each part, as many at once as torch has threads.

    `run` must not call this function in turn.
    """
    import torch

    threads = torch.get_num_threads()
    if threads > 1:
        list(_pool(threads).map(run, parts))
        return
    # Handing a small layer's parts to another thread costs more than computing them.
    for part in parts:
        run(part)


def run_over_rows(count: int, run: Callable[[slice], None]) -> None:
    """Call `run` on slices of `count` rows, one slice per thread.

    What `run` writes must not depend on where the slices are cut.
    """
    import torch

    step = max(1, -(-count // torch.get_num_threads()))
    in_threads((slice(start, start + step) for start in range(0, count, step)), run)


def host_copy(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a contiguous copy on the CPU, which a compiled kernel may change."""
    import torch

    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
