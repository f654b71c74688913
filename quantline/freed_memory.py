"""Giving back memory that a block no longer needs."""

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """Return glibc's function, or None with another C library, whose heap does the same itself."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def return_freed_memory() -> None:
    """Have the C library return all pages that hold nothing to the system.

    glibc keeps what was freed in chunks of up to 32 MiB, between chunks that are in use. Over 23
    blocks of 172 MiB, calibration's anonymous memory grew from 1.4 to 2.0 GiB by that alone.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
