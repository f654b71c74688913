"""Seconds of a piece of work in this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Measure a block.

    Yields:
        A dictionary that has `seconds` of the wall clock and `cpu_seconds` of all threads once the
        block has ended.
    """
    times: dict[str, float] = {}
    started = time.perf_counter()
    cpu_started = time.process_time()
    yield times
    times["seconds"] = time.perf_counter() - started
    times["cpu_seconds"] = time.process_time() - cpu_started
