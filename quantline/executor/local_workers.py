"""Workers that are processes of this machine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from quantline.config.executor import Executor
from quantline.executor.queue import Queue
from quantline.executor.workers import Ended, settings_of

TAIL = 2  # last lines that a message quotes


class LocalWorker:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], queue: Queue, name: str) -> None:
        """Watch a process.

        Args:
            process: That works.
            queue: For which.
            name: As the queue knows it.
        """
        self.process = process
        self._log = queue.log(name)

    def ended(self) -> Ended | None:
        """Return how it has ended; None while it works."""
        code = self.process.poll()
        if code is None:
            return None
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "; ".join(line.strip() for line in lines[-TAIL:] if line.strip())
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Ended(code == 0, f"{how}{': ' if said else ''}{said}")


class LocalWorkers:
    """Starts processes.

    Attributes:
        poll_s: Between two looks at them.
    """

    poll_s = 0.05

    def __init__(self, executor: Executor, queue: Queue) -> None:
        """Share the cores among the workers, if the executor does not say how many each has."""
        self._executor = executor
        self._queue = queue
        cores = len(os.sched_getaffinity(0))
        self._threads = executor.threads or max(1, cores // executor.workers)
        self._started: list[LocalWorker] = []

    def start(self, name: str, place: int) -> LocalWorker:
        """Start a process, which ends with this one."""
        environment = os.environ | settings_of(self._threads, None)
        if self._executor.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus_of(place)
        command = [sys.executable, "-X", "faulthandler", "-m", "quantline.executor.worker"]
        command += [str(self._queue.folder), name, str(os.getpid())]
        with self._queue.log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        worker = LocalWorker(process, self._queue, name)
        self._started.append(worker)
        return worker

    def gpus_of(self, place: int) -> str:
        """Return the GPUs of a place, of those that this process sees, as CUDA takes them."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = place * self._executor.gpus
        wanted = range(first, first + self._executor.gpus)
        if seen is None:
            return ",".join(str(number) for number in wanted)
        return ",".join(seen.split(",")[wanted.start : wanted.stop])

    def stop(self) -> None:
        """End all processes, and wait for that."""
        for worker in self._started:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
        for worker in self._started:
            worker.process.wait()


@contextlib.contextmanager
def local_workers(executor: Executor, queue: Queue) -> Iterator[LocalWorkers]:
    """Start processes in the block, and end them with it."""
    workers = LocalWorkers(executor, queue)
    try:
        yield workers
    finally:
        workers.stop()
