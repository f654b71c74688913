"""Workers that are tasks of a Ray cluster. Only their names and a path go through Ray."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.queue import Queue
from quantline.executor.worker import work
from quantline.executor.workers import Ended, settings_of
from quantline.files import MIB

OBJECT_STORE_MIB = 100  # of a Ray that is started here: no data goes through it
CONNECT_S = 10
LONGEST = 300  # characters of what Ray says in a message


class RayWorker:
    """One task."""

    def __init__(self, ray: Any, reference: Any) -> None:
        """Watch a task.

        Args:
            ray: The module.
            reference: To what the task returns.
        """
        self._ray = ray
        self.reference = reference

    def ended(self) -> Ended | None:
        """Return how it has ended; None while it works or waits for its machine."""
        ready, _ = self._ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            self._ray.get(ready[0])
        except Exception as error:  # Ray's own, and whatever the task raised
            text = " ".join(str(error).split())
            return Ended(False, f"{type(error).__name__}: {text[:LONGEST]}")
        return Ended(True, "well")


class RayWorkers:
    """Starts tasks.

    Attributes:
        poll_s: Between two looks at them.
    """

    poll_s = 0.2

    def __init__(self, ray: Any, executor: Executor, queue: Queue) -> None:
        """Say what a task needs.

        Raises:
            StageError: config_invalid, if no machine of the cluster can run one.
        """
        self._ray = ray
        self._queue = queue
        threads = executor.threads or 1
        needs: dict[str, Any] = {"num_cpus": threads, "num_gpus": executor.gpus}
        if executor.memory_mib:
            needs["memory"] = executor.memory_mib * MIB
        _check_some_node(ray, needs)
        # Another worker is started here, which knows what was lost, not by Ray.
        self._task = ray.remote(max_retries=0, max_calls=1, **needs)(work)
        self._started: list[RayWorker] = []

    def start(self, name: str, place: int) -> RayWorker:
        """Start a task on whatever machine has room."""
        worker = RayWorker(self._ray, self._task.remote(str(self._queue.folder), name))
        self._started.append(worker)
        return worker

    def stop(self) -> None:
        """End all tasks."""
        for worker in self._started:
            if worker.ended() is None:
                with contextlib.suppress(Exception):  # a cluster that is gone has no tasks
                    self._ray.cancel(worker.reference, force=True)


def _check_some_node(ray: Any, needs: dict[str, Any]) -> None:
    """Check that a machine of the cluster can run a worker. Raises StageError: config_invalid."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for node in nodes:
        if all(node.get(names[key], 0) >= value for key, value in needs.items()):
            return
    found = [{key: node.get(key, 0) for key in names.values()} for node in nodes]
    raise StageError(
        Failure.CONFIG_INVALID,
        f"expected a machine of the Ray cluster with room for a worker of {needs}, found {found}; "
        "lower executor.threads, executor.gpus or executor.memory_mib",
    )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected Ray for executor ray, and cannot import it: {error}; install it: "
            "pip install 'quantline[ray]'",
        ) from error
    return ray


def check_answers(address: str | None) -> None:
    """Check that somebody listens at host:port: Ray itself waits there for minutes.

    Raises:
        StageError: runtime_unavailable.
    """
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return  # auto, or in a form that Ray knows
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> StageError:
    return StageError(
        Failure.RUNTIME_UNAVAILABLE,
        f"expected a Ray cluster at {address}, found none: "
        f"{' '.join(str(error).split())[:LONGEST]}; start it (`ray start --head`), or set "
        "executor.address=null to start one here",
    )


@contextlib.contextmanager
def ray_workers(executor: Executor, queue: Queue) -> Iterator[RayWorkers]:
    """Connect to a cluster, or start one here, start tasks in the block, and end them with it.

    Raises:
        StageError: runtime_unavailable, if Ray is not installed, or no cluster answers;
            config_invalid, if no machine can run a worker.
    """
    ray = _import_ray()
    threads = executor.threads or 1
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": settings_of(threads, executor.gpus)},
        "log_to_driver": False,
        "configure_logging": False,
    }
    if executor.address is None:
        options |= {
            "num_cpus": executor.workers * threads,
            "object_store_memory": OBJECT_STORE_MIB * MIB,
            "include_dashboard": False,
        }
    check_answers(executor.address)
    before = signal.getsignal(signal.SIGTERM)  # Ray puts its own handler in place of the stage's
    try:
        ray.init(address=executor.address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(executor.address, error) from error
    finally:
        with contextlib.suppress(ValueError):  # not the main thread, where Ray changes nothing
            signal.signal(signal.SIGTERM, before)
    try:
        workers = RayWorkers(ray, executor, queue)
        try:
            yield workers
        finally:
            workers.stop()
    finally:
        ray.shutdown()
