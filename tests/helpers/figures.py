"""Figures that a test registers for itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from quantline.metrics.figure import FIGURES


@contextmanager
def own_figures() -> Iterator[None]:
    """Forget what is registered inside the block."""
    before = dict(FIGURES.items())  # loads the registry, so that nothing is loaded inside
    try:
        yield
    finally:
        FIGURES._entries.clear()
        FIGURES._entries.update(before)
