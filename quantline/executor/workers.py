"""What starts workers, and what it says of them: the protocol of local, Ray's and Slurm's."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from quantline.config.executor import Executor
from quantline.executor.queue import Queue

ROOT = Path(__file__).resolve().parents[2]  # from which workers import this very quantline
# Settings of this process that those of other machines need.
PASSED = ("HF_HUB_OFFLINE", "MKL_CBWR")
# Kind → the module and the context manager that starts its workers.
KINDS = {
    "local": ("quantline.executor.local_workers", "local_workers"),
    "ray": ("quantline.executor.ray_workers", "ray_workers"),
    "slurm": ("quantline.executor.slurm_workers", "slurm_workers"),
}


class Ended(NamedTuple):
    """How a worker has ended.

    Attributes:
        well: Whether it found no item any more.
        how: In words, for messages.
    """

    well: bool
    how: str


class Worker(Protocol):
    """A worker that was started."""

    def ended(self) -> Ended | None:
        """Return how it has ended; None while it works, or waits for its machine."""


class Workers(Protocol):
    """What starts workers.

    Life cycle: a context manager of KINDS yields it, and ends all its workers when it is left.

    Attributes:
        poll_s: Between two looks at them.
    """

    poll_s: float

    def start(self, name: str, place: int) -> Worker:
        """Start a worker.

        Args:
            name: As the queue knows it.
            place: Which of the workers that run at once it is, from 0.
        """


def start_workers(executor: Executor, queue: Queue) -> AbstractContextManager[Workers]:
    """Return what starts the workers of a kind.

    Raises:
        StageError: runtime_unavailable, if its package or the cluster is not there.
    """
    module, name = KINDS[executor.kind]
    enter = getattr(import_module(module), name)
    return cast(Callable[..., AbstractContextManager[Workers]], enter)(executor, queue)


def settings_of(threads: int, gpus: int | None) -> dict[str, str]:
    """Return the environment variables that a worker needs.

    Args:
        threads: Of each library that computes.
        gpus: That the cluster gives it: with 0 it sees none, whatever the machine has. None leaves
            it those of this process.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        settings[f"{name}_NUM_THREADS"] = str(threads)
    if gpus == 0:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    return settings | {name: os.environ[name] for name in PASSED if name in os.environ}
