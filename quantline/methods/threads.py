"""Rows of a weight do not feel each other where only H counts, so compiled kernels take them in threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, as starting them would cost more than a small layer's work. Each computes in itself alone."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def in_threads(parts: Iterable[Part], run: Callable[[Part], None]) -> None:
    """Call `run` on each part, as many at once as torch has threads. `run` must not call this in turn."""
    list(_pool(torch.get_num_threads()).map(run, parts))


def over_rows(count: int, run: Callable[[slice], None]) -> None:
    """Call `run` on slices of `count` rows, one a thread. What it writes must not depend on where the slices are cut."""
    step = -(-count // torch.get_num_threads())
    in_threads((slice(start, start + step) for start in range(0, count, step)), run)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where compiled kernels run, row after row; they may change it."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
