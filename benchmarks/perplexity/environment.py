"""The environment of the processes that benchmarks.perplexity starts."""

import os

from benchmarks.paths import ROOT


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that computes in so many threads."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
    }
